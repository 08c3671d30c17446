"""The one way in which operators have a gradient, and layers their options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mxlab.compat.mx.specs import MxSpecs, apply_mx_specs, get_backwards_mx_specs, mx_assert_test
from mxlab.compat.mx.vector_ops import Vector

Gradients = tuple[Tensor | None, ...]

# torch's own operators, also while mx_mapping has put ours in their place.
aten = torch.ops.aten


class Operator(ABC):
    """An operator in rounded steps, forward and backward; what is not a tensor are its fields."""

    @abstractmethod
    def forward(self, v: Vector, *inputs: Any) -> tuple[Any, tuple[Tensor | None, ...]]:
        """Return the output (a tensor, or several), and the tensors that :meth:`backward` needs."""

    @abstractmethod
    def backward(self, v: Vector, saved: tuple[Any, ...], *grads: Any) -> Gradients:
        """Return the gradient of each input from those of the outputs."""

    def __call__(self, mx_specs: Mapping[str, Any] | None, *inputs: Any) -> Any:
        """Apply the operator to ``inputs``, tensors or None, under these options over microxcaling's defaults."""
        return _Apply.apply(self, apply_mx_specs(mx_specs), *inputs)


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Operator, specs: MxSpecs, *inputs: Any) -> Any:
        output, saved = operator.forward(Vector(specs), *inputs)
        ctx.operator, ctx.specs = operator, get_backwards_mx_specs(specs)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        found = ctx.operator.backward(Vector(ctx.specs), ctx.saved_tensors, *grads)
        wanted = ctx.needs_input_grad[2:]
        return (None, None, *(grad if wants else None for grad, wants in zip(found, wanted, strict=True)))


class Layer:
    """What microxcaling's layers share: options that may be replaced, and a name."""

    def configure(self, mx_specs: Mapping[str, Any] | None, name: str | None) -> None:
        """Take the options and the name that the layer was made with."""
        self.name = name
        self.apply_mx_specs(mx_specs)

    def apply_mx_specs(self, mx_specs: Mapping[str, Any] | None) -> None:
        """Compute with these options from now on; with None as torch does."""
        mx_assert_test(mx_specs)
        self.mx_none = mx_specs is None
        self.mx_specs = apply_mx_specs(mx_specs)

    def append_name(self, postfix: str) -> None:
        """Add ``postfix`` to the layer's name."""
        self.name = f"{self.name or ''}{postfix}"

    @property
    def given_specs(self) -> MxSpecs | None:
        """The options, None where none were given."""
        return None if self.mx_none else self.mx_specs
