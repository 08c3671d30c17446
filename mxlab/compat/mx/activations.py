"""Activation functions in rounded steps, under microxcaling's names and signatures.

Each takes ``mx_specs`` and computes as torch does where that is None. ``name`` is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxlab.compat.mx._operator import Gradients, Layer, Operator, aten
from mxlab.compat.mx.specs import mx_assert_test
from mxlab.compat.mx.vector_ops import Vector

Specs = Mapping[str, Any] | None

# Coefficients of GELU's approximations x · sigmoid(1.702 x) and x · sigmoid(1.5958 (x + 0.044715 x³)), and of the
# derivative of the latter's inner function, in bfloat16.
_FIRST_ORDER = 1.703125
_OUTER, _CUBIC, _SLOPE = 1.59375, 0.044677734, 0.21386719


class _Sigmoid(Operator):
    def forward(self, v: Vector, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        y = v.sigmoid(v.round(x))
        return y, (y,)

    def backward(self, v: Vector, saved: tuple[Tensor], grad: Tensor) -> Gradients:
        (y,) = saved
        return (v.mul(v.mul(y, v.sub(1, y)), v.round(grad)),)


class _Tanh(Operator):
    def forward(self, v: Vector, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        y = v.tanh(v.round(x))
        return y, (y,)

    def backward(self, v: Vector, saved: tuple[Tensor], grad: Tensor) -> Gradients:
        (y,) = saved
        return (v.mul(v.sub(1, v.mul(y, y)), v.round(grad)),)


class _ReLU(Operator):
    def forward(self, v: Vector, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        y = v.round(x.relu())
        return y, (y > 0,)

    def backward(self, v: Vector, saved: tuple[Tensor], grad: Tensor) -> Gradients:
        (inside,) = saved
        return (v.round(torch.where(inside, grad, 0)),)


class _ReLU6(_ReLU):
    def forward(self, v: Vector, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        y = v.round(aten.relu6(x))
        return y, ((y > 0) & (y < 6),)


@dataclass(frozen=True)
class _LeakyReLU(Operator):
    slope: float

    def forward(self, v: Vector, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        y = v.round(aten.leaky_relu(v.round(x), self.slope))
        return y, (y > 0,)

    def backward(self, v: Vector, saved: tuple[Tensor], grad: Tensor) -> Gradients:
        grad = v.round(grad)
        return (torch.where(saved[0], grad, v.mul(grad, self.slope)),)


class _SiLU(Operator):
    def forward(self, v: Vector, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x = v.round(x)
        sigmoid = v.sigmoid(x)
        y = v.mul(x, sigmoid)
        return y, (y, sigmoid)

    def backward(self, v: Vector, saved: tuple[Tensor, Tensor], grad: Tensor) -> Gradients:
        y, sigmoid = saved
        slope = v.add(sigmoid, v.mul(y, v.sub(1.0, sigmoid)))
        return (v.mul(slope, v.round(grad)),)


@dataclass(frozen=True)
class _GELU(Operator):
    """``x · sigmoid(z(x))``, where z is linear or, by default, cubic."""

    first_order: bool

    def forward(self, v: Vector, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        rounded = v.round(x)
        phi = v.sigmoid(self._inner(v, rounded))
        return v.mul(rounded, phi), (v.keep(x, rounded), phi)

    def backward(self, v: Vector, saved: tuple[Tensor, Tensor], grad: Tensor) -> Gradients:
        x, phi = saved
        slope = v.mul(self._inner_slope(v, x), v.mul(phi, v.sub(1, phi)))
        return (v.mul(v.add(phi, v.mul(x, slope)), v.round(grad)),)

    def _inner(self, v: Vector, x: Tensor) -> Tensor:
        if self.first_order:
            return v.mul(_FIRST_ORDER, x)
        cube = v.mul(v.mul(x, x), x)
        return v.mul(_OUTER, v.add(v.mul(_CUBIC, cube), x))

    def _inner_slope(self, v: Vector, x: Tensor) -> Tensor | float:
        return _FIRST_ORDER if self.first_order else v.add(_OUTER, v.mul(_SLOPE, v.mul(x, x)))


def _placed(output: Tensor, input: Tensor, inplace: bool) -> Tensor:
    return input.copy_(output) if inplace else output


def sigmoid(input: Tensor, mx_specs: Specs = None, name: str | None = None) -> Tensor:
    """Return 1 / (1 + e⁻ˣ)."""
    mx_assert_test(mx_specs)
    return input.sigmoid() if mx_specs is None else _Sigmoid()(mx_specs, input)


def tanh(input: Tensor, mx_specs: Specs = None, name: str | None = None) -> Tensor:
    """Return the hyperbolic tangent."""
    mx_assert_test(mx_specs)
    return input.tanh() if mx_specs is None else _Tanh()(mx_specs, input)


def relu(input: Tensor, inplace: bool = False, mx_specs: Specs = None, name: str | None = None) -> Tensor:
    """Return max(x, 0), in ``input`` itself where ``inplace``."""
    mx_assert_test(mx_specs)
    return _placed(input.relu() if mx_specs is None else _ReLU()(mx_specs, input), input, inplace)


def relu6(input: Tensor, inplace: bool = False, mx_specs: Specs = None, name: str | None = None) -> Tensor:
    """Return min(max(x, 0), 6), in ``input`` itself where ``inplace``."""
    mx_assert_test(mx_specs)
    return _placed(aten.relu6(input) if mx_specs is None else _ReLU6()(mx_specs, input), input, inplace)


def leaky_relu(
    input: Tensor,
    negative_slope: float = 0.01,
    inplace: bool = False,
    mx_specs: Specs = None,
    name: str | None = None,
) -> Tensor:
    """Return x where it is positive, else ``negative_slope`` · x; in ``input`` itself where ``inplace``."""
    mx_assert_test(mx_specs)
    output = aten.leaky_relu(input, negative_slope) if mx_specs is None else _LeakyReLU(negative_slope)(mx_specs, input)
    return _placed(output, input, inplace)


def silu(input: Tensor, inplace: bool = False, mx_specs: Specs = None, name: str | None = None) -> Tensor:
    """Return x · sigmoid(x), in ``input`` itself where ``inplace``."""
    mx_assert_test(mx_specs)
    return _placed(aten.silu(input) if mx_specs is None else _SiLU()(mx_specs, input), input, inplace)


def gelu(
    input: Tensor,
    mx_specs: Specs = None,
    first_order_gelu: bool = False,
    approximate: str | None = None,
    name: str | None = None,
) -> Tensor:
    """Return the tanh approximation of GELU, as x · sigmoid(1.5958 (x + 0.044715 x³)).

    Args:
        input: any shape.
        mx_specs: the options; None computes torch's tanh approximation.
        first_order_gelu: take x · sigmoid(1.702 x) instead, unrounded where ``mx_specs`` is None.
        approximate: not read, as in microxcaling.
        name: not read.
    """
    mx_assert_test(mx_specs)
    if mx_specs is None and not first_order_gelu:
        return aten.gelu(input, approximate="tanh")
    return _GELU(first_order_gelu)(mx_specs, input)


class Sigmoid(Layer, torch.nn.Sigmoid):
    """:func:`sigmoid` as a layer."""

    def __init__(self, mx_specs: Specs = None, name: str | None = None) -> None:
        super().__init__()
        self.configure(mx_specs, name)

    def forward(self, input: Tensor) -> Tensor:
        """Return the sigmoid, in the shape of ``input``."""
        return sigmoid(input, self.given_specs)


class Tanh(Layer, torch.nn.Tanh):
    """:func:`tanh` as a layer."""

    def __init__(self, mx_specs: Specs = None, name: str | None = None) -> None:
        super().__init__()
        self.configure(mx_specs, name)

    def forward(self, input: Tensor) -> Tensor:
        """Return the hyperbolic tangent, in the shape of ``input``."""
        return tanh(input, self.given_specs)


class ReLU(Layer, torch.nn.ReLU):
    """:func:`relu` as a layer."""

    def __init__(self, inplace: bool = False, mx_specs: Specs = None, name: str | None = None) -> None:
        super().__init__(inplace)
        self.configure(mx_specs, name)

    def forward(self, input: Tensor) -> Tensor:
        """Return max(x, 0), in the shape of ``input``."""
        return relu(input, self.inplace, self.given_specs)


class ReLU6(Layer, torch.nn.ReLU6):
    """:func:`relu6` as a layer."""

    def __init__(self, inplace: bool = False, mx_specs: Specs = None, name: str | None = None) -> None:
        super().__init__(inplace)
        self.configure(mx_specs, name)

    def forward(self, input: Tensor) -> Tensor:
        """Return min(max(x, 0), 6), in the shape of ``input``."""
        return relu6(input, self.inplace, self.given_specs)


class LeakyReLU(Layer, torch.nn.LeakyReLU):
    """:func:`leaky_relu` as a layer."""

    def __init__(
        self, negative_slope: float = 0.01, inplace: bool = False, mx_specs: Specs = None, name: str | None = None
    ) -> None:
        super().__init__(negative_slope, inplace)
        self.configure(mx_specs, name)

    def forward(self, input: Tensor) -> Tensor:
        """Return the leaky ReLU, in the shape of ``input``."""
        return leaky_relu(input, self.negative_slope, self.inplace, self.given_specs)


class SiLU(Layer, torch.nn.SiLU):
    """:func:`silu` as a layer."""

    def __init__(self, inplace: bool = False, mx_specs: Specs = None, name: str | None = None) -> None:
        super().__init__(inplace)
        self.configure(mx_specs, name)

    def forward(self, input: Tensor) -> Tensor:
        """Return x · sigmoid(x), in the shape of ``input``."""
        return silu(input, self.inplace, self.given_specs)


class GELU(Layer, torch.nn.GELU):
    """:func:`gelu` as a layer; ``approximate`` is not read, as in microxcaling."""

    def __init__(
        self,
        mx_specs: Specs = None,
        first_order_gelu: bool = False,
        approximate: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(approximate="tanh")
        self.configure(mx_specs, name)
        self.first_order_gelu = first_order_gelu

    def forward(self, input: Tensor) -> Tensor:
        """Return the GELU, in the shape of ``input``."""
        return gelu(input, self.given_specs, self.first_order_gelu)
