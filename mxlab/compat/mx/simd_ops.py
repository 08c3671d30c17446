"""Differentiable vector operations whose every step is rounded, under microxcaling's names and signatures.

Each takes ``mx_specs`` and computes as torch does, unrounded, where that is None. The second operand of ``simd_add``,
``simd_sub``, ``simd_mul`` and ``simd_div`` is a tensor, which broadcasts, or a number, which is not rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from mxlab.compat.mx._operator import Gradients, Operator
from mxlab.compat.mx.specs import mx_assert_test
from mxlab.compat.mx.vector_ops import Number, Vector, as_list
from mxlab.errors import SpecError

Specs = Mapping[str, Any] | None
Dims = int | Sequence[int] | None


def _reduced(v: Vector, grad: Tensor, shape: torch.Size) -> Tensor:
    """Return the gradient of an operand of this shape from that of the shape it was broadcast to."""
    if grad.shape == shape:
        return grad
    missing = grad.ndim - len(shape)
    dims = [i for i, size in enumerate(grad.shape) if i < missing or shape[i - missing] != size]
    return v.sum(v.round(grad), dims).view(shape) if dims else grad.view(shape)


class _Binary(Operator):
    """An operation on two tensors that broadcast."""

    def forward(self, v: Vector, a: Tensor, b: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        rounded_a, rounded_b = v.round(a), v.round(b)
        y = self.compute(v, rounded_a, rounded_b)
        self.shapes = a.shape, b.shape
        return y, self.needed(v.keep(a, rounded_a), v.keep(b, rounded_b), y)

    def backward(self, v: Vector, saved: tuple[Any, ...], grad: Tensor) -> Gradients:
        grads = self.differentiate(v, grad, *saved)
        return tuple(_reduced(v, g, shape) for g, shape in zip(grads, self.shapes, strict=True))

    def compute(self, v: Vector, a: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError

    def needed(self, a: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Return what :meth:`differentiate` needs of the operands and of the result."""
        return ()

    def differentiate(self, v: Vector, grad: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class _Add(_Binary):
    def compute(self, v: Vector, a: Tensor, b: Tensor) -> Tensor:
        return v.add(a, b)

    def differentiate(self, v: Vector, grad: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor]:
        grad = v.round(grad)
        return grad, grad


class _Sub(_Binary):
    def compute(self, v: Vector, a: Tensor, b: Tensor) -> Tensor:
        return v.sub(a, b)

    def differentiate(self, v: Vector, grad: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor]:
        return grad, v.round(-grad)  # the first one is not rounded, as in microxcaling


class _Mul(_Binary):
    def compute(self, v: Vector, a: Tensor, b: Tensor) -> Tensor:
        return v.mul(a, b)

    def needed(self, a: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return a, b

    def differentiate(self, v: Vector, grad: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor]:
        a, b = saved
        grad = v.round(grad)
        return v.mul(grad, b), v.mul(grad, a)


class _Div(_Binary):
    def compute(self, v: Vector, a: Tensor, b: Tensor) -> Tensor:
        return v.div(a, b)

    def needed(self, a: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return y, b

    def differentiate(self, v: Vector, grad: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor]:
        y, b = saved
        grad = v.round(grad)
        return v.div(grad, b), v.mul(grad, v.div(-y, b))


@dataclass(frozen=True)
class _WithNumber(Operator):
    """An operation on a tensor and a number."""

    compute: Callable[[Vector, Tensor], Tensor]
    differentiate: Callable[[Vector, Tensor], Tensor]

    def forward(self, v: Vector, x: Tensor) -> tuple[Tensor, tuple[()]]:
        return self.compute(v, v.round(x)), ()

    def backward(self, v: Vector, saved: tuple[()], grad: Tensor) -> Gradients:
        return (self.differentiate(v, grad),)


class _Split(Operator):
    def forward(self, v: Vector, x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[()]]:
        return (x.clone(), x.clone()), ()

    def backward(self, v: Vector, saved: tuple[()], *grads: Tensor | None) -> Gradients:
        first, second = grads
        if first is None or second is None:  # one branch was not used: there is nothing to add
            return (second if first is None else first,)
        return (v.add(v.round(first), v.round(second)),)


class _Square(Operator):
    def forward(self, v: Vector, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        rounded = v.round(x)
        return v.round(rounded**2), (v.keep(x, rounded),)

    def backward(self, v: Vector, saved: tuple[Tensor], grad: Tensor) -> Gradients:
        return (v.mul(v.round(grad), v.mul(saved[0], 2)),)


class _Sqrt(Operator):
    def forward(self, v: Vector, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        y = v.sqrt(v.round(x))
        return y, (y,)

    def backward(self, v: Vector, saved: tuple[Tensor], grad: Tensor) -> Gradients:
        return (v.div(v.mul(v.round(grad), 0.5), saved[0]),)


class _Exp(Operator):
    def forward(self, v: Vector, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        y = v.exp(v.round(x))
        return y, (y,)

    def backward(self, v: Vector, saved: tuple[Tensor], grad: Tensor) -> Gradients:
        return (v.mul(v.round(grad), saved[0]),)


class _Log(Operator):
    def forward(self, v: Vector, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        rounded = v.round(x)
        return v.round(rounded.log()), (v.keep(x, rounded),)

    def backward(self, v: Vector, saved: tuple[Tensor], grad: Tensor) -> Gradients:
        return (v.div(v.round(grad), saved[0]),)


class _Sum(Operator):
    def __init__(self, dims: Sequence[int], keepdim: bool) -> None:
        self.dims, self.keepdim = list(dims), keepdim

    def forward(self, v: Vector, x: Tensor) -> tuple[Tensor, tuple[()]]:
        self.shape = x.shape
        return v.sum(v.round(x), self.dims, self.keepdim), ()

    def backward(self, v: Vector, saved: tuple[()], grad: Tensor) -> Gradients:
        grad = v.round(grad)
        if not self.keepdim:
            for i in sorted(i % len(self.shape) for i in self.dims):
                grad = grad.unsqueeze(i)
        return (grad.expand(self.shape),)


def _check_first(name: str, in1: object) -> None:
    if not isinstance(in1, Tensor):
        raise SpecError(f"{name}: the first operand is {in1!r}: it must be a tensor; the second may be a number")


def simd_add(in1: Tensor, in2: Number, mx_specs: Specs = None) -> Tensor:
    """Return in1 + in2."""
    mx_assert_test(mx_specs)
    if mx_specs is None:
        return in1 + in2
    _check_first("simd_add", in1)
    if isinstance(in2, Tensor):
        return _Add()(mx_specs, in1, in2)
    return _WithNumber(lambda v, x: v.add(x, in2), lambda v, grad: v.round(grad))(mx_specs, in1)


def simd_sub(in1: Tensor, in2: Number, mx_specs: Specs = None) -> Tensor:
    """Return in1 - in2."""
    mx_assert_test(mx_specs)
    if mx_specs is None:
        return in1 - in2
    _check_first("simd_sub", in1)
    if isinstance(in2, Tensor):
        return _Sub()(mx_specs, in1, in2)
    return _WithNumber(lambda v, x: v.sub(x, in2), lambda v, grad: grad)(mx_specs, in1)


def simd_mul(in1: Tensor, in2: Number, mx_specs: Specs = None) -> Tensor:
    """Return in1 · in2."""
    mx_assert_test(mx_specs)
    if mx_specs is None:
        return in1 * in2
    _check_first("simd_mul", in1)
    if isinstance(in2, Tensor):
        return _Mul()(mx_specs, in1, in2)
    return _WithNumber(lambda v, x: v.mul(x, in2), lambda v, grad: v.mul(v.round(grad), in2))(mx_specs, in1)


def simd_div(in1: Tensor, in2: Number, mx_specs: Specs = None) -> Tensor:
    """Return in1 / in2."""
    mx_assert_test(mx_specs)
    if mx_specs is None:
        return in1 / in2
    _check_first("simd_div", in1)
    if isinstance(in2, Tensor):
        return _Div()(mx_specs, in1, in2)
    return _WithNumber(lambda v, x: v.div(x, in2), lambda v, grad: v.div(v.round(grad), in2))(mx_specs, in1)


def simd_split(in1: Tensor, mx_specs: Specs = None) -> tuple[Tensor, Tensor]:
    """Return ``in1`` twice, for two branches whose gradients are added in rounded steps."""
    mx_assert_test(mx_specs)
    return (in1, in1) if mx_specs is None else _Split()(mx_specs, in1)


def simd_square(in1: Tensor, mx_specs: Specs = None) -> Tensor:
    """Return in1²."""
    mx_assert_test(mx_specs)
    return in1**2 if mx_specs is None else _Square()(mx_specs, in1)


def simd_sqrt(in1: Tensor, mx_specs: Specs = None) -> Tensor:
    """Return the square root."""
    mx_assert_test(mx_specs)
    return in1.sqrt() if mx_specs is None else _Sqrt()(mx_specs, in1)


def simd_exp(in1: Tensor, mx_specs: Specs = None) -> Tensor:
    """Return e to the power of ``in1``."""
    mx_assert_test(mx_specs)
    return in1.exp() if mx_specs is None else _Exp()(mx_specs, in1)


def simd_log(in1: Tensor, mx_specs: Specs = None) -> Tensor:
    """Return the natural logarithm."""
    mx_assert_test(mx_specs)
    return in1.log() if mx_specs is None else _Log()(mx_specs, in1)


def simd_reduce_sum(in1: Tensor, dim: Dims = None, keepdim: bool = False, mx_specs: Specs = None) -> Tensor:
    """Return the sum along ``dim``; by default along all dimensions."""
    mx_assert_test(mx_specs)
    dims = list(range(in1.ndim)) if dim is None else as_list(dim)
    return in1.sum(dims, keepdim=keepdim) if mx_specs is None else _Sum(dims, keepdim)(mx_specs, in1)


def simd_reduce_mean(in1: Tensor, dim: Dims = None, keepdim: bool = False, mx_specs: Specs = None) -> Tensor:
    """Return the mean along ``dim``, by default along all dimensions: the sum times one over the number of terms."""
    mx_assert_test(mx_specs)
    dims = list(range(in1.ndim)) if dim is None else as_list(dim)
    if mx_specs is None:
        return in1.mean(dims, keepdim=keepdim)
    total = _Sum(dims, keepdim)(mx_specs, in1)
    return simd_mul(total, 1 / prod(in1.shape[i] for i in dims), mx_specs)


def simd_norm(in1: Tensor, keepdim: bool = False, mx_specs: Specs = None) -> Tensor:
    """Return the Frobenius norm: the square root of the sum of all squares."""
    mx_assert_test(mx_specs)
    if mx_specs is None:
        return torch.linalg.norm(in1, keepdim=keepdim)
    squares = _Sum(range(in1.ndim), keepdim)(mx_specs, simd_square(in1, mx_specs))
    return simd_sqrt(squares, mx_specs)
