"""Group normalization in rounded steps, under microxcaling's names and signatures."""

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


@dataclass(frozen=True)
class _GroupNorm(Norm):
    groups: int
    eps: float
    channel_axis = 1

    def normalized(self, v: Vector, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        grouped = self._grouped(x)
        found = normalize(v, grouped, range(2, grouped.ndim), self.eps)
        return found.norm.view(x.shape), (found.shift, found.std_inverse)

    def input_gradient(self, v: Vector, grad: Tensor, norm: Tensor, *saved: Tensor) -> Tensor:
        grouped = self._grouped(grad)
        return normalize_backward(v, grouped, range(2, grouped.ndim), *saved).view(grad.shape)

    def _grouped(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.groups, x.shape[1] // self.groups))  # (N, C, ...) -> (N, G, C/G, ...)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    mx_specs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Normalize each group of channels; torch's own where ``mx_specs`` is None.

    Args:
        x: (N, C, ...).
        num_groups: how many groups the C channels are split into.
        weight: (C,), or None.
        bias: (C,), or None.
        eps: what is added to the variance.
        mx_specs: the options.

    Returns:
        (N, C, ...).

    Raises:
        FormatError: as ``quantize_elemwise_op``.
        SpecError: channels that do not divide into groups, or an unknown option.
    """
    mx_assert_test(mx_specs)
    if mx_specs is None:
        return aten.group_norm(x, num_groups, weight, bias, eps)
    if x.shape[1] % num_groups:
        raise SpecError(f"group_norm: {x.shape[1]} channels do not divide into {num_groups} groups")
    return _GroupNorm(num_groups, eps)(mx_specs, x, weight, bias)


class GroupNorm(Layer, torch.nn.GroupNorm):
    """:func:`group_norm` as a layer; ``more`` goes to ``torch.nn.GroupNorm``."""

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        mx_specs: Mapping[str, Any] | None = None,
        name: str | None = None,
        **more: Any,
    ) -> None:
        super().__init__(num_groups, num_channels, **more)
        self.configure(mx_specs, name)

    def forward(self, input: Tensor) -> Tensor:
        """Return (N, C, ...) of (N, C, ...)."""
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, self.given_specs)
