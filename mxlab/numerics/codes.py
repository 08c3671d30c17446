"""The codes of a quantized tensor: what its elements and scales are stored as, and back.

A code of a floating-point element is sign, exponent and mantissa, as in OCP MX v1.0, section 5.3, and OFP8; of a
fixed-point one the integer in two's complement. A scale is a byte: a bare exponent plus the largest one, with the top
code for NaN (E8M0 where it has eight bits), or a positive floating-point number, with the top code for NaN. A block is
NaN by its scale, and its elements are 0 then.

Decoding what was encoded gives what :func:`mxlab.quantize` gives, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mxlab.errors import FormatError
from mxlab.formats import ElementFormat, MXFormat
from mxlab.numerics import philox, reference
from mxlab.numerics.blocks import Blocks, saturated


@dataclass(frozen=True)
class Codes:
    """A tensor as codes.

    Attributes:
        elements: uint8 (rest..., blocks, elements of a block), one code each; what pads a block has the code of 0.
        scales: uint8 (rest..., blocks).
        tensor_scale: float32 of no dimension; 1 where the format has none.
    """

    elements: Tensor
    scales: Tensor
    tensor_scale: Tensor


def encode(x: Tensor, fmt: MXFormat, axes: tuple[int, ...] = (-1,), seed: int = 0) -> Codes:
    """Quantize a tensor, and return the codes.

    Args:
        x: float32, bfloat16 or float16.
        fmt: the format.
        axes: along which blocks lie.
        seed: of ``dither`` rounding.

    Raises:
        FormatError: elements of more than eight bits, which have no codes here.
    """
    check_codes(fmt)
    cut = reference.block_layout(x, fmt, tuple(axis % x.ndim for axis in axes))
    blocks = cut.split(x.to(torch.float32))
    noise = cut.split(philox.uniform(x.shape, seed, x.device)) if fmt.is_random else None
    amax, unit = blocks.abs().amax(-1, keepdim=True), reference.tensor_scale(blocks, fmt)
    if fmt.scale_format.is_float:
        scale, is_nan = reference.held_scale(amax, unit, fmt), ~amax.isfinite()
        multiples = reference.multiples_of_float(blocks, unit, scale, fmt, noise)
        scales = _magnitude_codes(scale, fmt.scale_grid)
    else:
        exponent = reference.shared_exponent(blocks, amax, fmt, x.dtype)
        is_nan = reference.has_no_power(blocks, amax, fmt)
        multiples = reference.multiples_of_power(blocks, exponent, fmt, noise)
        scales = exponent + fmt.scale_emax
        if fmt.flush_fp32_subnorms:
            multiples = multiples.masked_fill(reference.is_flushed(amax), 0.0)
    elements = element_codes(multiples.masked_fill(is_nan, 0.0), fmt.grid, fmt.element_bits)
    return Codes(elements, scales.masked_fill(is_nan, nan_scale(fmt)).to(torch.uint8).squeeze(-1), unit)


def decode(codes: Codes, fmt: MXFormat, cut: Blocks, dtype: torch.dtype) -> Tensor:
    """Return the tensor that codes stand for, contiguous; what ``dtype`` cannot hold becomes its largest value.

    Args:
        codes: of the elements and the scales.
        fmt: the format.
        cut: how the tensor is cut into blocks.
        dtype: float32, bfloat16 or float16.
    """
    values = element_values(fmt.grid, fmt.element_bits).to(codes.elements.device)[codes.elements.long()]
    values *= codes.tensor_scale * scale_values(fmt).to(codes.scales.device)[codes.scales.long()].unsqueeze(-1)
    return cut.join(saturated(values + 0.0, dtype)).to(dtype)


def check_codes(fmt: MXFormat) -> None:
    """Raise FormatError where an element has more bits than a code."""
    if fmt.element_bits > 8:
        raise FormatError(
            f"{fmt} has elements of {fmt.element_bits} bits: codes have at most 8; use {fmt.element} as a dtype"
        )


def nan_scale(fmt: MXFormat) -> int:
    """Return the code of a scale that is not a number."""
    if fmt.scale_format.is_float:
        return len(fmt.scale_grid.magnitudes())
    return 2 * fmt.scale_emax + 1


def element_codes(multiples: Tensor, element: ElementFormat, bits: int) -> Tensor:
    """Return the codes, uint8, of float32 values on the grid of an element; a negative zero has that of 0."""
    if element.is_int:
        whole = (multiples * 2.0**element.mantissa_bits).to(torch.int16)
        return whole.bitwise_and_(2**bits - 1).to(torch.uint8)
    sign = (multiples < 0).to(torch.int64) << (bits - 1)
    return (_magnitude_codes(multiples.abs(), element) | sign).to(torch.uint8)


def _magnitude_codes(values: Tensor, element: ElementFormat) -> Tensor:
    # Non-negative codes stand for ascending values.
    table = torch.tensor(element.magnitudes(), dtype=torch.float32, device=values.device)
    return torch.bucketize(values, table)


@cache
def element_values(element: ElementFormat, bits: int) -> Tensor:
    """Return the value of every code of an element, float32 on the CPU; that of a special code is NaN or infinite."""
    if element.is_int:
        half = 2 ** (bits - 1)
        return torch.cat([torch.arange(half), torch.arange(-half, 0)]) * 2.0**-element.mantissa_bits
    positive = torch.full((2 ** (bits - 1),), math.nan)
    finite = torch.tensor(element.magnitudes())
    positive[: len(finite)] = finite
    if element.specials == "ieee":
        positive[len(finite)] = math.inf
    return torch.cat([positive, -positive])


@cache
def scale_values(fmt: MXFormat) -> Tensor:
    """Return the value of every code of a block's scale, float32 on the CPU; NaN for those that stand for none."""
    values = torch.full((256,), math.nan)
    if fmt.scale_format.is_float:
        finite = torch.tensor(fmt.scale_grid.magnitudes())
    else:
        finite = reference.power_scale(torch.arange(-fmt.scale_emax, fmt.scale_emax + 1, dtype=torch.int32), fmt)
    values[: len(finite)] = finite
    return values
