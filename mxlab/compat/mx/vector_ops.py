"""Arithmetic whose every result is rounded element-wise, under microxcaling's names and signatures; no gradients.

The operators that have one are made of it: :mod:`mxlab.compat.mx.simd_ops`, activations, softmax, normalizations,
pooling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from mxlab.compat.mx.elemwise_ops import quantize_elemwise_op
from mxlab.formats import Rounding

LOG2_E = 1.4453125  # log2(e) in bfloat16

Number = Tensor | float


class Vector:
    """Vector arithmetic under the options of one pass.

    Args:
        specs: the options, which say the format (``bfloat`` or ``fp``) and how division and exponentials are computed;
            None rounds nothing.
        round: the rounding; None takes the option ``round``.
    """

    def __init__(self, specs: Mapping[str, Any] | None, round: Rounding | None = None) -> None:
        self.specs = specs
        self._rounding: Rounding | None = round

    def round(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded."""
        return quantize_elemwise_op(x, self.specs, self._rounding)

    def keep(self, raw: Tensor, rounded: Tensor) -> Tensor:
        """Return what the backward pass is to see of an operand: unrounded where that pass does not quantize."""
        return rounded if self._is("quantize_backprop") else raw

    def add(self, a: Number, b: Number) -> Tensor:
        """Return a + b."""
        return self.round(a + b)  # pyright: ignore[reportArgumentType]: one of the two is a tensor, here and below

    def sub(self, a: Number, b: Number) -> Tensor:
        """Return a - b."""
        return self.round(a - b)  # pyright: ignore[reportArgumentType]

    def mul(self, a: Number, b: Number) -> Tensor:
        """Return a · b."""
        return self.round(a * b)  # pyright: ignore[reportArgumentType]

    def div(self, a: Number, b: Number) -> Tensor:
        """Return a / b; with ``vec_use_recip`` a · (1 / b)."""
        if self._is("vec_use_recip"):
            return self.mul(a, self.recip(b))
        return self.round(a / b)  # pyright: ignore[reportArgumentType]

    def recip(self, x: Number) -> Tensor:
        """Return 1 / x."""
        return self.round(1.0 / (x if isinstance(x, Tensor) else torch.tensor(float(x))))

    def exp(self, x: Tensor) -> Tensor:
        """Return eˣ; with ``vec_use_exp2`` 2 to the power of log2(e) · x."""
        return self.exp2(self.mul(LOG2_E, x)) if self._is("vec_use_exp2") else self.round(x.exp())

    def exp2(self, x: Tensor) -> Tensor:
        """Return 2ˣ."""
        return self.round(x.exp2())

    def sqrt(self, x: Tensor) -> Tensor:
        """Return the square root."""
        return self.round(x.sqrt())

    def tanh(self, x: Tensor) -> Tensor:
        """Return the hyperbolic tangent."""
        return self.round(x.tanh())

    def sigmoid(self, x: Tensor) -> Tensor:
        """Return 1 / (1 + e⁻ˣ)."""
        return self.recip(self.add(self.exp(-x), 1.0))

    def sum(self, x: Tensor, dim: int | Sequence[int], keepdim: bool = False) -> Tensor:
        """Return the sum along ``dim``, which torch computes unrounded; of no dimension the rounded ``x``."""
        dims = as_list(dim)
        return self.round(x.sum(dims, keepdim=keepdim) if dims else x)

    def mean(self, x: Tensor, dim: int | Sequence[int], keepdim: bool = False) -> Tensor:
        """Return the rounded sum along ``dim``, divided by the number of its terms."""
        return self.div(self.sum(x, dim, keepdim), prod(x.shape[i] for i in as_list(dim)))

    def _is(self, option: str) -> bool:
        return bool(self.specs and self.specs[option])


def as_list(dim: int | Sequence[int]) -> list[int]:
    """Return one or several dimensions as a list."""
    return [dim] if isinstance(dim, int) else list(dim)


def vec_quantize(input: Tensor, mx_specs: Mapping[str, Any] | None = None, round: Rounding | None = None) -> Tensor:
    """Return ``input`` rounded."""
    return Vector(mx_specs, round).round(input)


def vec_add(a: Number, b: Number, mx_specs: Mapping[str, Any] | None = None, round: Rounding | None = None) -> Tensor:
    """Return a + b, rounded."""
    return Vector(mx_specs, round).add(a, b)


def vec_sub(a: Number, b: Number, mx_specs: Mapping[str, Any] | None = None, round: Rounding | None = None) -> Tensor:
    """Return a - b, rounded."""
    return Vector(mx_specs, round).sub(a, b)


def vec_mul(a: Number, b: Number, mx_specs: Mapping[str, Any] | None = None, round: Rounding | None = None) -> Tensor:
    """Return a · b, rounded."""
    return Vector(mx_specs, round).mul(a, b)


def vec_div(a: Number, b: Number, mx_specs: Mapping[str, Any] | None = None, round: Rounding | None = None) -> Tensor:
    """Return a / b, rounded; with ``vec_use_recip`` the rounded reciprocal is multiplied."""
    return Vector(mx_specs, round).div(a, b)


def vec_exp(input: Tensor, mx_specs: Mapping[str, Any] | None = None, round: Rounding | None = None) -> Tensor:
    """Return e to the power of ``input``, rounded; with ``vec_use_exp2`` by way of a power of 2."""
    return Vector(mx_specs, round).exp(input)


def vec_exp2(input: Tensor, mx_specs: Mapping[str, Any] | None = None, round: Rounding | None = None) -> Tensor:
    """Return 2 to the power of ``input``, rounded."""
    return Vector(mx_specs, round).exp2(input)


def vec_recip(input: Tensor, mx_specs: Mapping[str, Any] | None = None, round: Rounding | None = None) -> Tensor:
    """Return 1 / input, rounded."""
    return Vector(mx_specs, round).recip(input)


def vec_sqrt(input: Tensor, mx_specs: Mapping[str, Any] | None = None, round: Rounding | None = None) -> Tensor:
    """Return the square root, rounded."""
    return Vector(mx_specs, round).sqrt(input)


def vec_tanh(input: Tensor, mx_specs: Mapping[str, Any] | None = None, round: Rounding | None = None) -> Tensor:
    """Return the hyperbolic tangent, rounded."""
    return Vector(mx_specs, round).tanh(input)


def vec_reduce_sum(
    input: Tensor,
    dim: int | Sequence[int],
    keepdim: bool = False,
    mx_specs: Mapping[str, Any] | None = None,
    round: Rounding | None = None,
) -> Tensor:
    """Return the sum along ``dim``, rounded."""
    return Vector(mx_specs, round).sum(input, dim, keepdim)


def vec_reduce_mean(
    input: Tensor,
    dim: int | Sequence[int],
    keepdim: bool = False,
    mx_specs: Mapping[str, Any] | None = None,
    round: Rounding | None = None,
) -> Tensor:
    """Return the mean along ``dim``: the sum, rounded, divided and rounded again."""
    return Vector(mx_specs, round).mean(input, dim, keepdim)
