"""Orthogonal transforms of what is quantized, as data. Nothing here needs torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mxlab.errors import SpecError

_SPELLING = re.compile(r"hadamard(@(?P<size>[0-9]+))?")


@dataclass(frozen=True)
class Hadamard:
    """The normalised Hadamard transform of blocks of ``size`` elements; 0: of the whole axis.

    It spreads an outlier over its block. Both operands of a product are transformed along the axis that the product
    sums over, so that it stays what it was but for rounding: (x H)(W H)ᵀ = x Wᵀ.

    Raises:
        SpecError: a size that is no whole number from 0, or 1.
    """

    size: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 0 or self.size == 1:
            raise SpecError(f"the size of a Hadamard transform is {self.size!r}: it must be 2 or more, or 0 for all")

    def __str__(self) -> str:
        return f"hadamard@{self.size}" if self.size else "hadamard"


def parse_transform(text: object) -> Hadamard:
    """Return the transform that is spelled: ``hadamard`` or ``hadamard@32``.

    Raises:
        SpecError: anything else.
    """
    if isinstance(text, Hadamard):
        return text
    found = _SPELLING.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise SpecError(f"transform is {text!r}: write 'hadamard', or with the size of its blocks 'hadamard@32'")
    return Hadamard(int(found["size"] or 0))
