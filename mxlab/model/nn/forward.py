"""Run a module's forward inside code of our own, whatever the module is."""

from __future__ import annotations

import copy
from typing import Any, Protocol

from torch import nn


class Computer(Protocol):
    """Computes a module's output, given its forward."""

    def compute(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output."""

    def replicated(self, module: nn.Module) -> Computer:
        """Return what computes a replica of the module on another device."""
        ...


class ForwardOverride:
    """Stands in for a module's forward and hands it, with its arguments, to a computer.

    A hook before the call and one after it would not do for a context: after an interrupt no hook is called, and the
    context would stay entered. Copies and pickles of the module keep the override.
    """

    def __init__(self, module: nn.Module, computer: Computer) -> None:
        self.computer = computer
        self._module = module
        self._replaced: Any = None  # the forward that other code had put in place

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the module's output."""
        return self.computer.compute(self._forward, *args, **kwargs)

    def install(self) -> None:
        """Take the place of the module's forward, behind accelerate's hook if there is one."""
        own = vars(self._module)
        name = "_old_forward" if "_old_forward" in own else "forward"
        if name in own and getattr(own[name], "__func__", None) is not type(self._module).forward:
            self._replaced = own[name]
        setattr(self._module, name, self)
        vars(self._module)["_replicate_for_data_parallel"] = self.replicate

    def replicate(self) -> nn.Module:
        """Return a replica of the module, as torch's DataParallel asks for it, that computes with its own weights."""
        replica = type(self._module)._replicate_for_data_parallel(self._module)
        override = copy.copy(self)
        override._module, override.computer = replica, self.computer.replicated(replica)
        for name, value in vars(replica).items():
            if value is self:
                vars(replica)[name] = override
        return replica

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._replaced is not None:
            return self._replaced(*args, **kwargs)
        return type(self._module).forward(self._module, *args, **kwargs)


def override_of(module: nn.Module) -> Any:
    """Return the computer that a module's forward is handed to; None where there is none."""
    found = (vars(module).get(name) for name in ("forward", "_old_forward"))
    return next((f.computer for f in found if isinstance(f, ForwardOverride)), None)
