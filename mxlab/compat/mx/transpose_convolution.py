"""The transposed convolution with rounded operands, under microxcaling's name and signature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mxlab.compat.mx._operator import Layer, aten
from mxlab.compat.mx.convolution import Convolution, Numbers


class ConvTranspose2d(Layer, torch.nn.ConvTranspose2d):
    """A ``torch.nn.ConvTranspose2d`` with rounded operands; ``more`` goes there."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        stride: Numbers = 1,
        padding: Numbers = 0,
        output_padding: Numbers = 0,
        dilation: Numbers = 1,
        groups: int = 1,
        bias: bool = True,
        mx_specs: Mapping[str, Any] | None = None,
        name: str | None = None,
        **more: Any,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,  # pyright: ignore[reportArgumentType]
            stride,  # pyright: ignore[reportArgumentType]
            padding,  # pyright: ignore[reportArgumentType]
            output_padding,  # pyright: ignore[reportArgumentType]
            groups,
            bias,
            dilation,  # pyright: ignore[reportArgumentType]
            **more,
        )
        self.configure(mx_specs, name)

    def forward(self, inputs: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Return (N, O, H', W') of (N, I, H, W); ``output_size`` is (H', W') where the stride leaves it open."""
        size: Any = None if output_size is None else list(output_size)
        kernel: Any = self.kernel_size
        padding = self._output_padding(inputs, size, self.stride, self.padding, kernel, 2, self.dilation)  # pyright: ignore[reportArgumentType]
        if self.mx_none:
            zeros = list(padding)
            return aten.conv_transpose2d(
                inputs, self.weight, self.bias, self.stride, self.padding, zeros, self.groups, self.dilation
            )
        operator = Convolution(self.stride, self.padding, self.dilation, self.groups, tuple(padding))  # pyright: ignore[reportArgumentType]
        return operator(self.mx_specs, inputs, self.weight, self.bias)
