"""What the formats beside microscaling have in common: each is a family with parameters of its own."""

from __future__ import annotations

from dataclasses import fields
from typing import ClassVar

from mxlab.checks import check_int
from mxlab.formats.base import NumberFormat

MEAN_BITS = 32  # a mean of magnitudes is kept as a float32


class FormatFamily(NumberFormat):
    """A number format that is not microscaling.

    Attributes:
        family: the name the format is spelled with.
        width: storage of one element in bits.
    """

    family: ClassVar[str]
    width: int

    @property
    def element_bits(self) -> int:
        """Storage of one element in bits."""
        return self.width

    def __post_init__(self) -> None:
        defaults = {f.name: f.default for f in fields(self)}
        has_blocks = defaults.pop("block_size", None) is not None
        self._spell(f"{self.family}@{self.block_size}" if has_blocks else self.family, defaults)


class Biased(FormatFamily):
    """Formats with an exponent field; a ``bias`` of None is 2^(exponent_bits - 1) - 1."""

    exponent_bits: int
    bias: int | None

    def __post_init__(self) -> None:
        standard, high = 2 ** (self.exponent_bits - 1) - 1, max(127, 2**self.exponent_bits - 1)
        if self.bias is not None:
            check_int("bias", self.bias, -128, high, f"-128 to {high}; left out it is {standard}")
        if self.bias == standard:
            object.__setattr__(self, "bias", None)  # one spelling for one format
        super().__post_init__()

    @property
    def exponent_bias(self) -> int:
        """What is subtracted from the exponent field."""
        return 2 ** (self.exponent_bits - 1) - 1 if self.bias is None else self.bias

    @property
    def emin(self) -> int:
        """The smallest exponent."""
        return -self.exponent_bias

    @property
    def emax(self) -> int:
        """The largest exponent: no code is reserved."""
        return 2**self.exponent_bits - 1 - self.exponent_bias


def check_width(width: object, low: int) -> None:
    """Raise FormatError unless ``width`` is a number of bits from ``low`` to 32."""
    check_int("width", width, low, 32, f"{low} to 32 bits")


def check_exponent_bits(exponent_bits: object, high: int) -> None:
    """Raise FormatError unless ``exponent_bits`` is from 1 to ``high``, or to 8."""
    high = min(high, 8)
    check_int("exponent_bits", exponent_bits, 1, high, f"1 to {high}")
