"""Folders are published whole or not at all."""

import pytest

from mxlab import rundir


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with rundir.partial(tmp_path) as folder:
        (folder / "a").touch()
        assert folder.name.startswith(".partial-")
        published = rundir.publish(folder, tmp_path, "x")
    assert [path.name for path in tmp_path.iterdir()] == [published.name]
    assert published.name.endswith("_x")
    assert (published / "a").is_file()


def test_nothing_is_left_of_one_that_was_given_up(tmp_path):

    def fail() -> None:
        with rundir.partial(tmp_path) as folder:
            (folder / "a").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_folders_that_hold_something_else_stay(tmp_path):
    (tmp_path / "empty").mkdir()
    with rundir.partial(tmp_path / "empty"):
        pass
    with rundir.partial(tmp_path / "results" / "stage"):
        (tmp_path / "results" / "notes.txt").touch()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "empty",
        "results",
        "results/notes.txt",
    ]


def test_two_of_one_process_do_not_disturb_each_other(tmp_path):
    with rundir.partial(tmp_path) as first, rundir.partial(tmp_path) as second:
        assert first != second
        assert first.is_dir()
