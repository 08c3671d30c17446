"""What layer, RMS, batch and group normalization share: rounded steps, forward and backward."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mxlab.compat.mx._operator import Gradients, Operator
from mxlab.compat.mx.vector_ops import Vector


class Normalized(NamedTuple):
    """The steps from ``x`` to ``norm = (x - mean) / sqrt(variance)``; ``eps`` is in the variance."""

    shift: Tensor
    norm: Tensor
    std_inverse: Tensor
    mean: Tensor
    variance: Tensor


def normalize(
    v: Vector, x: Tensor, dims: Sequence[int], eps: float, statistics: tuple[Tensor, Tensor] | None = None
) -> Normalized:
    """Normalize ``x`` (rounded) over ``dims``, with its own mean and variance or with those given."""
    if statistics is None:
        mean = v.mean(x, dims, keepdim=True)
        shift = v.sub(x, mean)
        variance = v.mean(v.mul(shift, shift), dims, keepdim=True)
    else:
        mean, variance = statistics
        shift = v.sub(x, mean)
    variance = v.add(variance, eps)
    std_inverse = v.recip(v.sqrt(variance))
    return Normalized(shift, v.mul(shift, std_inverse), std_inverse, mean, variance)


def normalize_backward(v: Vector, grad: Tensor, dims: Sequence[int], shift: Tensor, std_inverse: Tensor) -> Tensor:
    """Return the gradient of ``x`` from that of the normalized values.

    With g the gradient, s the standard deviation and d the shift it is g/s - mean(g/s) - d · mean(g · d) / s³.
    """
    direct = v.mul(grad, std_inverse)
    through_mean = v.mean(-direct, dims, keepdim=True)
    through_std = v.mean(v.mul(grad, shift), dims, keepdim=True)
    through_std = v.mul(v.mul(through_std, v.mul(std_inverse, std_inverse)), std_inverse)
    return v.add(v.add(direct, v.mul(-through_std, shift)), through_mean)


class Norm(Operator):
    """A normalization, and the weight and bias of its channels, which lie along the axis ``channel_axis``.

    Inputs are ``x``, the weight (C,) or None, and the bias (C,) or None.
    """

    channel_axis: int

    @abstractmethod
    def normalized(self, v: Vector, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return ``x`` (rounded) normalized, and what else :meth:`input_gradient` needs."""

    @abstractmethod
    def input_gradient(self, v: Vector, grad: Tensor, norm: Tensor, *saved: Tensor) -> Tensor:
        """Return the gradient of ``x`` from that of the normalized values ``norm``."""

    def forward(
        self, v: Vector, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Return ``weight * norm + bias``, and what :meth:`backward` needs."""
        norm, saved = self.normalized(v, v.round(x))
        y, kept = norm, None
        if weight is not None:
            rounded = v.round(weight)
            kept = v.keep(weight, rounded)
            y = v.mul(self._along_channels(rounded, norm), norm)
        if bias is not None:
            y = v.add(y, self._along_channels(v.round(bias), norm))
        return y, (kept, norm, *saved)

    def backward(self, v: Vector, saved: tuple[Tensor, ...], grad: Tensor) -> Gradients:
        """Return the gradients of ``x``, weight and bias."""
        weight, norm, *rest = saved
        grad = v.round(grad)
        others = [i for i in range(grad.ndim) if i != self.channel_axis % grad.ndim]
        grad_bias = v.sum(grad, others)
        grad_weight = None if weight is None else v.sum(v.mul(grad, norm), others)
        if weight is not None:
            grad = v.mul(grad, self._along_channels(weight, grad))
        return self.input_gradient(v, grad, norm, *rest), grad_weight, grad_bias

    def _along_channels(self, parameter: Tensor, x: Tensor) -> Tensor:
        shape = [1] * x.ndim
        shape[self.channel_axis] = -1
        return parameter.view(shape)
