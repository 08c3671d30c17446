"""docs/sweeps.md says all of a sweep's and a study's keys, and its files load."""

import re
from dataclasses import fields

import pytest

from mxlab.eval.settings import KEYS, request_from
from mxlab.eval.text import TextRequest
from mxlab.experiments.format_study import FormatStudy, load_study
from mxlab.experiments.sweep import load_sweep
from mxlab.recipe import load_recipe
from mxlab.recipe.mx_specs import OPTIONS

from support.paths import ROOT

PAGE = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
SWEEP, RECIPES, STUDY = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "mine.toml"


def rows() -> dict[str, str]:
    """What the table of keys gives for each where none is given."""
    return dict(re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", PAGE, re.MULTILINE))


def test_every_key_is_there():
    assert set(rows()) == {"stage", "recipe", *KEYS}
    acting = {name for name, option in OPTIONS.items() if not option.metadata.get("inert")}
    table = PAGE.partition("microxcaling's options are keys")[2].partition("Formats and rules")[0]
    assert {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)} == acting


def test_defaults():
    tasks, text = (request_from(load_recipe("ex1"), values) for values in ({}, {"text": "passages"}))
    assert isinstance(text, TextRequest)
    said = rows()
    for name in ("model", "dtype", "device"):
        assert said[name] == f"`{getattr(tasks, name)}`"
    assert said["batch_size"] == f"{tasks.batch_size} rows, {text.batch_size} windows"
    assert said["max_length"] == str(getattr(tasks, "max_length"))  # noqa: B009
    assert (said["window"], said["compare"]) == (str(text.window), f"`{str(text.compare).lower()}`")


def test_the_files_load(file):
    file.write_text(SWEEP, encoding="utf-8")
    assert len(list(load_sweep(file).points())) == 6
    file.write_text(RECIPES, encoding="utf-8")
    assert len(list(load_sweep(file).points())) == 6
    file.write_text(STUDY, encoding="utf-8")
    assert len(list(load_study(file).points())) == 2 * 2 * 4
    assert set(re.findall(r"^(\w+) = ", STUDY, re.MULTILINE)) == {field.name for field in fields(FormatStudy)}


def test_what_a_study_takes_where_none_is_given(file):
    file.write_text(STUDY, encoding="utf-8")
    said = load_study(file)
    plain = FormatStudy(said.formats)
    for name in ("roles", "text", "window", "batch_size", "model", "dtype", "compare"):
        assert getattr(said, name) == getattr(plain, name), name
    assert (plain.scale_rules, plain.windows) == (("floor",), None)
