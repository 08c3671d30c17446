"""``import mx`` finds :mod:`mxlab.compat.mx`, as long as that is wanted; torch is not touched."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from mxlab.compat import missing
from mxlab.errors import CompatError

ALIAS = "mx"
TARGET = "mxlab.compat.mx"


def enable() -> None:
    """Let ``import mx`` and ``from mx.specs import ...`` find :mod:`mxlab.compat.mx`, before any installed ``mx``.

    Calling it again changes nothing. Nothing is imported yet.

    Raises:
        CompatError: another package ``mx`` is imported already.
    """
    other = sys.modules.get(ALIAS)
    if other is not None and not _is_ours(other):
        raise CompatError(
            f"another package mx is imported already, from {_place(other)}: call mxlab.compat.enable() before that "
            "import, or do without it",
            name=ALIAS,
        )
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def disable() -> None:
    """Take :func:`enable` back: the next ``import mx`` finds what is installed. What was imported goes on working."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    for name in [name for name, module in sys.modules.items() if _is_alias(name) and _is_ours(module)]:
        del sys.modules[name]


class _Finder(MetaPathFinder):
    """Finds ``mx``, and says of the parts of microxcaling that are not here what to use instead."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == ALIAS:
            origin = Path(__file__).parent / "mx" / "__init__.py"
            return ModuleSpec(ALIAS, _Loader(), origin=str(origin), is_package=True)
        parent, _, name = fullname.rpartition(".")
        if parent == ALIAS:
            missing.check(name)
        return None


class _Loader(Loader):
    """Gives the module itself and its submodules a second name: no code runs twice, and classes are the same."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(TARGET)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has put the alias's in its place
        for name in [name for name in sys.modules if name.startswith(f"{TARGET}.")]:
            sys.modules[f"{ALIAS}{name.removeprefix(TARGET)}"] = sys.modules[name]


_finder = _Finder()


def _is_alias(name: str) -> bool:
    return name.partition(".")[0] == ALIAS


def _is_ours(module: ModuleType | None) -> bool:
    return f"{getattr(module, '__name__', '')}.".startswith(f"{TARGET}.")


def _place(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or ", ".join(map(str, getattr(module, "__path__", ["nowhere"])))
