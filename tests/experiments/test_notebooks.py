"""The notebooks run from top to bottom on the embedded model, and are committed without outputs."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from support.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of the four notebooks, which share their results."""
    results = tmp_path_factory.mktemp("notebooks") / "results"
    return {"MXLAB_MODEL": "smollm2", "MXLAB_LIMIT": "2", "MXLAB_RESULTS": str(results), "HF_HUB_OFFLINE": "1"}


def test_there_are_four_of_them() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


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
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    results = Path(os.environ["MXLAB_RESULTS"])
    expected = {"01": 1, "02": 13, "03": 25, "04": 25}[path.stem[:2]]
    assert len(list(results.glob("*/*/run.json"))) == expected
    if path.stem == "04_report":
        assert len(list((results.parent / "report").rglob("*_vs_blocksize.png"))) == 4
