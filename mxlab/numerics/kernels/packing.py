"""Packed codes in C++ on the CPU, with the bits of :mod:`mxlab.numerics.codes` and :mod:`mxlab.packed.bits`.

Blocks lie along the last axis.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from mxlab.formats import MXFormat
from mxlab.numerics.codes import element_values, nan_scale, scale_values
from mxlab.numerics.kernels import native
from mxlab.numerics.kernels.products import integers


def can_pack(x: Tensor, fmt: MXFormat) -> bool:
    """Return whether :func:`pack` serves: on the CPU, with kernels for the format, and no random numbers."""
    has_kernels = fmt.has_kernels and not fmt.is_random and fmt.scale_rule != "none" and fmt.element_bits <= 8
    return native.MISSING is None and x.device.type == "cpu" and has_kernels and x.numel() > 0


def can_unpack(elements: Tensor, fmt: MXFormat) -> bool:
    """Return whether :func:`unpack` serves: on the CPU."""
    return native.MISSING is None and elements.device.type == "cpu" and elements.numel() > 0


def pack(x: Tensor, fmt: MXFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a contiguous tensor [..., length], and return its codes.

    Returns:
        Packed elements, uint8 [..., bytes]; scales, uint8 [..., blocks]; the scale of the tensor, float32.
    """
    length = x.shape[-1]
    block = min(fmt.block_size or length, length)
    row_bytes = -(-length * fmt.element_bits // 8)
    elements = torch.empty(*x.shape[:-1], row_bytes, dtype=torch.uint8)
    scales = torch.empty(*x.shape[:-1], -(-length // block), dtype=torch.uint8)
    unit = native.pack(x, fmt, elements, scales, (x.numel() // length, length, block, row_bytes), nan_scale(fmt))
    return elements, scales, torch.tensor(unit)


def unpack(
    elements: Tensor, scales: Tensor, tensor_scale: Tensor, fmt: MXFormat, length: int, dtype: torch.dtype
) -> Tensor:
    """Return the values [..., length] of contiguous codes; what ``dtype`` cannot hold becomes its largest value."""
    out = torch.empty(*elements.shape[:-1], length, dtype=dtype)
    element, values, unit = codes(fmt)
    scale_of = scale_values(fmt) * tensor_scale * unit
    block = min(fmt.elements_per_scale or length, length)
    native.unpack(elements, scales, scale_of, out, (math.prod(elements.shape[:-1]), length, block), element, values)
    return out


@functools.cache
def codes(fmt: MXFormat) -> tuple[Any, Tensor | None, float]:
    """Return the codes for the kernels, their values where they are no integers, and what both are multiples of."""
    whole = integers(fmt)
    if whole is not None:
        return native.dot_element(fmt, whole.tolist()), None, fmt.grid.min
    values = torch.full((256,), math.nan)
    found = element_values(fmt.grid, fmt.element_bits) + 0.0  # no negative zero
    values[: len(found)] = found
    return native.dot_element(fmt), values, 1.0
