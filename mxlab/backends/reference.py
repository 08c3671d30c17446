"""The ``exact`` numerics in eager torch: the readable specification that faster backends are tested against.

OCP Microscaling Formats (MX) v1.0, section 6.3, on any device. Everything is computed in float32, where each step
below is exact: powers of two scale without rounding, and ``round_to_grid`` rounds once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxlab.backends import philox
from mxlab.backends.blocks import Blocks, exp2, floor_log2
from mxlab.formats import ElementFormat, MXFormat, Rounding

_EXPONENT_FIELD = 0x7F800000
# The largest float32 below 1/2. trunc(v + this) rounds halves away from zero; with 1/2 itself the sum would round
# 0.49999997 up to 1.
_HALF = 0.5 - 2.0**-25


def quantize(x: Tensor, fmt: MXFormat, axes: tuple[int, ...], seed: int) -> Tensor:
    """``x`` rounded to ``fmt`` in blocks along ``axes`` (non-negative); same shape and dtype, contiguous."""
    cut = block_layout(x, fmt, axes)
    blocks = cut.split(x.to(torch.float32))  # (..., n_blocks, block)
    amax = blocks.abs().amax(-1, keepdim=True)  # (..., n_blocks, 1)
    exponent = shared_exponent(amax, fmt)
    y = blocks * exp2(-exponent)
    noise = cut.split(philox.uniform(x.shape, seed, x.device)) if fmt.rounding == "dither" else None
    element = fmt.element_format
    y = round_to_grid(y, element, fmt.rounding, noise).clamp_(-element.max, element.max)
    y *= block_scale(amax, exponent, fmt)
    y += 0.0  # a zero result is +0
    return cut.join(y).to(x.dtype)


def round_elementwise(x: Tensor, element: ElementFormat, rounding: Rounding, subnormals: bool, seed: int) -> Tensor:
    """Each value rounded to ``element`` on its own; what overflows becomes infinite, NaN and infinities stay."""
    y = x.to(torch.float32)
    noise = philox.uniform(x.shape, seed, x.device) if rounding == "dither" else None
    rounded = round_to_grid(y.clone(), element, rounding, noise)
    rounded = torch.where(rounded.abs() > element.max, torch.copysign(torch.full_like(y, torch.inf), y), rounded)
    if not subnormals:
        rounded = torch.where(y.abs() < element.min_normal, 0.0, rounded)
    return (torch.where(y.isinf(), y, rounded) + 0.0).to(x.dtype)


def block_layout(x: Tensor, fmt: MXFormat, axes: tuple[int, ...]) -> Blocks:
    """Where the blocks of ``x`` lie. An exponent for every element is a block of one."""
    return Blocks(tuple(x.shape), axes, 1 if fmt.scale_rule == "none" else fmt.block_size)


def unclamped_exponent(amax: Tensor, fmt: MXFormat) -> Tensor:
    """The shared exponent of blocks with largest magnitude ``amax`` before it is held to ``scale_bits``; int32."""
    return floor_log2(amax) - fmt.element_format.emax


def shared_exponent(amax: Tensor, fmt: MXFormat) -> Tensor:
    """The shared exponent held to the range of the scale, as int32."""
    return unclamped_exponent(amax, fmt).clamp(-fmt.scale_emax, fmt.scale_emax)


def block_scale(amax: Tensor, exponent: Tensor, fmt: MXFormat) -> Tensor:
    """The factor that takes a block back: 2^exponent; NaN where the block has no scale; 0 where it is flushed."""
    scale = exp2(exponent)
    if fmt.flush_fp32_subnorms:
        scale = torch.where(floor_log2(amax) <= -127, 0.0, scale)
    overflow = unclamped_exponent(amax, fmt) > fmt.scale_emax
    return torch.where(overflow | ~amax.isfinite(), torch.nan, scale)


def round_to_grid(y: Tensor, element: ElementFormat, rounding: Rounding, noise: Tensor | None = None) -> Tensor:
    """float32 values rounded to the grid of ``element``, not yet limited to its largest value. Overwrites ``y``.

    The grid is 2^(e - mantissa_bits) apart, e the exponent of y but at least emin: dividing by 2^e and multiplying by
    2^mantissa_bits makes it the integers.
    """
    if element.is_int:
        binade: Tensor | float = 1.0
    else:
        binade = (y.view(torch.int32) & _EXPONENT_FIELD).view(torch.float32).clamp_(min=element.min_normal)
    y /= binade
    y *= 2.0**element.mantissa_bits
    y = round_to_integer(y, rounding, noise)
    y *= 2.0**-element.mantissa_bits
    y *= binade
    return y


def round_to_integer(v: Tensor, rounding: Rounding, noise: Tensor | None = None) -> Tensor:
    """float32 values rounded to integers; magnitudes below 2^22. Overwrites ``v``."""
    if rounding == "nearest":
        return v.add_(torch.full_like(v, _HALF).copysign_(v)).trunc_()
    if rounding == "even":
        return v.round_()
    if rounding == "floor":
        return v.trunc_()
    assert noise is not None  # rounding == "dither"
    magnitude = v.abs()
    whole = magnitude.floor()
    # floor(|v| + u); the sum itself would round, and lift a v that is an integer already. Both sides here are exact.
    up = magnitude - whole >= 1 - noise
    return whole.add_(up).copysign_(v)
