"""Transforms of what is quantized, as data. Nothing here needs torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mxlab.errors import SpecError

_SPELLING = re.compile(r"(?P<kind>hadamard|wush)(@(?P<size>[0-9]+))?")
_LARGEST = 128  # of a matrix for each block


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


@dataclass(frozen=True)
class Wush:
    """A linear transform of blocks of ``size`` inputs, fitted to the weight and the activations of a layer.

    The weight is multiplied by the inverse of what the activation is, so that the product stays what it was but for
    rounding. The matrices, one for each block, are found by calibration (:mod:`mxlab.ptq.wush`) and are part of the
    model.

    Raises:
        SpecError: a size that is no whole number from 2 to 128.

    Source: "WUSH: Near-Optimal Adaptive Transforms for LLM Quantization", 2025 (arXiv 2512.00956).
    """

    size: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or isinstance(self.size, bool) or not 2 <= self.size <= _LARGEST:
            raise SpecError(f"the size of a WUSH transform is {self.size!r}: it lies between 2 and {_LARGEST}")

    def __str__(self) -> str:
        return f"wush@{self.size}"


Transform = Hadamard | Wush


def parse_transform(text: object) -> Transform:
    """Return the transform that is spelled: ``hadamard``, or with the size of its blocks ``hadamard@32``, ``wush@32``.

    Raises:
        SpecError: anything else.
    """
    if isinstance(text, Hadamard | Wush):
        return text
    found = _SPELLING.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise SpecError(
            f"transform is {text!r}: write 'hadamard', or with the size of its blocks 'hadamard@32' or 'wush@32'"
        )
    if found["kind"] == "wush":
        return Wush(int(found["size"])) if found["size"] else Wush()
    return Hadamard(int(found["size"] or 0))
