"""The notebooks run from top to bottom on the embedded model, and are committed without outputs."""

import os
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient

from mxlab import environment
from mxlab.experiments import notebook as shared
from mxlab.progress import Steps, shown_by

from support.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of the notebooks, which share their results."""
    results = tmp_path_factory.mktemp("notebooks") / "results"
    return {"MXLAB_MODEL": "smollm2", "MXLAB_LIMIT": "2", "MXLAB_RESULTS": str(results), "HF_HUB_OFFLINE": "1"}


def test_there_are_five_of_them() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_in_order(path: Path, session: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in session.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MXLAB_DATA_DIR", raising=False)
    notebook = nbformat.read(path, as_version=4)
    done = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    assert sum(len(output.get("text", "").splitlines()) for output in outputs) < 30  # no log
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"image/png", "text/html"} <= kinds  # a figure and a table
    results = Path(os.environ["MXLAB_RESULTS"])
    if (expected := {"01": 1, "02": 13, "03": 25, "04": 25}.get(path.stem[:2])) is not None:
        assert len(list(results.glob("*/*/run.json"))) == expected
    else:
        steps = pd.read_csv(results / "ptq_steps.csv", index_col=0)
        assert len(steps) == 4
        assert np.isfinite(steps["perplexity"]).all()
    if path.stem == "04_report":
        assert len(list((results.parent / "report").rglob("*_vs_blocksize.png"))) == 4


# ---- Colab: opened from GitHub in a bare folder, nothing installed, the kernel runs already


INSTALL = """#!/usr/bin/env bash
# Puts an editable package into a folder that the running kernel has read already, as pip does.
set -e
echo "$@" > "$SITE/arguments"
cp "$(dirname "${BASH_SOURCE[0]}")/finder.py" "$SITE/_editable_mxlab.py"
echo "import _editable_mxlab" > "$SITE/mxlab.pth"
"""
FINDER = """
import importlib.machinery, importlib.util, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "mxlab":
            return importlib.util.spec_from_loader(name, importlib.machinery.SourceFileLoader(name, {file!r}))
sys.meta_path.insert(0, Finder())
"""


def first_cell(path: Path) -> str:
    return next(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository whose install.sh installs a package of our name, editable, as ours does."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "package.py").write_text("answer = 42\n")
    (folder / "install.sh").write_text(INSTALL)
    (folder / "finder.py").write_text(FINDER.format(file=str(folder / "package.py")))
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    return folder


def run_first_cell(path: Path, where: Path, repository: str) -> subprocess.CompletedProcess[str]:
    """Run the cell in a Python that has no mxlab, in the folder ``where``."""
    site = where / "site-packages"
    site.mkdir()
    code = (
        "import site, sys\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in type(finder).__module__]\n"
        "from pathlib import Path\n"
        "others = (p for p in sys.path if 'site-packages' not in p and not Path(p, 'mxlab').exists())\n"
        f"sys.path = [{str(site)!r}, *others]\n"
        f"site.getsitepackages = lambda: [{str(site)!r}]\n"
        + first_cell(path).replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}")
        + "\nimport mxlab\nprint(mxlab.answer)\n"
    )
    variables = {**os.environ, "SITE": str(site), "COLAB_RELEASE_TAG": "release"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=where, env=variables, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_ends_in_a_kernel_that_has_mxlab(path: Path, repository: Path, tmp_path: Path) -> None:
    bare = tmp_path / "content"
    bare.mkdir()
    done = run_first_cell(path, bare, str(repository))
    assert done.stdout.splitlines()[-1:] == ["42"], done.stderr
    assert (bare / "site-packages" / "arguments").read_text().strip() == "--system"
    assert (bare / "mxlab" / "install.sh").is_file()


def test_the_first_cell_asks_for_the_repository(tmp_path: Path) -> None:
    done = run_first_cell(NOTEBOOKS[0], tmp_path, "")
    assert "write the address of its repository into REPOSITORY" in done.stderr


def test_a_secret_of_colab_is_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"HF_TOKEN": "secret"}
    colab = types.ModuleType("google.colab")
    monkeypatch.setattr(colab, "userdata", types.SimpleNamespace(get=secrets.__getitem__), raising=False)
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("HF_TOKEN", "own")
    shared.prepare()
    assert os.environ["HF_TOKEN"] == "own"
    monkeypatch.delenv("HF_TOKEN")
    shared.prepare()
    assert environment.has_hub_token()
    assert os.environ["HF_TOKEN"] == "secret"
    monkeypatch.delenv("HF_TOKEN")
    secrets.clear()
    shared.prepare()
    assert not environment.has_hub_token()


def test_progress_is_one_line() -> None:
    lines: list[str] = []
    with shown_by(shared._OneLine(lines.append)), Steps("sweep", 2) as outer:
        outer.advance()
    assert len(lines) == 1
    assert lines[0].startswith("sweep: 0 of 2")
