"""Modules that documentation, notebooks and patched installations of mxlab 0.1 name, and where they are now.

``from mxlab import models``, ``mxlab.models.load`` and ``python -m mxlab.patching`` go on working.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import CodeType, ModuleType
from typing import Any

# By the old name: the module, and what is called otherwise in it.
_MOVED: dict[str, tuple[str, dict[str, str]]] = {
    "mxlab.models": ("mxlab.sources.models", {"load": "load_model"}),
    "mxlab.nn": ("mxlab.model.nn", {}),
    "mxlab.nn.residual_binary": ("mxlab.train.binary_residual", {}),
    "mxlab.notebook": ("mxlab.experiments.notebook", {}),
    "mxlab.overlay": ("mxlab.hf.patched_llama", {}),
    "mxlab.patching": ("mxlab.hf.patch", {}),
    "mxlab.quantizers": ("mxlab.formats", {"Format": "NumberFormat", "Quantizer": "FormatFamily"}),
    "mxlab.scales": ("mxlab.formats.scales", {}),
    "mxlab.sweep": ("mxlab.experiments.sweep", {"load": "load_sweep"}),
}


class _MovedLoader(Loader):
    """Makes a module that looks its names up in another one."""

    def __init__(self, name: str) -> None:
        self._target, self._renamed = _MOVED[name]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name, f"Now {self._target}.")
        module.__path__ = []  # it may have modules that moved, too
        return module

    def exec_module(self, module: ModuleType) -> None:
        target, renamed = import_module(self._target), self._renamed

        def look_up(name: str) -> Any:
            return getattr(target, renamed.get(name, name))

        module.__dict__["__getattr__"] = look_up

    def get_code(self, name: str) -> CodeType:
        """Return what ``python -m`` runs."""
        return compile(f"import runpy; runpy.run_module({self._target!r}, run_name='__main__')", name, "exec")


class _MovedFinder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return spec_from_loader(fullname, _MovedLoader(fullname)) if fullname in _MOVED else None


def install() -> None:
    """Let the old names be imported, once no file of that name was found."""
    sys.meta_path.append(_MovedFinder())
