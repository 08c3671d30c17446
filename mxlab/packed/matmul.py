"""Products of activations with packed weights: in integers where that can be, and else with the weight's values.

In integers, no value of the weight is ever written to memory, and the sums of a block are exact; see
:mod:`mxlab.numerics.kernels.products`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mxlab.errors import FormatError
from mxlab.formats import MXFormat
from mxlab.numerics import quantize
from mxlab.numerics.kernels import products
from mxlab.numerics.kernels.products import integer_product
from mxlab.packed.tensor import MXTensor

DTYPES = (torch.float32, torch.bfloat16)  # whose numbers hold what a format holds: float16 lacks the range of scales


@dataclass(frozen=True)
class IntegerActivation:
    """An activation [..., inputs] as integers and scales, for weights of one format."""

    shape: torch.Size
    dtype: torch.dtype
    fmt: MXFormat
    weight: MXFormat
    memory: Tensor

    @classmethod
    def from_float(cls, x: Tensor, fmt: MXFormat, weight: MXFormat, memory: Tensor | None = None) -> IntegerActivation:
        """Quantize an activation to ``fmt``, to be multiplied by weights of the format ``weight``.

        Args:
            x: [..., inputs].
            fmt: the format of the activation.
            weight: the format of the weights.
            memory: what may be written to, contiguous; new memory is taken where it is too small.

        Raises:
            FormatError: there is an :func:`obstacle`.
        """
        product, reason = integer_product(weight, fmt), obstacle(x, fmt, weight)
        if product is None or reason:
            raise FormatError(f"no product in integers: {reason}; multiply the values instead")
        return cls(x.shape, x.dtype, fmt, weight, product.encode(x.contiguous(), memory))


def obstacle(x: Tensor, fmt: MXFormat, weight: MXFormat) -> str | None:
    """Return why an activation cannot be multiplied in integers; None where it can."""
    if x.device.type != "cpu":
        return f"the activation is on {x.device}"
    if x.dtype not in DTYPES:
        return f"the activation is {x.dtype}, which lacks the range of the scales"
    if not x.numel():
        return "the activation is empty"
    if fmt.tensor_bits and x.dtype != torch.float32:
        return f"the values of {fmt} are rounded once more in {x.dtype}"
    return products.obstacle(weight, fmt)


def multiply(x: IntegerActivation, weight: MXTensor, bias: Tensor | None = None) -> Tensor | None:
    """Return the product [..., outputs], in the dtype of the activation.

    Args:
        x: the activation [..., inputs].
        weight: [outputs, inputs] with its blocks along the last axis, or [inputs, outputs] along the first.
        bias: [outputs], or None.

    Returns:
        None where a product of two scales might be no normal number of float32: multiply the values instead.

    Raises:
        FormatError: an activation for other weights.
    """
    product, inputs = integer_product(x.weight, x.fmt), x.shape[-1]
    if product is None or weight.fmt != x.weight or weight.shape[weight.axis] != inputs or len(weight.shape) != 2:
        raise FormatError(
            f"the activation {tuple(x.shape)} is for weights of {x.weight}, and this one is {weight.shape} of "
            f"{weight.fmt} in blocks along axis {weight.axis}: quantize the activation for it"
        )
    out = torch.empty(*x.shape[:-1], weight.elements.shape[0], dtype=x.dtype)
    rows = math.prod(x.shape[:-1])
    return out if product.multiply(x.memory, rows, inputs, weight.rows, bias, out) else None


def linear(x: Tensor, weight: MXTensor, activation: MXFormat | str | None = None, bias: Tensor | None = None) -> Tensor:
    """Multiply an activation by a packed weight, as ``torch.nn.functional.linear`` does their values.

    Args:
        x: [..., inputs].
        weight: [outputs, inputs], in blocks along the last axis.
        activation: the format that ``x`` is quantized to first; None for none.
        bias: [outputs], of the dtype of ``x``.

    Returns:
        [..., outputs], of the dtype of ``x``.

    Raises:
        FormatError: shapes that do not fit.
    """
    if len(weight.shape) != 2 or weight.axis != 1 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise FormatError(
            f"x is {tuple(x.shape)} and the weight {weight.shape} in blocks along axis {weight.axis}: the weight must "
            "be [outputs, inputs] in blocks along axis 1, and x [..., inputs]"
        )
    fmt = None if activation is None else MXFormat.parse(activation)
    if fmt is not None and not (torch.is_grad_enabled() and x.requires_grad) and not obstacle(x, fmt, weight.fmt):
        y = multiply(IntegerActivation.from_float(x, fmt, weight.fmt), weight, bias)
        if y is not None:
            return y
    inputs = x if fmt is None else quantize(x, fmt)
    return F.linear(inputs, weight.dequantize(x.dtype), bias)
