"""What the docstrings of mxlab.formats say, in plain Python on fractions: the oracle of test_quantizer_numerics."""

from fractions import Fraction
from math import inf, isfinite, isnan, nan

import torch

from mxlab import formats as q


def quantized(values: list[float], fmt: q.FormatFamily, noise: list[Fraction] | None = None) -> list[float]:
    """One axis of values, cut into blocks and rounded; ``noise`` is one number in [0, 1) for each."""
    size = fmt.block_size or len(values)
    out: list[float] = []
    for start in range(0, len(values), size):
        piece = slice(start, start + size)
        out += one_block(values[piece], fmt, noise[piece] if noise else None)
    return out


def one_block(values: list[float], fmt: q.FormatFamily, noise: list[Fraction] | None) -> list[float]:
    if fmt.shared_bits and not all(map(isfinite, values)):
        return [nan] * len(values)
    finite = [Fraction(v) if isfinite(v) else Fraction(2) ** 999 * (-1 if v < 0 else 1) for v in values]
    rounded = FUNCTIONS[type(fmt)](finite, fmt) if noise is None else drawn(finite, fmt, noise)
    return [nan if isnan(v) else as_float(y) for v, y in zip(values, rounded, strict=True)]


def as_float(y: Fraction) -> float:
    try:
        return float(y)
    except OverflowError:
        return inf if y > 0 else -inf


def two(e: int) -> Fraction:
    return Fraction(2) ** max(min(e, 2000), -2000)  # no farther than any value of a test


def floor_log2(x: Fraction) -> int:
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if two(e) <= x else e - 1


def ceil_log2(x: Fraction) -> int:
    e = floor_log2(x)
    return e if two(e) == x else e + 1


def nearest_log2(x: Fraction) -> int:
    e = floor_log2(x)
    return e + (x * x > two(2 * e + 1))


def clamp(v, low, high):
    return max(low, min(v, high))


def sign(x: Fraction) -> int:
    return 1 if x >= 0 else -1


def bias_of(fmt, exponent_bits: int) -> int:
    return 2 ** (exponent_bits - 1) - 1 if fmt.bias is None else fmt.bias


def integer(xs, fmt: q.Integer):
    w = fmt.width
    return [clamp(round(x * two(fmt.frac)), -(2 ** (w - 1)), 2 ** (w - 1) - 1) / two(fmt.frac) for x in xs]


def fraction(x: Fraction, e: int, m: int) -> Fraction:
    return sign(x) * two(e) * clamp(round(abs(x) / two(e) * 2**m), 0, 2**m - 1) / 2**m


def minifloat_denorm(xs, fmt: q.MinifloatDenorm):
    n, m = fmt.exponent_bits, fmt.width - fmt.exponent_bits - 1
    low, high = -bias_of(fmt, n), 2**n - 1 - bias_of(fmt, n)
    return [fraction(x, clamp(ceil_log2(abs(x)), low, high) if x else low, m) for x in xs]


def ieee(x: Fraction, n: int, m: int, bias: int) -> Fraction:
    low, high = 1 - bias, 2**n - 1 - bias
    e = clamp(floor_log2(abs(x)), low, high) if x else low
    largest = 2**m - 1 if abs(x) < two(low) else 2 ** (m + 1) - 1
    return sign(x) * two(e) * min(round(abs(x) / two(e) * 2**m), largest) / 2**m


def minifloat_ieee(xs, fmt: q.MinifloatIEEE):
    n = fmt.exponent_bits
    return [ieee(x, n, fmt.width - n - 1, bias_of(fmt, n)) for x in xs]


def power(x: Fraction, n: int, bias: int) -> Fraction:
    return sign(x) * two(clamp(nearest_log2(abs(x)), -bias, 2**n - 1 - bias) if x else -bias)


def log(xs, fmt: q.Log):
    return [power(x, fmt.width - 1, bias_of(fmt, fmt.width - 1)) for x in xs]


def block_fp(xs, fmt: q.BlockFP):
    n, largest = fmt.exponent_bits, max(map(abs, xs))
    low, high = -bias_of(fmt, n), 2**n - 1 - bias_of(fmt, n)
    e = clamp(ceil_log2(largest), low, high) if largest else low
    return [fraction(x, e, fmt.width - 1) for x in xs]


def shared_bias(wanted: int | None, bits: int) -> int:
    high = 2 ** (bits - 1) - 1
    return high if wanted is None else clamp(wanted, -(2 ** (bits - 1)), high)


def block_minifloat(xs, fmt: q.BlockMinifloat):
    n, largest = fmt.exponent_bits, max(map(abs, xs))
    bias = shared_bias(2**n - 1 - floor_log2(largest) if largest else None, fmt.bias_bits)
    return [ieee(x, n, fmt.width - n - 1, bias) for x in xs]


def block_log(xs, fmt: q.BlockLog):
    n, largest = fmt.width - 1, max(map(abs, xs))
    bias = shared_bias(2**n - 1 - nearest_log2(largest) if largest else None, fmt.bias_bits)
    return [power(x, n, bias) for x in xs]


def float32(x: Fraction) -> Fraction:
    return Fraction(torch.tensor(float(x), dtype=torch.float64).float().item())


def mean(xs) -> Fraction:
    return sum(xs, Fraction(0)) / len(xs)


def binary(xs, fmt: q.Binary):
    a = float32(mean([abs(x) for x in xs])) if fmt.scaled else Fraction(1)
    return [a * sign(x) for x in xs]


def drawn(xs, fmt: q.Binary, noise):
    a = float32(mean([abs(x) for x in xs])) if fmt.scaled else Fraction(1)
    chances = [clamp((x / a + 1) / 2, 0, 1) if a else Fraction(0) for x in xs]
    return [a if u < chance else -a for u, chance in zip(noise, chances, strict=True)]


def binary_residual(xs, fmt: q.ResidualBinary):
    rest, total = list(xs), [Fraction(0)] * len(xs)
    for _ in range(fmt.levels):
        a = float32(mean([abs(r) for r in rest]))
        total = [t + a * sign(r) for t, r in zip(total, rest, strict=True)]
        rest = [r - a * sign(r) for r in rest]
    return total


def ternary(xs, fmt: q.Ternary):
    threshold = Fraction(3, 4) * mean([abs(x) for x in xs])
    above = [abs(x) for x in xs if abs(x) > threshold]
    a = float32(mean(above)) if above else Fraction(0)
    return [a * sign(x) if abs(x) > threshold else Fraction(0) for x in xs]


FUNCTIONS = {
    q.Integer: integer,
    q.MinifloatDenorm: minifloat_denorm,
    q.MinifloatIEEE: minifloat_ieee,
    q.Log: log,
    q.BlockFP: block_fp,
    q.BlockMinifloat: block_minifloat,
    q.BlockLog: block_log,
    q.Binary: binary,
    q.ResidualBinary: binary_residual,
    q.Ternary: ternary,
}
