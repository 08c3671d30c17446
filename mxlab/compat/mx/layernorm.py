"""Layer and RMS normalization in rounded steps, under microxcaling's names and signatures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxlab.compat.mx._operator import Layer, aten
from mxlab.compat.mx.norm_utils import Norm, normalize
from mxlab.compat.mx.specs import mx_assert_test
from mxlab.compat.mx.vector_ops import Vector
from mxlab.errors import SpecError


@dataclass(frozen=True)
class _LayerNorm(Norm):
    eps: float
    channel_axis = -1

    def normalized(self, v: Vector, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        found = normalize(v, x, [-1], self.eps)
        return found.norm, (found.variance,)

    def input_gradient(self, v: Vector, grad: Tensor, norm: Tensor, *saved: Tensor) -> Tensor:
        """Return g/s - norm · mean(g · norm · s) / s², minus the mean of that: the same value, in other steps."""
        (variance,) = saved
        std = v.sqrt(variance)
        direct = v.mul(grad, v.div(1.0, std))
        through_std = v.mean(v.mul(v.mul(grad, norm), std), -1, keepdim=True)
        through_std = v.mul(through_std, v.div(1.0, variance))
        centred = v.add(direct, v.mul(-through_std, norm))
        return v.add(centred, -v.mean(centred, -1, keepdim=True))


@dataclass(frozen=True)
class _RMSNorm(Norm):
    eps: float
    channel_axis = -1

    def normalized(self, v: Vector, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        mean_square = v.add(v.mean(v.mul(x, x), -1, keepdim=True), self.eps)
        rms_inverse = v.recip(v.sqrt(mean_square))
        return v.mul(x, rms_inverse), (rms_inverse,)

    def input_gradient(self, v: Vector, grad: Tensor, norm: Tensor, *saved: Tensor) -> Tensor:
        (rms_inverse,) = saved
        direct = v.mul(grad, rms_inverse)
        along = v.mean(v.mul(direct, norm), -1, keepdim=True)
        return direct - v.mul(norm, along)  # not rounded, as in microxcaling


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-12,
    mx_specs: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Tensor:
    """Normalize over the last dimension; torch's own where ``mx_specs`` is None.

    Args:
        input: (..., H).
        normalized_shape: (H,); more dimensions without options only.
        weight: (H,), or None.
        bias: (H,), or None.
        eps: what is added to the variance.
        mx_specs: the options.
        name: not read.

    Returns:
        (..., H).

    Raises:
        FormatError: as ``quantize_elemwise_op``.
        SpecError: several dimensions to normalize over, or an unknown option.
    """
    mx_assert_test(mx_specs)
    if mx_specs is None:
        return aten.layer_norm(input, normalized_shape, weight, bias, eps)
    if tuple(normalized_shape) != (input.shape[-1],):
        raise SpecError(
            f"layer_norm: normalized_shape is {tuple(normalized_shape)}: with mx_specs it must be "
            f"({input.shape[-1]},), the last dimension"
        )
    return _LayerNorm(eps)(mx_specs, input, weight, bias)


class LayerNorm(Layer, torch.nn.LayerNorm):
    """:func:`layer_norm` as a layer; ``more`` goes to ``torch.nn.LayerNorm``."""

    def __init__(
        self,
        hidden_size: int | Sequence[int],
        eps: float = 1e-12,
        mx_specs: Mapping[str, Any] | None = None,
        name: str | None = None,
        **more: Any,
    ) -> None:
        super().__init__(hidden_size, eps, **more)  # pyright: ignore[reportArgumentType]
        self.configure(mx_specs, name)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., H) of (..., H)."""
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps, self.given_specs)


class RMSNorm(Layer, torch.nn.LayerNorm):
    """Divide by the root of the mean square over the last dimension; has a bias, as in microxcaling.

    Without options nothing is rounded: torch had no such layer.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-12,
        mx_specs: Mapping[str, Any] | None = None,
        name: str | None = None,
        **more: Any,
    ) -> None:
        super().__init__(hidden_size, eps, **more)
        self.configure(mx_specs, name)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., H) of (..., H)."""
        return _RMSNorm(self.eps)(self.mx_specs, x, self.weight, self.bias)
