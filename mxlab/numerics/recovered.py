"""Codes of values that are on the grid of a format already, whoever put them there: scales are found anew."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mxlab.formats import MXFormat
from mxlab.numerics import reference
from mxlab.numerics.codes import Codes, check_codes, element_codes, nan_scale, scale_values

_SAMPLE = 64  # blocks that a scale of the tensor is tried on first
_ULPS = 2  # by which a quotient of two rounded products may differ from the scale of the tensor
_SLACK = 2.0**-22  # by which rounding may have moved a largest element under a scale that is no power of two
_BINADES = 3  # of the largest scale: those that calibration may have gone down to


def codes_of_values(values: Tensor, fmt: MXFormat, axes: tuple[int, ...] = (-1,)) -> Codes | None:
    """Return the codes of values on a grid.

    A block gets the smallest power of two that holds its ends: what is on the grid under some scale is on the finer
    grid under that. Of floating-point scales, the scale of the tensor is found first, up to a power of two: one of the
    few numbers by which the largest block can have come about, and under which all others have codes.

    Args:
        values: float32, bfloat16 or float16; floating-point scales are found of float32 only.
        fmt: the format.
        axes: along which blocks lie.

    Returns:
        None where no scale of the tensor was found. Values that are on no grid come out as others.

    Raises:
        FormatError: elements of more than eight bits.
    """
    check_codes(fmt)
    blocks = reference.block_layout(values, fmt, tuple(axis % values.ndim for axis in axes)).split(values)
    return _of_floating(blocks.float(), fmt) if fmt.scale_format.is_float else _of_powers(blocks.double(), fmt)


def _of_powers(blocks: Tensor, fmt: MXFormat) -> Codes:
    factor = float(reference.power_scale(torch.zeros((), dtype=torch.int32), fmt))  # 1, or that of an FP4 rule
    lowest, largest = (limit * factor for limit in fmt.limits)
    needed = torch.maximum(blocks.amax(-1, keepdim=True) / largest, blocks.amin(-1, keepdim=True) / lowest)
    mantissa, exponent = torch.frexp(needed)
    exponent = (exponent - (mantissa <= 0.5 * (1 + _SLACK)).int()).clamp(
        -fmt.scale_emax, fmt.scale_emax
    )  # of the power not below
    is_nan = ~needed.isfinite()
    multiples = torch.ldexp(blocks / factor, -exponent).float().masked_fill(is_nan, 0.0)
    if factor != 1:
        multiples = _rounded(multiples, fmt)
    elements = element_codes(multiples, fmt.grid, fmt.element_bits)
    scales = (exponent + fmt.scale_emax).masked_fill(is_nan, nan_scale(fmt)).to(torch.uint8).squeeze(-1)
    return Codes(elements, scales, torch.ones((), device=blocks.device))


def _of_floating(blocks: Tensor, fmt: MXFormat) -> Codes | None:
    flat = blocks.flatten(0, -2)
    is_nan = ~flat.isfinite().all(-1)
    finite = flat.masked_fill(is_nan.unsqueeze(-1), 0.0)
    amax = finite.abs().amax(-1)
    largest_first = amax.argsort(descending=True)[: 4 * _SAMPLE]
    sample = finite[torch.cat([largest_first[:8], largest_first[8 :: max(len(largest_first) // _SAMPLE, 1)]])]
    for unit in _units(float(amax.max()), fmt):
        if _scales(sample, unit, fmt)[1] and (found := _scales(finite, unit, fmt))[1]:
            scales = found[0].masked_fill(is_nan, nan_scale(fmt))
            up = unit * scale_values(fmt).to(blocks.device)[found[0]].unsqueeze(-1)
            elements = element_codes(_rounded(finite / up, fmt), fmt.grid, fmt.element_bits)
            shape = blocks.shape[:-1]
            return Codes(elements.view(blocks.shape), scales.to(torch.uint8).view(shape), unit)
    return None


def _units(largest: float, fmt: MXFormat) -> Iterator[Tensor]:
    """Yield what the scale of the tensor may be, given its largest magnitude."""
    if not fmt.tensor_bits:
        yield torch.ones(())
        return
    scales = [s for s in fmt.scale_grid.magnitudes() if s > fmt.scale_grid.max / 2]
    elements = sorted((e for e in fmt.grid.magnitudes() if e > 0), reverse=True)
    for binade in range(_BINADES):
        for element in elements:
            for scale in scales:
                near = torch.tensor(largest / element / scale * 2.0**binade)
                bits = near.view(torch.int32)
                for step in sorted(range(-_ULPS, _ULPS + 1), key=abs):
                    yield (bits + step).view(torch.float32)


def _scales(blocks: Tensor, unit: Tensor, fmt: MXFormat) -> tuple[Tensor, bool]:
    """Return the code of a scale for each block [blocks, elements], and whether all give their values back."""
    amax = blocks.abs().amax(-1)
    grid = scale_values(fmt)[: len(fmt.scale_grid.magnitudes())].to(blocks.device)
    found = torch.ones_like(amax, dtype=torch.int64)  # of a block of zeros: any
    is_found = amax == 0
    for element in sorted((e for e in fmt.grid.magnitudes() if e > 0), reverse=True):
        wanted = amax / (unit * element)
        code = torch.bucketize(wanted, (grid[1:] + grid[:-1]) / 2).clamp_min(1)
        up = (unit * grid[code]).unsqueeze(-1)
        holds = (_rounded(blocks / up, fmt) * up == blocks).all(-1) & ~is_found
        found, is_found = torch.where(holds, code, found), is_found | holds
    return found, bool(is_found.all())


def _rounded(multiples: Tensor, fmt: MXFormat) -> Tensor:
    """Return the nearest element to each multiple of a scale."""
    grid = torch.tensor(fmt.grid.magnitudes(), device=multiples.device)
    near = grid[torch.bucketize(multiples.abs(), (grid[1:] + grid[:-1]) / 2)]
    return near.copysign(multiples) + 0.0
