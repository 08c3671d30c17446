"""Where the tests find what they read."""

import importlib.util
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
SHARED = ROOT.parent / "shared"


def load_tool(name: str) -> ModuleType:
    """The program ``tools/<name>.py`` as a module."""
    spec = importlib.util.spec_from_file_location(name.rpartition("/")[2], ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
