"""Register mxlab as a quantization method once transformers' registry is there. No transformers, no torch."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_REGISTRY = "transformers.quantizers.auto"


def install() -> None:
    """Register now, where transformers was imported before mxlab, or else as soon as it is."""
    if _REGISTRY in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _RegistryFinder())


def _register() -> None:
    import_module("mxlab.hf.quantizer")  # which registers, also where it is what imports transformers


class _RegistryFinder(MetaPathFinder):
    """Finds the registry as Python does, and registers when it has run."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != _REGISTRY or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_and_register  # pyright: ignore[reportAttributeAccessIssue]
        return spec
