"""Compute a model while microxcaling's operators stand in for torch's, as its ``inject_pyt_ops`` has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from mxlab.compat.mx.mx_mapping import injected
from mxlab.compat.mx.specs import finalize_mx_specs
from mxlab.model.nn.forward import ForwardOverride


class Injection:
    """Computes a module's output with the operators injected; ``calls`` counts what they were called for, by name.

    ``inject_pyt_ops`` is meant to be called before a model is built. For a model that is there it comes to the same
    while it computes: torch's layers call the functions that are replaced.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._specs = finalize_mx_specs(dict(options))
        self.calls: Counter[str] = Counter()

    def compute(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output."""
        with injected(self._specs, self.calls):
            return forward(*args, **kwargs)

    def replicated(self, module: nn.Module) -> Injection:
        """Return what computes a replica of the module on another device: this, which holds no weights."""
        return self

    def install(self, model: nn.Module) -> None:
        """Compute ``model`` so from now on."""
        ForwardOverride(model, self).install()
