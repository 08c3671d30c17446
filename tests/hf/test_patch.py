"""The patch of transformers: on a copy of it, byte for byte, and with a failure at every step."""

import errno
import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mxlab import shipped
from mxlab.errors import PatchError
from mxlab.hf import patch
from mxlab.hf.patch import State

from support import llama

TARGET = "modeling_llama.py"
KEPT = "modular_llama_upstream.py"
OVERLAY = shipped.PATCHED_LLAMA.read_bytes()
INSTALL = llama.ROOT / "install.sh"


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A stock copy of transformers that `patching` finds first."""
    folder = llama.copy_transformers(tmp_path / "a site")
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    monkeypatch.syspath_prepend(folder)
    assert patch.status().location == folder / "transformers"  # never the environment's own
    return folder


@pytest.fixture
def folder(site) -> Path:
    """The Llama folder of that copy."""
    return site / llama.LLAMA


def snapshot(folder: Path) -> dict[str, tuple]:
    """Every file, with content, modification time and mode."""
    stat = {p: p.stat() for p in folder.rglob("*") if p.is_file()}
    return {
        str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).hexdigest(), s.st_mtime_ns, s.st_mode)
        for p, s in stat.items()
    }


def make_version(site: Path, version: str) -> None:
    """Let the metadata say that this is another version."""
    (metadata,) = site.glob("transformers-*.dist-info")
    text = (metadata / "METADATA").read_text(encoding="utf-8")
    old = patch.status().version
    (metadata / "METADATA").write_text(text.replace(f"Version: {old}\n", f"Version: {version}\n", 1), encoding="utf-8")
    importlib.invalidate_caches()


def fail_at(monkeypatch, module, name: str, call: int, error: BaseException) -> list:
    """Let the ``call``-th call of a function raise instead; returns the list of calls."""
    original, calls = getattr(module, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, failing)
    return calls


def imported(site: Path) -> str:
    """Import Llama from that copy in a process of its own: the file that LlamaModel comes from, or the error."""
    code = "from transformers import LlamaForCausalLM, LlamaModel as M; print(M.__module__, len(M.__mro__))"
    command = [sys.executable, "-c", code]
    environment = llama.environment(site, PYTHONDONTWRITEBYTECODE="")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else done.stderr


def test_patch_and_unpatch_restore_every_byte(folder):
    before = snapshot(folder)
    assert "is patched" in patch.patch()
    assert (folder / TARGET).read_bytes() == OVERLAY
    original = snapshot(folder)[KEPT]
    assert original == before[TARGET]
    assert patch.status().state is State.PATCHED
    assert "as it was before" in patch.unpatch()
    assert snapshot(folder) == before
    assert patch.status().state is State.STOCK


def test_unpatch_removes_the_compiled_upstream_file(site, folder):
    before = set(snapshot(folder))
    patch.patch()
    assert "modeling_llama" in imported(site)
    assert list(folder.glob("__pycache__/modular_*"))
    patch.unpatch()
    assert not [f for f in set(snapshot(folder)) - before if "modular" in f]


def test_the_patch_takes_effect_and_goes(site):
    stock = imported(site)
    patch.patch()
    patched = imported(site)
    patch.unpatch()
    assert stock.split()[0] == patched.split()[0] == "transformers.models.llama.modeling_llama"
    assert int(patched.split()[1]) == int(stock.split()[1]) + 1  # one class above the upstream LlamaModel
    assert imported(site) == stock


def test_patching_twice_changes_nothing(folder):
    patch.patch()
    before = snapshot(folder)
    assert "already" in patch.patch()
    assert snapshot(folder) == before


def test_a_hard_linked_original_is_not_written_to(folder, tmp_path):
    (tmp_path / "cached.py").hardlink_to(folder / TARGET)
    original = (tmp_path / "cached.py").read_bytes()
    patch.patch()
    patch.unpatch()
    assert (tmp_path / "cached.py").read_bytes() == original


def test_the_overlay_of_another_version_is_updated(folder):
    patch.patch()
    (folder / TARGET).write_bytes(OVERLAY + b"# older\n")
    status = patch.status()
    assert status.state is State.OTHER_VERSION
    assert not status.is_sound
    assert "updated" in patch.patch()
    assert (folder / TARGET).read_bytes() == OVERLAY
    patch.unpatch()
    assert patch.status().state is State.STOCK


def test_a_stale_original_is_replaced(folder):
    """After pip upgraded a patched transformers: a new modeling_llama.py beside the old original."""
    (folder / KEPT).write_text("# of the version before\n")
    status = patch.status()
    assert (status.state, status.leftovers) == (State.STOCK, (KEPT,))
    assert KEPT in str(status)
    stock = (folder / TARGET).read_bytes()
    patch.patch()
    assert (folder / KEPT).read_bytes() == stock


@pytest.mark.parametrize("version", ["4.46.0", "6.0.0"])
def test_an_untested_version_is_refused(site, folder, version):
    make_version(site, version)
    before = snapshot(folder)
    with pytest.raises(PatchError, match=r"4\.57\.6 and 5\.23\.0.*--force") as refusal:
        patch.patch()
    assert version in str(refusal.value)
    assert snapshot(folder) == before
    status = patch.status()
    assert not status.tested
    assert "not tested" in str(status)
    patch.patch(force=True)
    assert "already" in patch.patch()
    patch.unpatch()
    assert snapshot(folder) == before


def test_a_foreign_file_is_refused(folder):
    foreign = (folder / TARGET).read_bytes() + b"\nPATCHED_BY = 'somebody else'\n"
    (folder / TARGET).write_bytes(foreign)
    assert patch.status().state is State.FOREIGN
    with pytest.raises(PatchError, match=r"not what pip installed.*--force"):
        patch.patch()
    with pytest.raises(PatchError, match="not patched"):
        patch.unpatch()
    assert (folder / TARGET).read_bytes() == foreign
    patch.patch(force=True)
    patch.unpatch()
    assert (folder / TARGET).read_bytes() == foreign
    assert not (folder / KEPT).exists()


def test_the_only_original_beside_a_foreign_file_is_not_removed(folder):
    patch.patch()
    (folder / TARGET).write_bytes(b"# neither\n")
    with pytest.raises(PatchError, match="not patched"):
        patch.unpatch()
    assert (folder / KEPT).exists()


def test_unpatching_what_was_never_patched(folder):
    before = snapshot(folder)
    assert re.search(r"is not patched.*nothing to take back$", patch.unpatch())
    assert snapshot(folder) == before


def test_leftovers_are_shown_and_removed(folder):
    before = snapshot(folder)
    (folder / ".mxlab-abc").write_text("half")
    (folder / KEPT).write_bytes((folder / TARGET).read_bytes())
    assert patch.status().leftovers == (".mxlab-abc", KEPT)
    assert re.search(r"nothing to take back; removed what an earlier run left: \.mxlab-abc, modular", patch.unpatch())
    assert snapshot(folder) == before
    (folder / ".mxlab-abc").write_text("half")
    assert ".mxlab-abc" in patch.patch()
    assert patch.status().leftovers == ()


@pytest.mark.parametrize("damage", ["no original", "no file", "overlay twice"])
def test_a_broken_patch_has_a_remedy(folder, damage):
    patch.patch()
    if damage == "overlay twice":
        (folder / KEPT).write_bytes(OVERLAY)
    else:
        (folder / (KEPT if damage == "no original" else TARGET)).unlink()
    status = patch.status()
    assert (status.state, status.is_sound) == (State.BROKEN, False)
    for action in (patch.patch, patch.unpatch):
        with pytest.raises(PatchError, match="pip install --force-reinstall --no-deps transformers=="):
            action()


def test_a_file_that_cannot_be_read(folder):
    (folder / TARGET).unlink()
    (folder / TARGET).mkdir()
    with pytest.raises(PatchError, match=r"cannot read .*modeling_llama\.py: Is a directory"):
        patch.status()


class Killed(BaseException):
    """Stands for the end of the process: nothing in patching catches it."""


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_killed_while_patching(site, folder, monkeypatch, name, call):
    stock = (folder / TARGET).read_bytes()
    with monkeypatch.context() as patched:
        fail_at(patched, patch.os, name, call, Killed())
        with pytest.raises(Killed):
            patch.patch()
    assert (folder / TARGET).read_bytes() == stock
    status = patch.status()
    assert status.state is State.STOCK
    assert status.leftovers == ((KEPT,) if call == 2 else ())
    if call == 2 and name == "replace":
        assert "modeling_llama" in imported(site)
    patch.patch()
    assert patch.status().state is State.PATCHED
    assert patch.status().leftovers == ()


def test_killed_for_good_leaves_a_temporary_file_only(folder, monkeypatch):
    """A kill that lets no `finally` run."""
    with monkeypatch.context() as patched:
        fail_at(patched, patch.os, "replace", 2, Killed())
        patched.setattr(Path, "unlink", lambda *args, **kwargs: None)
        with pytest.raises(Killed):
            patch.patch()
    status = patch.status()
    assert status.state is State.STOCK
    assert len(status.leftovers) == 2
    patch.patch()
    patch.unpatch()
    assert patch.status().leftovers == ()
    assert not list(folder.glob(".mxlab-*"))


def test_a_failing_unpatch_stays_patched(folder, monkeypatch):
    patch.patch()
    before = snapshot(folder)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", lambda *args: (_ for _ in ()).throw(PermissionError(errno.EACCES, "denied")))
        with pytest.raises(PatchError, match=r"cannot write in .*denied"):
            patch.unpatch()
    assert snapshot(folder) == before
    patch.unpatch()
    assert patch.status().state is State.STOCK


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_what_cannot_be_written_leaves_the_package_untouched(folder, monkeypatch, code, name, call):
    before = snapshot(folder)
    with monkeypatch.context() as patched:
        fail_at(patched, patch.os, name, call, OSError(code, os.strerror(code)))
        with pytest.raises(PatchError, match=f"cannot write in .*{os.strerror(code)}; transformers is as it was"):
            patch.patch()
    assert snapshot(folder) == before


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failing_update_keeps_the_original(folder, monkeypatch, name):
    patch.patch()
    (folder / TARGET).write_bytes(OVERLAY + b"# older\n")
    before = snapshot(folder)
    with monkeypatch.context() as patched:
        fail_at(patched, patch.os, name, 1, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(PatchError, match="No space left"):
            patch.patch()
    assert snapshot(folder) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(folder):
    folder.chmod(0o555)
    try:
        with pytest.raises(PatchError, match=r"cannot write in .*Permission denied"):
            patch.patch()
    finally:
        folder.chmod(0o755)


def test_patched_by_another_process_in_between(folder, monkeypatch):
    """The overlay is never kept in place of the original."""
    stock = (folder / TARGET).read_bytes()
    refuse = patch._refuse

    def patched_meanwhile(*args):
        refuse(*args)
        monkeypatch.setattr(patch, "_refuse", refuse)
        patch.patch()

    monkeypatch.setattr(patch, "_refuse", patched_meanwhile)
    with pytest.raises(PatchError, match="try again"):
        patch.patch()
    assert (folder / KEPT).read_bytes() == stock
    assert patch.status().state is State.PATCHED


def test_no_transformers(monkeypatch):
    monkeypatch.setattr(patch, "find_spec", lambda name: None)
    with pytest.raises(PatchError, match=r"transformers is not installed for .*pip install transformers==5\.23\.0"):
        patch.status()


def test_a_transformers_that_pip_did_not_install(site, tmp_path):
    (metadata,) = site.glob("transformers-*.dist-info")
    shutil.move(metadata, tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(PatchError, match="not installed by pip"):
        patch.status()


def test_transformers_is_not_imported(site):
    code = "import sys; from mxlab.hf import patch; patch.status(); print({'torch', 'transformers'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=llama.environment(site), capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_exit_codes_and_json(site, folder, capsys):
    assert patch.main(["--status"]) == 0
    assert ": stock (" in capsys.readouterr().out
    assert patch.main(["--unpatch"]) == 0
    assert "nothing to take back" in capsys.readouterr().out
    assert patch.main(["--patch"]) == 0
    capsys.readouterr()
    assert patch.main(["--status", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["state"] == "patched"
    assert status["location"] == str(site / "transformers")
    assert status["tested"] is True
    assert status["text"] == str(patch.status())
    (folder / TARGET).write_bytes(b"# foreign\n")
    assert patch.main(["--status"]) == 1
    assert patch.main(["--unpatch"]) == 2
    assert capsys.readouterr().err.startswith("error: transformers ")
    assert patch.main(["--patch"]) == 2
    assert patch.main(["--patch", "--force"]) == 0


@pytest.mark.parametrize("argv", [[], ["--patch", "--unpatch"], ["--pach"]])
def test_wrong_options(argv):
    with pytest.raises(SystemExit) as stop:
        patch.main(argv)
    assert stop.value.code == 2


def install(site: Path, *options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = llama.environment(site, MXLAB_PYTHON=sys.executable)
    command = ["bash", str(INSTALL), *options]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)


def test_install_sh(site, folder, tmp_path):
    before = snapshot(folder)
    assert ": stock (" in install(site, "--status", cwd=tmp_path).stdout
    done = install(site, "--unpatch", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing to take back" in done.stdout
    done = install(site, "--patch", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert ": patched (" in install(site, "--status", cwd=tmp_path).stdout
    assert json.loads(install(site, "--status", "--json", cwd=tmp_path).stdout)["state"] == "patched"
    assert install(site, "--patch", cwd=tmp_path).returncode == 0
    assert install(site, "--unpatch", cwd=tmp_path).returncode == 0
    assert snapshot(folder) == before


def test_install_sh_refuses_and_forces(site, tmp_path):
    make_version(site, "5.0.0")
    done = install(site, "--patch", cwd=tmp_path)
    assert done.returncode == 2
    assert "--force" in done.stderr
    assert install(site, "--patch", "--force", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pach"], "unknown option '--pach'"),
        (["--force"], "--patch, --unpatch or --status"),
        (["--patch", "--dev"], "--dev"),
    ],
)
def test_install_sh_wrong_options(tmp_path, options, message):
    done = install(tmp_path, *options, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


def test_install_sh_without_the_interpreter(tmp_path):
    environment = llama.environment(MXLAB_PYTHON=str(tmp_path / "no python"))
    command = ["bash", str(INSTALL), "--status"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "MXLAB_PYTHON" in done.stderr


def test_install_sh_help(tmp_path):
    done = install(tmp_path, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "--unpatch" in done.stdout
