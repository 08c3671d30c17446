"""Softmax in rounded steps, under microxcaling's names and signatures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxlab.compat.mx._operator import Gradients, Layer, Operator
from mxlab.compat.mx.specs import mx_assert_test
from mxlab.compat.mx.vector_ops import Vector
from mxlab.errors import SpecError

LN_2 = 0.69140625  # ln(2) in bfloat16


@dataclass(frozen=True)
class _Softmax(Operator):
    """``b**(x - max)`` over its sum, for b of e, or with ``softmax_exp2`` of 2."""

    dim: int

    def forward(self, v: Vector, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        x = v.round(x)
        shifted = v.sub(x, x.amax(self.dim, keepdim=True))
        power = v.exp2(shifted) if _is_base_2(v) else v.exp(shifted)
        y = v.div(power, v.sum(power, self.dim, keepdim=True))
        return y, (y,)

    def backward(self, v: Vector, saved: tuple[Tensor], grad: Tensor) -> Gradients:
        (y,) = saved
        grad = v.round(grad)
        along = v.sum(v.mul(grad, y), self.dim, keepdim=True)
        grad = v.mul(y, v.sub(grad, along))
        return (v.mul(grad, LN_2) if _is_base_2(v) else grad,)


def _is_base_2(v: Vector) -> bool:
    return v.specs is not None and v.specs["softmax_exp2"]


def softmax(
    input: Tensor, dim: int | None = -1, mx_specs: Mapping[str, Any] | None = None, name: str | None = None
) -> Tensor:
    """Return the softmax along ``dim``; torch's own where ``mx_specs`` is None.

    Args:
        input: any shape.
        dim: the dimension that is summed to one.
        mx_specs: the options.
        name: not read.

    Raises:
        FormatError: as ``quantize_elemwise_op``.
        SpecError: no ``dim``, or an unknown option.
    """
    mx_assert_test(mx_specs)
    if dim is None:
        raise SpecError("softmax: dim is None: name the dimension, such as dim=-1")
    return input.softmax(dim) if mx_specs is None else _Softmax(dim)(mx_specs, input)


class Softmax(Layer, torch.nn.Softmax):
    """:func:`softmax` as a layer."""

    def __init__(
        self, dim: int | None = None, mx_specs: Mapping[str, Any] | None = None, name: str | None = None
    ) -> None:
        super().__init__(dim)
        self.configure(mx_specs, name)

    def forward(self, input: Tensor) -> Tensor:
        """Return the softmax, in the shape of ``input``."""
        return softmax(input, self.dim, self.given_specs)
