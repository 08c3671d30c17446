"""Formats that treat every element alone: fixed point, minifloats, powers of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mxlab.checks import check_int
from mxlab.formats.family import Biased, FormatFamily, check_exponent_bits, check_width


@dataclass(frozen=True)
class Integer(FormatFamily):
    """Fixed point: two's complement with ``width`` bits, ``frac`` of them behind the binary point.

    clamp(round(x·2^frac), -2^(width-1), 2^(width-1) - 1) / 2^frac
    """

    family: ClassVar[str] = "integer"
    width: int
    frac: int

    def __post_init__(self) -> None:
        check_width(self.width, 2)
        check_int("frac", self.frac, -64, 64, "-64 to 64")
        super().__post_init__()


@dataclass(frozen=True)
class MinifloatDenorm(Biased):
    """A small float without a leading bit: m = width - exponent_bits - 1 fraction bits, all behind the point.

    E = clamp(ceil(log2|x|), -bias, 2^exponent_bits - 1 - bias);
    the result is sign(x)·2^E·clamp(round(|x|/2^E·2^m), 0, 2^m - 1) / 2^m.

    A fraction that rounds up to 1 is held at 1 - 2^-m. So a power of two 2^k becomes 2^k·(1 - 2^-m), and rounding a
    second time can move a result that is one. The largest magnitude is 2^emax·(1 - 2^-m), the smallest 2^(emin - m).
    """

    family: ClassVar[str] = "minifloat_denorm"
    width: int
    exponent_bits: int
    bias: int | None = None

    def __post_init__(self) -> None:
        check_width(self.width, 3)
        check_exponent_bits(self.exponent_bits, self.width - 2)
        super().__post_init__()

    @property
    def mantissa_bits(self) -> int:
        """Bits of the fraction."""
        return self.width - self.exponent_bits - 1


@dataclass(frozen=True)
class MinifloatIEEE(Biased):
    """A small float with normal and subnormal numbers as in IEEE 754, but no codes for infinities and NaN.

    m = width - exponent_bits - 1, emin = 1 - bias, emax = 2^exponent_bits - 1 - bias,
    E = clamp(floor(log2|x|), emin, emax);
    the result is sign(x)·2^E·min(round(|x|/2^E·2^m), L) / 2^m with L = 2^(m+1) - 1, but L = 2^m - 1 where |x| < 2^emin.

    So a mantissa that rounding would carry into the next binade is held at its largest, in every binade, and subnormal
    numbers stay subnormal. In this it differs from rounding to the nearest number of the grid.
    """

    family: ClassVar[str] = "minifloat_ieee"
    width: int
    exponent_bits: int
    bias: int | None = None

    def __post_init__(self) -> None:
        check_width(self.width, 2)
        check_exponent_bits(self.exponent_bits, self.width - 1)
        super().__post_init__()

    @property
    def mantissa_bits(self) -> int:
        """Bits of the mantissa, the implicit leading bit not counted."""
        return self.width - self.exponent_bits - 1

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number."""
        return 1 - self.exponent_bias


@dataclass(frozen=True)
class Log(Biased):
    """Signed powers of two: a sign and an exponent of width - 1 bits.

    The result is sign(x)·2^clamp(round(log2|x|), -bias, 2^(width-1) - 1 - bias).

    There is no code for zero: it becomes the smallest magnitude, with a plus sign. log2|x| is never halfway between two
    integers, as the square root of two is irrational; which of them is nearer is read off the bits, exactly.

    Source: Miyashita, Lee, Murmann, "Convolutional neural networks using logarithmic data representation", 2016.
    """

    family: ClassVar[str] = "log"
    width: int
    bias: int | None = None

    def __post_init__(self) -> None:
        check_width(self.width, 2)
        super().__post_init__()

    @property
    def exponent_bits(self) -> int:
        """Bits of the exponent: all but the sign."""
        return self.width - 1
