"""One module reads the environment."""

import re
from pathlib import Path

from mxlab import environment

from support.paths import ROOT


def test_no_other_module_touches_it():
    touching = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mxlab").rglob("*.py")
        if re.search(r"os\.(environ|getenv|putenv)", path.read_text(encoding="utf-8"))
    ]
    assert touching == ["mxlab/environment.py"]


def test_a_variable_is_hidden_and_comes_back(monkeypatch):
    monkeypatch.setenv("MX_SPECS_JSON", "{}")
    with environment.hidden(environment.MX_SPECS):
        assert environment.MX_SPECS not in environment.variables()
    assert environment.variables()[environment.MX_SPECS] == "{}"
    monkeypatch.delenv("MX_SPECS_JSON")
    with environment.hidden(environment.MX_SPECS):
        pass
    assert environment.MX_SPECS not in environment.variables()


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MXLAB_CACHE", str(tmp_path))
    assert environment.cache_folder() == tmp_path
    monkeypatch.delenv("MXLAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environment.cache_folder() == tmp_path / "mxlab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert environment.cache_folder() == Path.home() / ".cache" / "mxlab"
