"""Element formats: scalar numbers as rows of a table, from which bias, range and values are derived.

Sources: OCP Microscaling Formats (MX) Specification v1.0, section 5.3; OCP 8-bit Floating Point (OFP8) v1.0.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from mxlab.checks import check_int, suggestion
from mxlab.errors import FormatError

Specials = Literal["none", "nan", "ieee"]


@dataclass(frozen=True)
class ElementFormat:
    """A scalar format: sign, ``exponent_bits``, ``mantissa_bits`` (the implicit leading bit not counted).

    An MX integer is the case of no exponent field: one fixed binade below ``2^(emax + 1)``, so that one set of
    formulas serves both. ``specials`` says which codes are not numbers: ``none``; ``nan``, the top mantissa of the
    top exponent (OFP8 E4M3); ``ieee``, the whole top exponent.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    specials: Specials = "none"

    @property
    def is_int(self) -> bool:
        """Whether this is a symmetric fixed-point format (MXINT)."""
        return self.exponent_bits == 0

    @property
    def bits(self) -> int:
        """Storage of one element in bits, sign included (an integer has one bit before the binary point)."""
        return 1 + max(self.exponent_bits, 1) + self.mantissa_bits

    @property
    def bias(self) -> int:
        """Exponent bias; 0 for integers and for a one-bit exponent."""
        return 2 ** (self.exponent_bits - 1) - 1 if self.exponent_bits else 0

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number; below it the grid is uniform."""
        return 0 if self.is_int else 1 - self.bias

    @property
    def emax(self) -> int:
        """Exponent of the largest number (OCP MX v1.0, section 5.3: the MX scale is relative to it)."""
        if self.is_int:
            return 0
        return 2**self.exponent_bits - 1 - self.bias - (self.specials == "ieee")

    @property
    def min_normal(self) -> float:
        """The smallest normal number."""
        return 2.0**self.emin

    @property
    def min(self) -> float:
        """The smallest positive number."""
        return math.ldexp(1, self.emin - self.mantissa_bits)

    @property
    def max(self) -> float:
        """The largest finite number."""
        steps = 2 ** (self.mantissa_bits + 1) - 1 - (self.specials == "nan")
        return math.ldexp(steps, self.emax - self.mantissa_bits)

    def magnitudes(self) -> tuple[float, ...]:
        """Return every non-negative finite value, ascending: one per code without the sign."""
        per_binade = 2**self.mantissa_bits
        # The binade at emin holds the subnormals (0 .. per_binade - 1) and the first normals above them.
        values = [math.ldexp(k, self.emin - self.mantissa_bits) for k in range(2 * per_binade)]
        for exponent in range(self.emin + 1, self.emax + 1):
            values += [math.ldexp(per_binade + k, exponent - self.mantissa_bits) for k in range(per_binade)]
        return tuple(v for v in values if v <= self.max)

    def __str__(self) -> str:
        return self.name


ELEMENTS: dict[str, ElementFormat] = {
    row.name: row
    for row in (
        ElementFormat("fp8_e5m2", 5, 2, "ieee"),
        ElementFormat("fp8_e4m3", 4, 3, "nan"),
        ElementFormat("fp6_e3m2", 3, 2),
        ElementFormat("fp6_e2m3", 2, 3),
        ElementFormat("fp4_e2m1", 2, 1),
        ElementFormat("int8", 0, 6),
        ElementFormat("int4", 0, 2),
        ElementFormat("int2", 0, 0),
        ElementFormat("fp16", 5, 10, "ieee"),
        ElementFormat("bf16", 8, 7, "ieee"),
    )
}
ALIASES = {"fp4": "fp4_e2m1", "mxfp4": "fp4_e2m1", "bfloat16": "bf16", "float16": "fp16"}


def element(name: str) -> ElementFormat:
    """Return the element format called ``name``.

    Besides the table: any ``intB`` (2 <= B <= 8), any ``fpN_eXmY`` with 1 + X + Y = N <= 8, and ``mx`` in front
    (``mxfp6_e2m3``).

    Raises:
        FormatError: no such format; the message lists those that exist.
    """
    key = name.strip().lower() if isinstance(name, str) else name
    key = ALIASES.get(key, key)
    if isinstance(key, str) and key.startswith("mx"):
        key = key.removeprefix("mx")
    found = ELEMENTS.get(key) or _parametric(key)
    if found is None:
        raise FormatError(
            f"unknown element format {name!r}: known are {', '.join(ELEMENTS)}, any intB (B = 2..8) "
            f"and any fpN_eXmY with 1 + X + Y = N <= 8{suggestion(str(name), ELEMENTS)}"
        )
    return found


def _parametric(name: str) -> ElementFormat | None:
    if match := re.fullmatch(r"int([2-8])", str(name)):
        return ElementFormat(str(name), 0, int(match[1]) - 2)
    if match := re.fullmatch(r"fp([0-9])_e([0-9])m([0-9])", str(name)):
        bits, exponent_bits, mantissa_bits = map(int, match.groups())
        if exponent_bits >= 1 and 1 + exponent_bits + mantissa_bits == bits <= 8:
            return ElementFormat(str(name), exponent_bits, mantissa_bits)
    return None


def elementwise_format(bfloat: int = 0, fp: int = 0) -> ElementFormat | None:
    """Return the scalar format microxcaling's options ``bfloat`` and ``fp`` stand for; None where nothing is rounded.

    Raises:
        FormatError: a width out of range, or both given.
    """
    check_int("bfloat", bfloat, 0, 32, "10 to 32, or 0 for none")
    check_int("fp", fp, 0, 29, "7 to 29, or 0 for none")
    if bfloat and fp:
        raise FormatError(f"bfloat is {bfloat} and fp is {fp}: give one of them, the other 0")
    if 0 < bfloat < 10 or 0 < fp < 7:
        raise FormatError(f"bfloat is {bfloat}, fp is {fp}: bfloat must be 10 to 32 and fp 7 to 29, or 0 for none")
    if fp:
        return ElementFormat(f"fp{fp}", 5, fp - 6, "ieee")
    return ElementFormat(f"bfloat{bfloat}", 8, bfloat - 9, "ieee") if 0 < bfloat < 32 else None
