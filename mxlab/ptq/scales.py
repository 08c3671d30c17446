"""The scales of a weight's blocks, fixed before its elements are chosen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxlab.formats import MXFormat
from mxlab.numerics import reference

_FOUR_OR_SIX = 6 / 4  # times the scale with which the largest of a block becomes 6, it becomes 4


def block_scales(weight: Tensor, fmt: MXFormat, importance: Tensor, exponents: Sequence[int]) -> Tensor:
    """Choose the scale of each block among those of the rule times powers of two, by the error that is left.

    Where there is a choice, floating-point scales are tried 3/2 as large as well: the coarsest step of FP4, from 4 to
    6, then lies outside of the block (Cook et al., "Four Over Six", 2025).

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
    ruled, unit = reference.scales(blocks, fmt, weight.dtype), reference.tensor_scale(weight, fmt)
    best, least = ruled, torch.full_like(ruled, torch.inf)
    for factor in _factors(fmt, exponents):  # the rule's own first, which stays where nothing is better
        scale = held(ruled * factor, unit, fmt)
        error = (counts * (blocks - rounded(blocks, scale, fmt)).square()).sum(-1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return cut.join(best.expand_as(blocks).contiguous())


def _factors(fmt: MXFormat, exponents: Sequence[int]) -> list[float]:
    factors = [2.0**exponent for exponent in sorted(exponents, key=abs)]
    return [*factors, _FOUR_OR_SIX] if fmt.scale_format.is_float and len(factors) > 1 else factors


def rounded(x: Tensor, scale: Tensor, fmt: MXFormat) -> Tensor:
    """Round float32 values to elements of the format times their scales."""
    return reference.round_to_element(x / scale, fmt, None).mul_(scale)


def held(scale: Tensor, unit: Tensor, fmt: MXFormat) -> Tensor:
    """Return positive scales as their format holds them, ``unit`` being the scale of the tensor."""
    if not fmt.scale_format.is_float:
        return scale.clamp(2.0**-fmt.scale_emax, 2.0**fmt.scale_emax)
    grid = fmt.scale_grid
    return unit * reference.round_to_grid(scale / unit, grid, "even").clamp_(grid.min, grid.max)
