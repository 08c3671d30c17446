"""Convolutions with rounded operands, under microxcaling's names and signatures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxlab.compat.mx._operator import Gradients, Layer, Operator, aten
from mxlab.compat.mx.elemwise_ops import quantize_elemwise_op
from mxlab.compat.mx.mx_ops import quantize_mx_op
from mxlab.compat.mx.specs import MxSpecs, mx_assert_test
from mxlab.compat.mx.vector_ops import Vector
from mxlab.errors import SpecError

Numbers = int | Sequence[int]
Specs = Mapping[str, Any] | None


@dataclass(frozen=True)
class Convolution(Operator):
    """A convolution, or a transposed one, of x (N, I, ...) with a weight (O, I/groups, ...), or (I, O/groups, ...).

    Forward: operands and bias are rounded element-wise, ``x`` and weight quantized to MX along the channels of ``x``;
    the result, bias included, is rounded element-wise. Backward: the gradient is rounded element-wise; for the
    gradient of ``x`` it and the weight are quantized along the channels of the output, for that of the weight it and
    ``x`` along the batch. All take the forward formats, and the elements are rounded to nearest.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    output_padding: tuple[int, ...] | None = None  # of a transposed convolution

    def forward(self, v: Vector, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the output, and the operands for :meth:`backward`."""
        q = _Quantizer(v.specs)
        rounded, rounded_weight = q.elementwise(x, "output"), q.elementwise(weight, "weight")
        if bias is not None:
            bias = q.elementwise(bias, "weight")
        channels = 0 if self.is_transposed else 1
        y = aten.convolution(
            q.mx(rounded, "a", 1),
            q.mx(rounded_weight, "w", channels),
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.is_transposed,
            self.output_padding or (0,) * len(self.stride),
            self.groups,
        )
        return q.elementwise(y, "output"), (v.keep(x, rounded), v.keep(weight, rounded_weight))

    def backward(self, v: Vector, saved: tuple[Tensor, Tensor], grad: Tensor) -> Gradients:
        """Return the gradients of ``x``, weight and bias."""
        q = _Quantizer(v.specs)
        x, weight = saved
        grad = q.elementwise(grad, "grad_input")
        large, small = q.mx(x, "a", 0), q.mx(grad, "a", 0)
        if self.is_transposed:
            large, small = small, large
        grad_weight = self._gradient(small, large, weight, of_weight=True)
        channels = 1 if self.is_transposed else 0
        quantized, quantized_weight = q.mx(grad, "a", 1), q.mx(weight, "w", channels)
        if self.is_transposed:
            zeros = (0,) * len(self.stride)
            grad_x = aten.convolution(
                quantized, quantized_weight, None, self.stride, self.padding, self.dilation, False, zeros, self.groups
            )
        else:
            grad_x = self._gradient(quantized, x, quantized_weight, of_weight=False)
        grad_bias = grad.sum([0, *range(2, grad.ndim)])
        return (
            q.elementwise(grad_x, "grad_input"),
            q.elementwise(grad_weight, "grad_weight"),
            q.elementwise(grad_bias, "grad_weight"),
        )

    @property
    def is_transposed(self) -> bool:
        """Whether this is a transposed convolution."""
        return self.output_padding is not None

    def _gradient(self, grad: Tensor, x: Tensor, weight: Tensor, of_weight: bool) -> Tensor:
        """Return the gradient of the weight, or of ``x``, of a plain convolution from that of its output."""
        zeros, wanted = (0,) * len(self.stride), (not of_weight, of_weight, False)
        return aten.convolution_backward(
            grad, x, weight, None, self.stride, self.padding, self.dilation, False, zeros, self.groups, wanted
        )[int(of_weight)]


class _Quantizer:
    """Rounds operands of convolutions as the options of one pass say."""

    def __init__(self, specs: Mapping[str, Any] | None) -> None:
        self.specs = specs if specs is not None else MxSpecs()

    def elementwise(self, x: Tensor, what: str) -> Tensor:
        return quantize_elemwise_op(x, self.specs, self.specs[f"round_{what}"])

    def mx(self, x: Tensor, operand: str, axis: int) -> Tensor:
        return quantize_mx_op(x, self.specs, self.specs[f"{operand}_elem_format"], axes=[axis])


def spread(value: Numbers, ndim: int) -> tuple[int, ...]:
    """Return one number for each spatial dimension."""
    return (value,) * ndim if isinstance(value, int) else tuple(value)


def _padding(padding: Numbers | str, weight: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...]) -> Any:
    """Return how many zeros are added on each side."""
    if not isinstance(padding, str):
        return spread(padding, len(stride))
    if padding == "valid":
        return (0,) * len(stride)
    spans = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if padding != "same" or set(stride) != {1} or any(span % 2 for span in spans):
        raise SpecError(
            f"padding is {padding!r}: with mx_specs give numbers, 'valid', or 'same' for a stride of 1 and odd kernels"
        )
    return tuple(span // 2 for span in spans)


def _convolve(
    ndim: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Numbers,
    padding: Numbers | str,
    dilation: Numbers,
    groups: int,
    mx_specs: Specs,
) -> Tensor:
    if mx_specs is None:
        plain = (aten.conv1d, aten.conv2d, aten.conv3d)[ndim - 1]
        plain = plain.padding if isinstance(padding, str) else plain.default
        given = padding if isinstance(padding, str) else spread(padding, ndim)
        return plain(input, weight, bias, spread(stride, ndim), given, spread(dilation, ndim), groups)
    if input.ndim != ndim + 2:
        raise SpecError(f"conv{ndim}d: input has {input.ndim} dimensions: with mx_specs it takes {ndim + 2}")
    steps, dilations = spread(stride, ndim), spread(dilation, ndim)
    operator = Convolution(steps, _padding(padding, weight, steps, dilations), dilations, groups)
    return operator(mx_specs, input, weight, bias)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    mx_specs: Specs = None,
    name: str | None = None,
) -> Tensor:
    """Return the convolution (N, O, L') of (N, I, L) with (O, I/groups, K); torch's own where ``mx_specs`` is None.

    Raises:
        FormatError: as ``quantize_mx_op`` and ``quantize_elemwise_op``.
        SpecError: an input without a batch, padding that cannot be spread evenly, or an unknown option.
    """
    mx_assert_test(mx_specs)
    return _convolve(1, input, weight, bias, stride, padding, dilation, groups, mx_specs)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    mx_specs: Specs = None,
    name: str | None = None,
) -> Tensor:
    """Return the convolution (N, O, H', W') of (N, I, H, W) with (O, I/groups, K, K); otherwise as :func:`conv1d`."""
    mx_assert_test(mx_specs)
    return _convolve(2, input, weight, bias, stride, padding, dilation, groups, mx_specs)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    mx_specs: Specs = None,
    name: str | None = None,
) -> Tensor:
    """Return the convolution of (N, I, D, H, W) with (O, I/groups, K, K, K); otherwise as :func:`conv1d`."""
    mx_assert_test(mx_specs)
    return _convolve(3, input, weight, bias, stride, padding, dilation, groups, mx_specs)


class _ConvLayer(Layer):
    """What the three layers share; the next class in line is torch's."""

    ndim: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        stride: Numbers = 1,
        padding: Numbers | str = 0,
        dilation: Numbers = 1,
        groups: int = 1,
        bias: bool = True,
        mx_specs: Specs = None,
        name: str | None = None,
        **more: Any,
    ) -> None:
        given: Any = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        super().__init__(*given, **more)
        self.configure(mx_specs, name)

    def forward(self: Any, inputs: Tensor) -> Tensor:
        """Return (N, O, ...) of (N, I, ...)."""
        padding = self.padding
        if self.padding_mode != "zeros":
            inputs = F.pad(inputs, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        weight, bias, specs = self.weight, self.bias, self.given_specs
        return _convolve(self.ndim, inputs, weight, bias, self.stride, padding, self.dilation, self.groups, specs)


class Conv1d(_ConvLayer, torch.nn.Conv1d):
    """:func:`conv1d` as a layer; ``more`` goes to ``torch.nn.Conv1d``."""

    ndim = 1


class Conv2d(_ConvLayer, torch.nn.Conv2d):
    """:func:`conv2d` as a layer; ``more`` goes to ``torch.nn.Conv2d``."""

    ndim = 2


class Conv3d(_ConvLayer, torch.nn.Conv3d):
    """:func:`conv3d` as a layer; ``more`` goes to ``torch.nn.Conv3d``."""

    ndim = 3
