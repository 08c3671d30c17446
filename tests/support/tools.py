"""The programs of tools/docs, as modules."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from support.paths import ROOT

TOOLS = ROOT / "tools" / "docs"


@contextmanager
def docs_tool(name: str) -> Iterator[ModuleType]:
    """Import a program of tools/docs, and forget it and those beside it afterwards."""
    sys.path.insert(0, str(TOOLS))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(TOOLS))
        for file in TOOLS.glob("*.py"):
            sys.modules.pop(file.stem, None)
