"""Batch normalization in rounded steps, under microxcaling's names and signatures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxlab.compat.mx._operator import Layer, aten
from mxlab.compat.mx.norm_utils import Norm, normalize, normalize_backward
from mxlab.compat.mx.specs import mx_assert_test
from mxlab.compat.mx.vector_ops import Vector
from mxlab.errors import SpecError


@dataclass(frozen=True, eq=False)
class _BatchNorm(Norm):
    """Normalizes over all dimensions but the channels; the running statistics are changed in place."""

    running_mean: Tensor | None
    running_var: Tensor | None
    is_training: bool
    momentum: float
    eps: float
    channel_axis = 1

    def normalized(self, v: Vector, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        statistics = None
        if not self.is_training:
            mean, variance = (
                self._along_channels(v.round(running), x)
                for running in (self.running_mean, self.running_var)
                if running is not None
            )
            statistics = mean, variance
        found = normalize(v, x, self._others(x), self.eps, statistics)
        if self.is_training:
            self._update(v, self.running_mean, found.mean)
            self._update(v, self.running_var, found.variance)  # with eps, and biased, as in microxcaling
        return found.norm, (found.shift, found.std_inverse)

    def input_gradient(self, v: Vector, grad: Tensor, norm: Tensor, *saved: Tensor) -> Tensor:
        # Through the statistics even where they were the running ones, as in microxcaling.
        return normalize_backward(v, grad, self._others(grad), *saved)

    def _update(self, v: Vector, running: Tensor | None, found: Tensor) -> None:
        if running is not None:
            kept, added = v.mul(1 - self.momentum, running), v.mul(self.momentum, found.view(-1))
            running.copy_(v.add(kept, added))

    def _others(self, x: Tensor) -> list[int]:
        return [0, *range(2, x.ndim)]


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    is_training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    mx_specs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Normalize each channel over the batch; torch's own where ``mx_specs`` is None.

    Args:
        x: (N, C, ...).
        running_mean: (C,), or None; changed in place in training.
        running_var: (C,), or None; as ``running_mean``.
        weight: (C,), or None.
        bias: (C,), or None.
        is_training: whether the statistics are those of the batch, or the running ones.
        momentum: the share of the batch in the running statistics.
        eps: what is added to the variance.
        mx_specs: the options.

    Returns:
        (N, C, ...).

    Raises:
        FormatError: as ``quantize_elemwise_op``.
        SpecError: no running statistics outside of training, or an unknown option.
    """
    mx_assert_test(mx_specs)
    if mx_specs is None:
        return aten.batch_norm(x, weight, bias, running_mean, running_var, is_training, momentum, eps, True)
    if not is_training and (running_mean is None or running_var is None):
        raise SpecError("batch_norm: without is_training it needs running_mean and running_var")
    return _BatchNorm(running_mean, running_var, is_training, momentum, eps)(mx_specs, x, weight, bias)


class _Layer(Layer, torch.nn.modules.batchnorm._BatchNorm):
    ndims: tuple[int, ...]

    def __init__(
        self,
        num_features: int,
        mx_specs: Mapping[str, Any] | None = None,
        name: str | None = None,
        **more: Any,
    ) -> None:
        super().__init__(num_features, **more)
        self.configure(mx_specs, name)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim not in self.ndims:
            raise ValueError(f"expected {' or '.join(f'{n}D' for n in self.ndims)} input (got {input.ndim}D input)")

    def forward(self, input: Tensor) -> Tensor:
        """Return (N, C, ...) of (N, C, ...)."""
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            if self.momentum is None:  # a cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        is_tracked = not self.training or self.track_running_stats
        return batch_norm(
            input,
            self.running_mean if is_tracked else None,
            self.running_var if is_tracked else None,
            self.weight,
            self.bias,
            is_training=self.training or (self.running_mean is None and self.running_var is None),
            momentum=momentum,
            eps=self.eps,
            mx_specs=self.given_specs,
        )


class BatchNorm1d(_Layer):
    """:func:`batch_norm` of (N, C) or (N, C, L); ``more`` goes to torch's layer of that name."""

    ndims = (2, 3)


class BatchNorm2d(_Layer):
    """:func:`batch_norm` of (N, C, H, W)."""

    ndims = (4,)


class BatchNorm3d(_Layer):
    """:func:`batch_norm` of (N, C, D, H, W)."""

    ndims = (5,)
