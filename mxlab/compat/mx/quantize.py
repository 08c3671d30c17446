"""Element-wise rounding of a tensor and of its gradient, under microxcaling's name and signature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mxlab.compat.mx._operator import Gradients, Operator
from mxlab.compat.mx.elemwise_ops import quantize_elemwise_op
from mxlab.compat.mx.specs import mx_assert_test
from mxlab.compat.mx.vector_ops import Vector
from mxlab.formats import Rounding


@dataclass(frozen=True)
class _Round(Operator):
    rounding: Rounding | None

    def forward(self, v: Vector, x: Tensor) -> tuple[Tensor, tuple[()]]:
        return quantize_elemwise_op(x, v.specs, self.rounding), ()

    def backward(self, v: Vector, saved: tuple[()], grad: Tensor) -> Gradients:
        return (quantize_elemwise_op(grad, v.specs, self.rounding),)


def quantize_bfloat(x: Tensor, mx_specs: Mapping[str, Any] | None, round: Rounding | None = None) -> Tensor:
    """Return ``x`` rounded to what ``bfloat`` or ``fp`` says, its gradient rounded too; ``x`` where no options are.

    Raises:
        FormatError: as ``quantize_elemwise_op``.
    """
    mx_assert_test(mx_specs)
    return x if mx_specs is None else _Round(round)(mx_specs, x)
