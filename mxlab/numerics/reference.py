"""The ``exact`` numerics in eager torch: the readable specification that faster backends are tested against.

OCP Microscaling Formats (MX) v1.0, section 6.3, on any device. Everything is computed in float32, where powers of two
scale without rounding, and ``round_to_grid`` rounds once. A result beyond the tensor's dtype saturates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from mxlab.formats import ElementFormat, MXFormat, Rounding
from mxlab.formats.scales import ScaleRule
from mxlab.numerics import philox
from mxlab.numerics.blocks import Blocks, exp2, floor_log2, saturated

_EXPONENT_FIELD = 0x7F800000
# The largest float32 below 1/2. trunc(v + this) rounds halves away from zero; with 1/2 itself the sum would round
# 0.49999997 up to 1.
_HALF = 0.5 - 2.0**-25
# The smallest scale of a tensor: no product or quotient of it and a block's scale leaves the normal float32 numbers.
_SMALLEST_TENSOR_SCALE = 2.0**-117
# Where FP-Quant clips a normal distribution of standard deviation 1 to the largest element, 6: QuEST's constant.
_GAUSSIAN_CLIP = 2.92247856


def quantize(x: Tensor, fmt: MXFormat, axes: tuple[int, ...], seed: int) -> Tensor:
    """Round ``x`` to ``fmt`` in blocks along ``axes`` (non-negative); same shape and dtype, contiguous."""
    cut = block_layout(x, fmt, axes)
    blocks = cut.split(x.to(torch.float32))  # (..., n_blocks, block)
    noise = cut.split(philox.uniform(x.shape, seed, x.device)) if fmt.is_random else None
    amax = blocks.abs().amax(-1, keepdim=True)  # (..., n_blocks, 1)
    if fmt.scale_format.is_float:
        y = round_to_float_scale(blocks, amax, fmt, noise)
    else:
        y = round_to_exponent(blocks, amax, shared_exponent(blocks, amax, fmt, x.dtype), fmt, noise)
    y += 0.0  # a zero result is +0
    return cut.join(saturated(y, x.dtype)).to(x.dtype)


def round_elementwise(x: Tensor, element: ElementFormat, rounding: Rounding, subnormals: bool, seed: int) -> Tensor:
    """Return each value rounded to ``element`` on its own; NaN and infinities stay.

    What overflows ``element`` becomes infinite; what only ``x``'s dtype cannot hold saturates.
    """
    y = x.to(torch.float32)
    noise = philox.uniform(x.shape, seed, x.device) if rounding == "dither" else None
    rounded = round_to_grid(y.clone(), element, rounding, noise)
    infinite = torch.copysign(torch.full_like(y, torch.inf), y)
    rounded = torch.where(rounded.abs() > element.max, infinite, saturated(rounded, x.dtype))
    if not subnormals:
        rounded = torch.where(y.abs() < element.min_normal, 0.0, rounded)
    return (torch.where(y.isinf(), y, rounded) + 0.0).to(x.dtype)


def block_layout(x: Tensor, fmt: MXFormat, axes: tuple[int, ...]) -> Blocks:
    """Return where the blocks of ``x`` lie."""
    return layout_of_shape(tuple(x.shape), fmt, axes)


def layout_of_shape(shape: tuple[int, ...], fmt: MXFormat, axes: tuple[int, ...]) -> Blocks:
    """Return where the blocks of a tensor of ``shape`` lie. An exponent for every element is a block of one."""
    return Blocks(shape, axes, 1 if fmt.scale_rule == "none" else fmt.block_size)


# Scales that are powers of two


def round_to_exponent(blocks: Tensor, amax: Tensor, exponent: Tensor, fmt: MXFormat, noise: Tensor | None) -> Tensor:
    """Round blocks (..., block) to elements times 2^exponent (..., 1), or 4/3 of that under ``four_thirds``."""
    return multiples_of_power(blocks, exponent, fmt, noise).mul_(block_scale(blocks, amax, exponent, fmt))


def multiples_of_power(blocks: Tensor, exponent: Tensor, fmt: MXFormat, noise: Tensor | None) -> Tensor:
    """Return the elements of blocks (..., block), whose scales have an exponent (..., 1), as multiples of these."""
    y = blocks * exp2(-exponent)
    if fmt.scale_rule == "four_thirds":
        # A tensor: by a number, torch multiplies with its rounded inverse on some devices.
        y /= torch.full_like(y, 4 / 3)
    return round_to_element(y, fmt, noise)


def shared_exponent(blocks: Tensor, amax: Tensor, fmt: MXFormat, dtype: torch.dtype) -> Tensor:
    """Return the shared exponent of each block, clamped to the range of the scale, as int32.

    ``dtype`` is the tensor's: the rule ``mse`` judges what it can hold.
    """
    exponent = unclamped_exponent(blocks, amax, fmt).clamp(-fmt.scale_emax, fmt.scale_emax)
    if fmt.scale_rule != "mse":
        return exponent
    errors = [squared_error(blocks, amax, e, fmt, dtype) for e in (exponent, exponent + 1)]
    return exponent + ((errors[1] < errors[0]) & (exponent < fmt.scale_emax)).int()


def squared_error(blocks: Tensor, amax: Tensor, exponent: Tensor, fmt: MXFormat, dtype: torch.dtype) -> Tensor:
    """Return the sum of (x - Q(x))^2 over each block, added up in index order; a sum beyond float32 is infinite."""
    difference = blocks - saturated(round_to_exponent(blocks, amax, exponent, fmt, None), dtype)
    return reduce(torch.add, (difference * difference).split(1, -1))


def unclamped_exponent(blocks: Tensor, amax: Tensor, fmt: MXFormat) -> Tensor:
    """Return the shared exponent of each block, int32, before it is clamped to ``scale_bits``.

    ``amax`` is the block's largest magnitude, whose shape the result has; under the rule ``mse`` this is the exponent
    of ``floor``.
    """
    if fmt.scale_rule == "quest":
        return floor_log2(gaussian_scale(blocks, fmt.element_format)).view_as(amax)
    significand = torch.frexp(amax).mantissa  # in [1/2, 1)
    element = fmt.element_format
    return floor_log2(amax) - element.emax + _STEPS_UP[fmt.scale_rule](significand, element).int()


def gaussian_scale(blocks: Tensor, element: ElementFormat) -> Tensor:
    """Return the scale that clips a normal distribution best, from the standard deviation of each block, as float32.

    FP-Quant computes it in float32, in an order of its compiler's; here it is computed in float64 and rounded once.
    """
    deviation = blocks.double().std(-1, correction=0)
    return (deviation * (_GAUSSIAN_CLIP / element.max) + 1e-8).float()


def _never(significand: Tensor, element: ElementFormat) -> Tensor:
    return torch.zeros_like(significand)


def _above_power_of_two(significand: Tensor, element: ElementFormat) -> Tensor:
    return significand > 0.5


def _rounds_up_to_power_of_two(significand: Tensor, element: ElementFormat) -> Tensor:
    return significand >= 1 - 2.0 ** -(element.mantissa_bits + 2)


def _above_largest_element(significand: Tensor, element: ElementFormat) -> Tensor:
    return significand > math.frexp(element.max)[0]


# Whether the exponent is one higher than floor's, by the rule.
_STEPS_UP: dict[ScaleRule, Callable[[Tensor, ElementFormat], Tensor]] = {
    "floor": _never,
    "ceil": _above_power_of_two,
    "even": _rounds_up_to_power_of_two,
    "rceil": _above_largest_element,
    "mase_int": _above_power_of_two,
    "mse": _never,
    "none": _never,
    "four_thirds": _never,
}


def block_scale(blocks: Tensor, amax: Tensor, exponent: Tensor, fmt: MXFormat) -> Tensor:
    """Return the scale of each block; NaN where the block has none; 0 where it is flushed."""
    scale = power_scale(exponent, fmt)
    if fmt.flush_fp32_subnorms:
        scale = torch.where(is_flushed(amax), 0.0, scale)
    return torch.where(has_no_power(blocks, amax, fmt), torch.nan, scale)


def is_flushed(amax: Tensor) -> Tensor:
    """Return which blocks become zero where subnormal numbers do."""
    return floor_log2(amax) <= -127


def has_no_power(blocks: Tensor, amax: Tensor, fmt: MXFormat) -> Tensor:
    """Return which blocks (..., 1) become NaN: they want a larger exponent than there is, or hold NaN or infinity."""
    return (unclamped_exponent(blocks, amax, fmt) > fmt.scale_emax) | ~amax.isfinite()


def power_scale(exponent: Tensor, fmt: MXFormat) -> Tensor:
    """Return 2^exponent as float32, or 4/3 of that under ``four_thirds``."""
    return exp2(exponent) * (4 / 3) if fmt.scale_rule == "four_thirds" else exp2(exponent)


# Scales that are floating-point numbers


def round_to_float_scale(blocks: Tensor, amax: Tensor, fmt: MXFormat, noise: Tensor | None) -> Tensor:
    """Round blocks (..., block) to elements times a floating-point scale.

    t is the scale of the tensor, T / (largest scale * largest element), T being its largest finite magnitude,
    but at least 2^-117; 1 where the format has none. s is the scale of the block: (amax / largest element) / t, rounded
    to the scale format, ties to even, and clamped to its positive values. An element is y, rounded and saturated, times
    t * s. With a scale of the tensor y = x * ((1 / t) / s), the arithmetic of NVFP4's kernels and of torchao (which
    raises s to 2^-6, the smallest normal number); without one y = x / s. Every operation is one of float32.
    """
    t = tensor_scale(blocks, fmt)
    s = torch.where(amax.isfinite(), held_scale(amax, t, fmt), torch.nan)
    return multiples_of_float(blocks, t, s, fmt, noise).mul_(t * s)


def multiples_of_float(blocks: Tensor, t: Tensor, s: Tensor, fmt: MXFormat, noise: Tensor | None) -> Tensor:
    """Return the elements of blocks (..., block) as multiples of t s, the scales of the tensor and of each block."""
    y = blocks * (t.reciprocal() / s) if fmt.scale_format.tensor_bits else blocks / s
    return round_to_element(y, fmt, noise)


def held_scale(amax: Tensor, tensor_scale: Tensor, fmt: MXFormat) -> Tensor:
    """Return the scale of each block, clamped to the positive values of its format."""
    return wanted_scale(amax, tensor_scale, fmt).clamp_(fmt.scale_grid.min, fmt.scale_grid.max)


def wanted_scale(amax: Tensor, tensor_scale: Tensor, fmt: MXFormat) -> Tensor:
    """Return the scale of each block on the grid of its format, before it is clamped to the positive values of that."""
    # Divided by tensors: by a number, torch multiplies with its rounded inverse on some devices.
    wanted = amax / torch.full_like(amax, fmt.element_format.max) / tensor_scale
    return round_to_grid(wanted, fmt.scale_grid, "even")


def tensor_scale(x: Tensor, fmt: MXFormat) -> Tensor:
    """Return the scale that all blocks of a float32 tensor share, of no dimension; 1 where the format has none."""
    if not fmt.scale_format.tensor_bits:
        return x.new_ones(())
    largest = torch.where(x.isfinite(), x, 0.0).abs().amax()
    scale = largest / torch.full_like(largest, fmt.element_format.max * fmt.scale_grid.max)
    return scale.clamp_(min=_SMALLEST_TENSOR_SCALE)


def out_of_range(blocks: Tensor, fmt: MXFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Of each block: whether it is neither zero, NaN nor infinite, and of these, whether it wants a smaller or a larger
    scale than there is."""
    amax = blocks.abs().amax(-1)
    counts = (amax > 0) & amax.isfinite()
    if fmt.scale_format.is_float:
        wanted = wanted_scale(amax, tensor_scale(blocks, fmt), fmt)
        return counts, counts & (wanted == 0), counts & (wanted > fmt.scale_grid.max)
    exponent = unclamped_exponent(blocks, amax, fmt)
    return counts, counts & (exponent < -fmt.scale_emax), counts & (exponent > fmt.scale_emax)


# Both


def scales(blocks: Tensor, fmt: MXFormat, dtype: torch.dtype) -> Tensor:
    """Return what the elements of each of (..., n_blocks, block) are multiples of: (..., n_blocks, 1), as float32.

    That of a block which becomes NaN, because it wants a larger one, is the largest there is. ``dtype`` is the
    tensor's, of which ``blocks`` holds the values as float32.
    """
    amax = blocks.abs().amax(-1, keepdim=True)
    if not fmt.scale_format.is_float:
        return power_scale(shared_exponent(blocks, amax, fmt, dtype), fmt)
    t = tensor_scale(blocks, fmt)
    return t * held_scale(amax, t, fmt)


# Elements


def round_to_element(y: Tensor, fmt: MXFormat, noise: Tensor | None) -> Tensor:
    """Round multiples of the scale to the element, and clamp them to its range. Overwrites ``y``."""
    return round_to_grid(y, fmt.grid, fmt.rounding, noise).clamp_(*fmt.limits)


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
    """Round float32 values to integers; magnitudes below 2^22. Overwrites ``v``."""
    if rounding == "nearest":
        return v.add_(torch.full_like(v, _HALF).copysign_(v)).trunc_()
    if rounding == "nearest_zero":
        magnitude = v.abs()
        rounded = magnitude.round()
        return rounded.sub_((rounded - magnitude == 0.5).to(v.dtype)).copysign_(v)  # less one for a tie that went up
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
