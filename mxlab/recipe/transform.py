"""Transforms of what is quantized, as data. Nothing here needs torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mxlab.errors import SpecError

_SPELLING = re.compile(r"(?P<kind>hadamard|derotated_hadamard|wush)(@(?P<size>[0-9]+))?")
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
        return _spelled("hadamard", self.size)


@dataclass(frozen=True)
class Derotated:
    """MASE's rotation: the Hadamard transform before quantizing, and its inverse after it, of one operand alone.

    The activation of a linear layer is transformed in blocks of ``size`` elements (0: the whole axis), quantized and
    transformed back; so are the keys and values of an attention. The other operand, weight or query, stays in its own
    basis. So the operand that enters the product does not lie on the grid: it can be stored in the format, and not be
    multiplied in it.

    Raises:
        SpecError: a size that is no whole number from 0, or 1.

    Source: ``mxint_rotate_quantizer`` of MASE (github.com/DeepWok/mase).
    """

    size: int = 0

    def __post_init__(self) -> None:
        Hadamard(self.size)  # raises where there is no such size

    def __str__(self) -> str:
        return _spelled("derotated_hadamard", self.size)


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


Transform = Hadamard | Derotated | Wush


def parse_transform(text: object) -> Transform:
    """Return the transform that is spelled: ``hadamard``, or with the size of its blocks ``hadamard@32``.

    Likewise ``derotated_hadamard`` and ``wush``.

    Raises:
        SpecError: anything else.
    """
    if isinstance(text, Hadamard | Derotated | Wush):
        return text
    found = _SPELLING.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise SpecError(
            f"transform is {text!r}: write 'hadamard' or 'derotated_hadamard', or with the size of its blocks "
            "'hadamard@32', 'derotated_hadamard@32' or 'wush@32'"
        )
    if found["kind"] == "wush":
        return Wush(int(found["size"])) if found["size"] else Wush()
    kind = Derotated if found["kind"] == "derotated_hadamard" else Hadamard
    return kind(int(found["size"] or 0))


def _spelled(kind: str, size: int) -> str:
    return f"{kind}@{size}" if size else kind
