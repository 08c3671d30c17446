"""What every number format has in common: its spelling, read and printed by one grammar, and the bits it takes.

A format is spelled ``name@block_size,key=value,...``: ``fp4_e2m1@32,rounding=even``, ``integer,width=8,frac=4``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from math import prod
from typing import Any, ClassVar, Literal, get_args

from mxlab.checks import check_int, suggestion
from mxlab.errors import FormatError

Numerics = Literal["exact", "microxcaling"]
Rounding = Literal["nearest", "nearest_zero", "even", "floor", "dither"]

NUMERICS: tuple[str, ...] = get_args(Numerics)
ROUNDINGS: tuple[str, ...] = get_args(Rounding)
MICROXCALING_ROUNDINGS = tuple(rounding for rounding in ROUNDINGS if rounding != "nearest_zero")


class NumberFormat:
    """The base of all formats that a tensor can be quantized to; each is a frozen dataclass.

    Attributes:
        element_bits: storage of one element in bits.
        block_size: elements that share something, along the quantized axis: 1, every element alone; 0, the whole axis.
        shared_bits: storage in bits of what the elements of one block share.
        tensor_bits: storage in bits of what all blocks of a tensor share.
        is_random: whether the result depends on a seed.

    Raises:
        FormatError: a parameter out of range; the message names it and what it may be.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    block_size: int = 1
    shared_bits: int = 0
    tensor_bits: int = 0
    is_random: bool = False
    _text: str  # the spelling, derived once: the operators and kernels know a format by it

    @property
    def element_bits(self) -> int:
        """Storage of one element in bits."""
        raise NotImplementedError

    @property
    def elements_per_scale(self) -> int:
        """Elements that share :attr:`shared_bits`; 0 means the whole axis."""
        return self.block_size

    @property
    def bits_per_element(self) -> float:
        """Storage of one element in bits, its share of its block's included.

        What a whole axis shares depends on its length and is not counted, nor is what a tensor
        shares. :meth:`storage_bits` counts all.
        """
        return self.element_bits + (self.shared_bits / self.elements_per_scale if self.elements_per_scale else 0)

    def storage_bits(self, shape: Sequence[int]) -> int:
        """Count the bits that a tensor of ``shape`` takes, its blocks (partial ones too) along the last axis.

        Raises:
            FormatError: a shape without an axis.
        """
        if not shape:
            raise FormatError("a 0-dimensional tensor has no axis to quantize along: reshape it to (1,)")
        *rows, length = shape
        if not prod(shape):
            return 0
        blocks = -(-length // (self.elements_per_scale or length))
        return prod(rows) * (length * self.element_bits + blocks * self.shared_bits) + self.tensor_bits

    def __str__(self) -> str:
        return self._text

    def _spell(self, head: str, defaults: Mapping[str, object]) -> None:
        """Set the spelling: ``head``, then the fields of ``defaults`` that differ from their default."""
        options = [
            f"{name}={_option(value)}"
            for name, default in defaults.items()
            if (value := getattr(self, name)) != default
        ]
        object.__setattr__(self, "_text", ",".join([head, *options]))


@dataclass(frozen=True)
class Spelling:
    """The text of a format, taken apart but not yet understood.

    Attributes:
        text: as it was written.
        name: what stands before ``@`` or the first comma.
        block_size: what stands behind ``@``; None without one.
        options: what stands between the commas.
    """

    text: str
    name: str
    block_size: str | None
    options: tuple[str, ...]

    @classmethod
    def read(cls, text: object) -> Spelling:
        """Take ``text`` apart. Raises FormatError where it is not a text."""
        if not isinstance(text, str):
            raise FormatError(f"{text!r} is not a format: write it like 'fp4_e2m1@32' or 'integer,width=8,frac=4'")
        head, *options = (part.strip() for part in text.split(","))
        name, at, block_size = (part.strip() for part in head.partition("@"))
        return cls(text, name, block_size if at else None, tuple(options))

    def arguments(self, parameters: Mapping[str, object], kind: str) -> dict[str, Any]:
        """Read the values of a format's parameters.

        Args:
            parameters: their names and defaults (``dataclasses.MISSING`` where there is none).
            kind: what the format is called in errors.

        Raises:
            FormatError: an option that cannot be read, is not a parameter or is given twice; a block size where there
                is none; a parameter without a default that is not given.
        """
        known = [name for name in parameters if name != "block_size"]
        place = " after the block size" if "block_size" in parameters else ""
        values: dict[str, Any] = {}
        for option in self.options:
            key, equals, value = (part.strip() for part in option.partition("="))
            if key not in known or not equals or key in values:
                raise FormatError(
                    f"cannot read {option!r} in the format {self.text!r}: {kind} takes key=value pairs{place}, each "
                    f"once, of {', '.join(known) or 'nothing'}{suggestion(key, known)}"
                )
            values[key] = _value(key, value, parameters[key])
        if self.block_size is not None:
            if "block_size" not in parameters:
                raise FormatError(
                    f"cannot read '{self.name}@{self.block_size}' in the format {self.text!r}: {kind} has no block size"
                )
            if not re.fullmatch(r"[+-]?[0-9]+", self.block_size):
                raise FormatError(
                    f"block_size is {self.block_size!r}: it must be a whole number of elements, or 0 for the whole axis"
                )
            values["block_size"] = int(self.block_size)
        if missing := [name for name in known if parameters[name] is MISSING and name not in values]:
            raise FormatError(
                f"the format {self.text!r} does not say its {' and '.join(missing)}: add {missing[0]}=<number>"
            )
        return values


def check_block_size(block_size: object) -> None:
    """Raise FormatError unless ``block_size`` is a number of elements or 0."""
    check_int("block_size", block_size, 0, None, "a positive number of elements, or 0 for the whole axis")


def _value(name: str, text: str, default: object) -> object:
    """Return the number or truth value that ``text`` spells; else the text, for the format to refuse by name."""
    if re.fullmatch(r"[+-]?[0-9]+", text):
        return int(text)
    if isinstance(default, int) and not isinstance(default, bool):
        raise FormatError(f"{name} is {text!r}: it must be a whole number")
    return {"true": True, "false": False}.get(text.lower(), text)


def _option(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
