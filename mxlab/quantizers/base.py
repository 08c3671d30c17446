"""What the quantizers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, fields
from math import prod
from typing import Any, ClassVar

from mxlab.errors import FormatError
from mxlab.formats import check_int

MEAN_BITS = 32  # a mean of magnitudes is kept as a float32


class Quantizer:
    """A number format that is not microscaling: the base of the classes below.

    Attributes:
        family: the name the format is spelled with.
        width: storage of one element in bits.
        block_size: elements that share something, along the quantized axis: 1, every element alone; 0, the whole axis.
        shared_bits: storage in bits of what the elements of one block share.
        is_random: whether the result depends on a seed.

    Raises:
        FormatError: a parameter out of range; the message names it and what it may be.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # every family is a dataclass
    family: ClassVar[str]
    width: int
    block_size: int = 1
    shared_bits: int = 0
    is_random: bool = False
    _text: str

    @property
    def bits_per_element(self) -> float:
        """Storage of one element in bits, with its part of what is shared; that of a whole axis is not counted."""
        return self.width + (self.shared_bits / self.block_size if self.block_size else 0.0)

    def storage_bits(self, shape: Sequence[int]) -> int:
        """Storage of a tensor in bits, blocks along its last axis: its elements, and what each block shares.

        Raises:
            FormatError: a shape without an axis.
        """
        if not shape:
            raise FormatError("a 0-dimensional tensor has no axis to quantize along: reshape it to (1,)")
        *rows, length = shape
        blocks = -(-length // self.block_size) if self.block_size else min(length, 1)
        return prod(rows) * (length * self.width + blocks * self.shared_bits)

    def __str__(self) -> str:
        return self._text

    def __post_init__(self) -> None:
        # Derived once: the spelling is what the operators know the format by.
        options = fields(self)
        given = [f.name for f in options if f.name != "block_size" and getattr(self, f.name) != f.default]
        head = f"{self.family}@{self.block_size}" if "block_size" in {f.name for f in options} else self.family
        text = ",".join([head, *(f"{name}={str(getattr(self, name)).lower()}" for name in given)])
        object.__setattr__(self, "_text", text)


class Biased(Quantizer):
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


def check_block_size(block_size: object) -> None:
    """Raise FormatError unless ``block_size`` is a number of elements or 0."""
    check_int("block_size", block_size, 0, None, "a positive number of elements, or 0 for the whole axis")
