"""The ``microxcaling`` numerics: what microsoft/microxcaling computes with ``custom_cuda=False``, bit for bit.

Published results made with that path differ measurably from the specification, so its two defects are reproduced, not
fixed. It takes exponents as floor(log2 x) with log2 rounded to the tensor's dtype, which promotes the values just
below a power of two; and every operation rounds to the tensor's dtype, which turns ``|v| + 0.5`` into a tie wherever
the dtype has no bit left for the half.

The exponents come from integers (:func:`_promotion`), so that the bits do not depend on a device's log2.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mxlab.errors import FormatError
from mxlab.formats import MICROXCALING_ROUNDINGS, ElementFormat, MXFormat, Rounding
from mxlab.numerics import philox
from mxlab.numerics.blocks import exp2, floor_log2
from mxlab.numerics.reference import block_layout

# For a = e if e >= 0 else -e - 1 in 0-1, 2-3, 4-7, ...: how many of the largest mantissas of the binade 2^e have a
# log2 that rounds to e + 1. Counted in units of the dtype's last mantissa bit.
_PROMOTED = {
    torch.float32: (0, 1, 2, 5, 11, 22, 44, 88),
    torch.float16: (0, 1, 2, 5, 11, 22, 44, 88),
    torch.bfloat16: (0, 1, 2, 5, 10, 21, 40, 74),
}
_MANTISSA_BITS = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
# float16 has no 2^-126: what the emulator adds to an all-zero block to keep log2 finite vanishes there, and the
# exponent is minus infinity. Any exponent below every clamp serves.
_NO_EXPONENT = -(2**20)


def quantize(x: Tensor, fmt: MXFormat, axes: tuple[int, ...], seed: int) -> Tensor:
    """Round ``x`` to ``fmt`` in blocks along ``axes`` (non-negative); same shape and dtype, contiguous.

    Raises:
        FormatError: as :func:`check`.
    """
    element = fmt.element_format
    check(fmt, x.dtype)
    cut = block_layout(x, fmt, axes)
    blocks = cut.split(x)  # (..., n_blocks, block)
    amax = blocks.abs().amax(-1, keepdim=True)  # (..., n_blocks, 1)
    exponent = shared_exponent(amax)
    if fmt.flush_fp32_subnorms:
        blocks = blocks * (exponent > -127).to(x.dtype)
    exponent = exponent - element.emax
    scale = exp2(exponent.clamp(min=-fmt.scale_emax))
    scale = torch.where((exponent > fmt.scale_emax) | ~amax.isfinite(), torch.nan, scale).to(x.dtype)
    noise = cut.split(_noise(x, seed)) if fmt.rounding == "dither" else None
    y = blocks / scale
    rounded = round_to_grid(y, element, fmt.rounding, noise).clamp_(-element.max, element.max)
    rounded = torch.where(y.isinf(), y, rounded)
    return cut.join(rounded * scale)


def round_elementwise(x: Tensor, element: ElementFormat, rounding: Rounding, subnormals: bool, seed: int) -> Tensor:
    """Return each value rounded to ``element`` on its own; what overflows becomes infinite, NaN and infinities stay."""
    y = x if subnormals else x * (x.abs() >= element.min_normal).to(x.dtype)
    noise = _noise(x, seed) if rounding == "dither" else None
    rounded = round_to_grid(y, element, rounding, noise)
    rounded = torch.where(rounded.abs() > element.max, rounded.sign() * torch.inf, rounded)
    return torch.where(x.isinf(), x, rounded)


def check(fmt: MXFormat, dtype: torch.dtype) -> None:
    """Refuse formats that the emulator does not have.

    Raises:
        FormatError: another scale than e8m0, another rule than floor and none, another rounding than the emulator's, or
            elements whose largest value is too large for ``dtype``, which the emulator computes in (bf16 elements in
            float16).
    """
    check_rounding(fmt.rounding)
    if fmt.scale_rule not in ("floor", "none"):
        raise FormatError(
            f"{fmt}: microxcaling knows the scale e8m0 with the rules floor and none only; choose numerics='exact'"
        )
    element = fmt.element_format
    if element.max > torch.finfo(dtype).max:
        raise FormatError(f"{element} elements reach {element.max:g}, too large for {dtype}: use bfloat16 or float32")


def check_rounding(rounding: str) -> None:
    """Raise FormatError for a rounding that the emulator does not have."""
    if rounding not in MICROXCALING_ROUNDINGS:
        raise FormatError(
            f"rounding is {rounding!r}: microxcaling knows {', '.join(MICROXCALING_ROUNDINGS)}; choose numerics='exact'"
        )


def shared_exponent(amax: Tensor) -> Tensor:
    """Return floor(log2 amax) as the emulator computes it, before the element's emax is taken off; int32."""
    x = amax.to(torch.float32)
    exponent = floor_log2(x)
    mantissa = torch.frexp(x).mantissa  # in [0.5, 1)
    step = 2.0 ** -(_MANTISSA_BITS[amax.dtype] + 1)
    promoted = mantissa >= 1 - step * _promotion_of(exponent, amax.dtype)
    exponent = torch.where(promoted, exponent + 1, exponent)
    if amax.dtype == torch.float16:
        exponent = torch.where(x == 0, _NO_EXPONENT, exponent)
    return exponent


def round_to_grid(y: Tensor, element: ElementFormat, rounding: Rounding, noise: Tensor | None) -> Tensor:
    """Round values to the grid of ``element``, each step in the dtype of ``y``; a new tensor."""
    steps = 2.0**element.mantissa_bits
    if element.is_int:
        return round_to_integer(y * steps, rounding, noise).div_(steps)
    binade = _binade(y, element)
    return round_to_integer((y / binade).mul_(steps), rounding, noise).div_(steps).mul_(binade)


def round_to_integer(v: Tensor, rounding: Rounding, noise: Tensor | None) -> Tensor:
    """Return sign(v) times |v| rounded to an integer, in the dtype of ``v``; sign(-0) is +0."""
    magnitude = v.abs()
    if rounding == "nearest":
        integer = (magnitude + 0.5).floor_()
    elif rounding == "even":
        tie = ((magnitude - 0.5) % 2 == 0).to(v.dtype)
        integer = (magnitude + 0.5).floor_().sub_(tie)
    elif rounding == "floor":
        integer = magnitude.floor_()
    else:
        assert noise is not None  # rounding == "dither"
        integer = (magnitude + noise).floor_()
    return integer.mul_(v.sign())


def _noise(x: Tensor, seed: int) -> Tensor:
    """Uniform numbers in [0, 1) in the dtype of ``x``, as torch.rand_like draws them: never rounded up to 1."""
    steps = 2.0 ** (_MANTISSA_BITS[x.dtype] + 1)
    return (philox.uniform(x.shape, seed, x.device) * steps).floor_().div_(steps).to(x.dtype)


def _binade(y: Tensor, element: ElementFormat) -> Tensor:
    """Return 2^e in the dtype of ``y``, e the emulator's exponent of each element, at least emin."""
    if y.element_size() > 2:
        return _binade_of_bits(y.view(torch.int32) & 0x7FFFFFFF, y.dtype, element)
    index = (y.view(torch.int16) & 0x7FFF).to(torch.int32)
    return _binade_table(y.dtype, element, y.device).index_select(0, index.flatten()).view(y.shape)


@functools.cache
def _binade_table(dtype: torch.dtype, element: ElementFormat, device: torch.device) -> Tensor:
    """Return the binade of every magnitude of a 16-bit dtype: looking it up is ten times faster than finding it."""
    magnitudes = torch.arange(2**15, dtype=torch.int16, device=device).view(dtype)
    return _binade_of_bits(magnitudes.to(torch.float32).view(torch.int32), dtype, element)


def _binade_of_bits(bits: Tensor, dtype: torch.dtype, element: ElementFormat) -> Tensor:
    """Return the same as :func:`_binade`, from the bits of the magnitudes as float32."""
    field = bits >> 23
    # A promoted mantissa carries into the exponent field. Subnormals land below every emin either way.
    carry = _carry(dtype, bits.device).index_select(0, field.flatten()).view(bits.shape)
    exponent = ((bits + carry) >> 23) - 127
    exponent = torch.where(bits == 0, 0, exponent).clamp_(min=element.emin)
    return exp2(exponent).to(dtype)


def _promotion_of(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Return how many top mantissas of the binade 2^exponent are promoted, as float32."""
    distance = torch.where(exponent >= 0, exponent, -exponent - 1).clamp(0, 255)
    return _promotion(dtype, exponent.device)[distance]


@functools.cache
def _promotion(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the row of ``_PROMOTED`` spread over a = 0..255, float32."""
    counts = [_PROMOTED[dtype][max(a.bit_length() - 1, 0)] for a in range(256)]
    return torch.tensor(counts, dtype=torch.float32, device=device)


@functools.cache
def _carry(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return, for each float32 exponent field, what to add to the bits so that promoted mantissas carry; int32."""
    exponents = torch.arange(256, device=device) - 127
    return (_promotion_of(exponents, dtype) * 2.0 ** (23 - _MANTISSA_BITS[dtype])).to(torch.int32)
