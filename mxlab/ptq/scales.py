"""The scales of a weight's blocks, fixed before its elements are chosen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxlab.formats import MXFormat
from mxlab.numerics import reference


def block_scales(weight: Tensor, fmt: MXFormat, importance: Tensor, exponents: Sequence[int]) -> Tensor:
    """Choose the scale of each block among those of the rule times powers of two, by the error that is left.

    Args:
        weight: float32 [out, in].
        fmt: the format; its blocks lie along ``in``.
        importance: [in], what the squared error of each input counts: the diagonal of the Hessian.
        exponents: of the powers of two.

    Returns:
        The scale of every element, float32 [out, in].
    """
    cut = reference.block_layout(weight, fmt, (1,))
    blocks, counts = cut.split(weight), cut.split(importance.expand_as(weight))
    ruled = reference.scales(blocks, fmt, weight.dtype)
    best, least = ruled, torch.full_like(ruled, torch.inf)
    for exponent in exponents:
        scale = held(ruled * 2.0**exponent, fmt)
        error = (counts * (blocks - rounded(blocks, scale, fmt)).square()).sum(-1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return cut.join(best.expand_as(blocks).contiguous())


def rounded(x: Tensor, scale: Tensor, fmt: MXFormat) -> Tensor:
    """Round float32 values to elements of the format times their scales."""
    return reference.round_to_element(x / scale, fmt, None).mul_(scale)


def held(scale: Tensor, fmt: MXFormat) -> Tensor:
    """Return scales that are powers of two, clamped to the range of the format's; others are left alone."""
    return scale if fmt.scale_format.is_float else scale.clamp(2.0**-fmt.scale_emax, 2.0**fmt.scale_emax)
