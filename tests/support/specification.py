"""The ``exact`` numerics in exact arithmetic, written from the specification; it shares no code with mxlab."""

import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from mxlab.formats import MXFormat, element
from mxlab.numerics import philox

# Every format there is: name -> exponent bits, mantissa bits, bias, emax, largest. Not taken from mxlab.
FACTS = {
    "fp8_e5m2": (5, 2, 15, 15, Fraction(57344)),
    "fp8_e4m3": (4, 3, 7, 8, Fraction(448)),
    "fp16": (5, 10, 15, 15, Fraction(65504)),
    "bf16": (8, 7, 127, 127, Fraction(255) * 2**120),
}
for b in range(2, 9):
    FACTS[f"int{b}"] = (0, b - 2, 0, 0, 2 - Fraction(1, 2 ** (b - 2)))
for n in range(2, 9):
    for x in range(1, n):
        m, bias = n - 1 - x, 2 ** (x - 1) - 1
        FACTS.setdefault(
            f"fp{n}_e{x}m{m}",
            (x, m, bias, 2**x - 1 - bias, (2 - Fraction(1, 2**m)) * Fraction(2) ** (2**x - 1 - bias)),
        )
SEED = 20240611


def grid_points(name: str) -> np.ndarray:
    """All codes and all midpoints of an element format, their float32 neighbours, and both signs."""
    codes = np.array(element(name).magnitudes(), np.float64)
    # Beyond the largest code to the end of its binade, where everything must saturate.
    above = np.linspace(codes[-1], 2.0 ** (element(name).emax + 1), 9)[:-1]
    exact = np.concatenate([codes, (codes[1:] + codes[:-1]) / 2, above]).astype(np.float32)
    near = [exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))]
    points = np.unique(np.concatenate(near))
    points = points[np.abs(points).astype(np.float64) < 2.0 ** (element(name).emax + 1)]
    return np.unique(np.concatenate([points, -points]))


# The specification in exact arithmetic


def floor_log2(x: Fraction) -> int:
    """floor(log2 x) by counting, for x > 0."""
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if Fraction(2) ** guess <= x else guess - 1


def to_integer(v: Fraction, rounding: str, u: Fraction) -> int:
    """Step 5: a number that is not negative to an integer."""
    whole = v.numerator // v.denominator
    rest = v - whole
    if rounding == "nearest":
        return whole + (rest >= Fraction(1, 2))
    if rounding == "nearest_zero":
        return whole + (rest > Fraction(1, 2))
    if rounding == "even":
        return whole + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1))
    if rounding == "floor":
        return whole
    return whole + (rest + u >= 1)


def to_step(q: Fraction, fmt: MXFormat, u: Fraction) -> Fraction:
    """Steps 4 and 5: a number that is not negative to the grid of the element."""
    exponent_bits, mantissa_bits, bias, *_ = FACTS[fmt.element]
    if fmt.scale_rule == "mase_int":
        step = Fraction(1, 2 ** (mantissa_bits + 1))
    elif exponent_bits == 0:
        step = Fraction(1, 2**mantissa_bits)
    else:
        binade = max(floor_log2(q), 1 - bias) if q else 1 - bias
        step = Fraction(2) ** (binade - mantissa_bits)
    return to_integer(q / step, fmt.rounding, u) * step


def to_element(x: Fraction, fmt: MXFormat, u: Fraction) -> Fraction:
    """A multiple of the scale rounded to an element."""
    rounded = to_step(abs(x), fmt, u) * (-1 if x < 0 else 1)
    largest = FACTS[fmt.element][4]
    if fmt.scale_rule == "mase_int":
        return max(min(rounded, 1 - Fraction(1, 2 ** (FACTS[fmt.element][1] + 1))), Fraction(-1))
    return max(min(rounded, largest), -largest)


def ceil_log2(x: Fraction) -> int:
    return floor_log2(x) + (Fraction(2) ** floor_log2(x) != x)


def wanted_exponent(amax: Fraction, fmt: MXFormat) -> int:
    """SEMANTICS of the scale rules: the shared exponent, not held to any range; of mse, the lower one."""
    _, mantissa_bits, _, emax, largest = FACTS[fmt.element]
    if amax == 0:
        return -126 - emax
    if fmt.scale_rule in ("ceil", "mase_int"):  # emax is 0 where mase_int is possible
        return ceil_log2(amax) - emax
    if fmt.scale_rule == "rceil":
        return ceil_log2(amax / largest)
    if fmt.scale_rule == "even":
        unit = Fraction(2) ** (floor_log2(amax) - mantissa_bits)
        amax = (amax / unit + Fraction(1, 2)).__floor__() * unit
    return floor_log2(amax) - emax


def at_exponent(xs: list[float], fmt: MXFormat, us: list[float], exponent: int, largest: float) -> list[float]:
    scale, end = Fraction(2) ** exponent, Fraction(largest)
    exact = [to_element(Fraction(x) / scale, fmt, Fraction(u)) * scale for x, u in zip(xs, us, strict=True)]
    exact = [max(-end, min(x, end)) for x in exact]
    results = [float(x) for x in exact]
    assert list(map(Fraction, results)) == exact
    return results


def squared_error(xs: list[float], results: list[float]) -> np.float32:
    total = np.float32(0)
    with np.errstate(over="ignore", under="ignore"):
        for x, q in zip(xs, results, strict=True):
            total += (np.float32(x) - np.float32(q)) * (np.float32(x) - np.float32(q))
    return total


def spec_block(xs: list[float], fmt: MXFormat, us: list[float], largest: float) -> list[float]:
    """One block by the OCP specification, steps 1 to 6, in exact arithmetic; ``largest`` is where results saturate."""
    if not all(map(math.isfinite, xs)):
        return [math.nan] * len(xs)
    amax = max(abs(Fraction(x)) for x in xs)
    if fmt.flush_fp32_subnorms and 0 < amax < Fraction(2) ** -126:
        return [0.0] * len(xs)
    s = wanted_exponent(amax, fmt)
    limit = 2 ** ((fmt.scale_bits or 8) - 1) - 1
    if s > limit:
        return [math.nan] * len(xs)
    s = max(s, -limit)
    results = at_exponent(xs, fmt, us, s, largest)
    if fmt.scale_rule == "mse" and s < limit:
        others = at_exponent(xs, fmt, us, s + 1, largest)
        return others if squared_error(xs, others) < squared_error(xs, results) else results
    return results


def spec(x: Tensor, fmt: MXFormat, seed: int = SEED) -> Tensor:
    """A 2-D tensor, blocks along the last axis, by :func:`spec_block`."""
    us = philox.uniform(x.shape, seed, x.device).tolist() if fmt.rounding == "dither" else None
    rows, largest = [], torch.finfo(x.dtype).max
    for i, row in enumerate(x.tolist()):
        rows.append([])
        for start in range(0, len(row), fmt.block_size or len(row)):
            part = slice(start, start + (fmt.block_size or len(row)))
            rows[-1] += spec_block(row[part], fmt, us[i][part] if us else [0.0] * len(row[part]), largest)
    return torch.tensor(rows, dtype=torch.float32).to(x.dtype)
