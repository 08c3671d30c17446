"""What the formats of :mod:`mxlab.formats` compute, in eager torch, on every device that has float64.

Their docstrings have the formulas and the sources; here is one function for each. All work on float64 tensors
(..., block) that hold float32 numbers: float64 scales them by powers of two, rounds and compares them exactly, and its
sums are so close that a mean, kept as a float32, hardly ever depends on the order of summation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxlab.formats import (
    Binary,
    BlockFP,
    BlockLog,
    BlockMinifloat,
    FormatFamily,
    Integer,
    Log,
    MinifloatDenorm,
    MinifloatIEEE,
    ResidualBinary,
    Ternary,
)
from mxlab.numerics import philox
from mxlab.numerics.blocks import Blocks, saturated

_BEYOND = 2.0**500  # for infinity: above the range of every format, and safe to scale
_EXPONENT = 0x7FF << 52  # the exponent field of a float64, above 52 mantissa bits
_SQRT2 = 0x6A09E667F3BCC  # the mantissa bits of the square root of two, rounded down


def quantize(x: Tensor, fmt: FormatFamily, axes: tuple[int, ...], seed: int) -> Tensor:
    """Round ``x`` to ``fmt``, its blocks along ``axes`` (non-negative); same shape and dtype, contiguous."""
    cut = Blocks(tuple(x.shape), axes, fmt.block_size)
    blocks = cut.split(x.to(torch.float64))  # (rest..., n_blocks, block)
    lost = ~_amax(blocks).isfinite() if fmt.shared_bits else blocks.isnan()
    noise = cut.split(philox.uniform(x.shape, seed, x.device)) if fmt.is_random else None
    y = _compute(blocks.clamp_(-_BEYOND, _BEYOND), fmt, noise)
    y = y.add_(0.0).masked_fill_(lost, torch.nan)  # a zero result is +0
    return cut.join(saturated(y, x.dtype)).to(x.dtype)


def _compute(x: Tensor, fmt: FormatFamily, noise: Tensor | None) -> Tensor:
    match fmt:
        case Integer():
            return integer(x, fmt.width, fmt.frac)
        case MinifloatDenorm():
            return minifloat_denorm(x, fmt.mantissa_bits, _two_to(fmt.emin), _two_to(fmt.emax))
        case MinifloatIEEE():
            return minifloat_ieee(x, fmt.mantissa_bits, _two_to(fmt.emin), _two_to(fmt.emax))
        case Log():
            return log(x, _two_to(fmt.emin), _two_to(fmt.emax))
        case BlockFP():
            return block_fp(x, fmt.mantissa_bits, _two_to(fmt.emin), _two_to(fmt.emax))
        case BlockMinifloat():
            return block_minifloat(x, fmt.exponent_bits, fmt.mantissa_bits, fmt.bias_limits)
        case BlockLog():
            return block_log(x, fmt.exponent_bits, fmt.bias_limits)
        case Binary():
            return binary(x, fmt.scaled, noise)
        case ResidualBinary():
            return binary_residual(x, fmt.levels)
        case Ternary():
            return ternary(x)
    raise NotImplementedError(f"{fmt!r} has no function here")


# One function for each family. ``lowest`` and ``highest`` are powers of two, of all elements or of each block (..., 1).


def integer(x: Tensor, width: int, frac: int) -> Tensor:
    """Round to fixed point with ``frac`` bits behind the point."""
    return (x * 2.0**frac).round_().clamp_(-(2 ** (width - 1)), 2 ** (width - 1) - 1).mul_(2.0**-frac)


def minifloat_denorm(x: Tensor, mantissa_bits: int, lowest: float, highest: float) -> Tensor:
    """Return a fraction below 1 times a power of two of the element's own."""
    return _fraction(x, power_above(x.abs()).clamp_(lowest, highest), mantissa_bits)


def minifloat_ieee(x: Tensor, mantissa_bits: int, lowest: float | Tensor, highest: float | Tensor) -> Tensor:
    """Normal numbers from ``lowest`` on and subnormal ones below it; ``highest`` is the power of the largest."""
    magnitude, whole = x.abs(), 2.0**mantissa_bits
    binade = _clamp(power_below(magnitude), lowest, highest)
    steps = (magnitude / binade).mul_(whole).round_().clamp_(max=2 * whole - 1)
    steps = torch.where(magnitude < lowest, steps.clamp(max=whole - 1), steps)
    return steps.mul_(binade).mul_(1 / whole).copysign_(x)


def log(x: Tensor, lowest: float | Tensor, highest: float | Tensor) -> Tensor:
    """Return the power of two that is nearest in the exponent."""
    return _clamp(power_near(x.abs()), lowest, highest).mul_(_sign(x))


def block_fp(x: Tensor, mantissa_bits: int, lowest: float, highest: float) -> Tensor:
    """Return a fraction below 1 times a power of two that the block shares."""
    return _fraction(x, power_above(_amax(x)).clamp_(lowest, highest), mantissa_bits)


def block_minifloat(x: Tensor, exponent_bits: int, mantissa_bits: int, bias_limits: tuple[int, int]) -> Tensor:
    """Round as :func:`minifloat_ieee`, whose top binade is that of the block's largest magnitude."""
    bias = _shared_bias(power_below(_amax(x)), exponent_bits, bias_limits)
    return minifloat_ieee(x, mantissa_bits, exp2(1 - bias), exp2(2**exponent_bits - 1 - bias))


def block_log(x: Tensor, exponent_bits: int, bias_limits: tuple[int, int]) -> Tensor:
    """Round as :func:`log`, whose top code is that of the block's largest magnitude."""
    bias = _shared_bias(power_near(_amax(x)), exponent_bits, bias_limits)
    return log(x, exp2(-bias), exp2(2**exponent_bits - 1 - bias))


def binary(x: Tensor, scaled: bool, noise: Tensor | None) -> Tensor:
    """Return signs, or with ``noise`` in [0, 1) drawn signs, times the mean magnitude if ``scaled``."""
    scale = _mean(x.abs()) if scaled else x.new_ones(())
    if noise is None:
        return _sign(x).mul_(scale)
    # noise < (x / scale + 1) / 2, without a division or a sum that would round
    return torch.where(scale * (2 * noise.to(x.dtype) - 1) < x, scale, -scale)


def binary_residual(x: Tensor, levels: int) -> Tensor:
    """Return the sum of ``levels`` scaled signs, each of what is left."""
    rest, y = x, torch.zeros_like(x)
    for _ in range(levels):
        term = _sign(rest).mul_(_mean(rest.abs()))
        rest, y = rest - term, y.add_(term)
    return y


def ternary(x: Tensor) -> Tensor:
    """Return zero up to 0.75 of the mean magnitude, above it the mean of the magnitudes that are."""
    magnitude = x.abs()
    above = magnitude > 0.75 * magnitude.mean(-1, keepdim=True)
    total, count = (magnitude * above).sum(-1, keepdim=True), above.sum(-1, keepdim=True)
    return _sign(x).mul_(above).mul_(_as_float32(total / count.clamp(min=1)))


# Powers of two, from the bits of non-negative float64 values; of zero they are 0.


def power_below(x: Tensor) -> Tensor:
    """Return 2^floor(log2 x)."""
    return (x.view(torch.int64) & _EXPONENT).view(torch.float64)


def power_above(x: Tensor) -> Tensor:
    """Return 2^ceil(log2 x): any mantissa but 0 carries into the exponent."""
    return ((x.view(torch.int64) + (2**52 - 1)) & _EXPONENT).view(torch.float64)


def power_near(x: Tensor) -> Tensor:
    """Return 2^round(log2 x): a mantissa above that of the square root of two carries into the exponent."""
    return ((x.view(torch.int64) + (2**52 - 1 - _SQRT2)) & _EXPONENT).view(torch.float64)


def exp2(exponent: Tensor) -> Tensor:
    """Return 2^exponent as float64 for int64 exponents; 0 below -1022, 2^1023 from 1023 on."""
    return ((exponent + 1023).clamp(0, 2046) << 52).view(torch.float64)


def _two_to(exponent: int) -> float:
    return 2.0 ** max(-1074, min(exponent, 1023))


def _shared_bias(binade: Tensor, exponent_bits: int, limits: tuple[int, int]) -> Tensor:
    """Return the bias with which the largest exponent is that of ``binade``, as int64."""
    exponent = (binade.view(torch.int64) >> 52) - 1023
    return (2**exponent_bits - 1 - exponent).clamp(*limits)


def _fraction(x: Tensor, binade: Tensor, bits: int) -> Tensor:
    steps = (x.abs() / binade).mul_(2.0**bits).round_().clamp_(max=2.0**bits - 1)
    return steps.mul_(binade).mul_(2.0**-bits).copysign_(x)


def _clamp(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    return x.clamp_(low, high)  # pyright: ignore[reportArgumentType, reportCallIssue]: two numbers or two tensors


def _amax(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True)


def _mean(magnitude: Tensor) -> Tensor:
    return _as_float32(magnitude.mean(-1, keepdim=True))


def _as_float32(x: Tensor) -> Tensor:
    return x.to(torch.float32).to(torch.float64)


def _sign(x: Tensor) -> Tensor:
    """Return 1, of zero too, or -1."""
    return torch.ones_like(x).copysign_(x + 0.0)
