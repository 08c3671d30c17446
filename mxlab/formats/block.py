"""Formats whose blocks share an exponent, or the bias of the exponents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mxlab.checks import check_int
from mxlab.formats.base import check_block_size
from mxlab.formats.family import Biased, FormatFamily, check_exponent_bits, check_width


@dataclass(frozen=True)
class BlockFP(Biased):
    """Block floating point: a block shares one exponent; an element keeps its sign and m = width - 1 magnitude bits.

    E = clamp(ceil(log2 max|x|), -bias, 2^exponent_bits - 1 - bias) with the maximum over the block;
    the result is sign(x)·2^E·clamp(round(|x|/2^E·2^m), 0, 2^m - 1) / 2^m.

    Rounding a second time moves a block whose largest magnitude became a power of two.

    Sources: Köster et al., "Flexpoint", NeurIPS 2017; Darvish Rouhani et al., "Pushing the limits of narrow precision
    inferencing at cloud scale with Microsoft Floating Point", NeurIPS 2020.
    """

    family: ClassVar[str] = "block_fp"
    width: int
    exponent_bits: int = 8
    bias: int | None = None
    block_size: int = 32

    def __post_init__(self) -> None:
        check_width(self.width, 2)
        check_exponent_bits(self.exponent_bits, 8)
        check_block_size(self.block_size)
        super().__post_init__()

    @property
    def mantissa_bits(self) -> int:
        """Bits of the magnitude."""
        return self.width - 1

    @property
    def shared_bits(self) -> int:
        """The exponent of a block."""
        return self.exponent_bits


class _SharedBias(FormatFamily):
    """Formats whose elements share an exponent bias: two's complement with ``bias_bits`` bits."""

    bias_bits: int

    def __post_init__(self) -> None:
        check_int("bias_bits", self.bias_bits, 1, 8, "1 to 8")
        check_block_size(self.block_size)
        super().__post_init__()

    @property
    def shared_bits(self) -> int:
        """The bias of a block."""
        return self.bias_bits

    @property
    def bias_limits(self) -> tuple[int, int]:
        """The smallest and the largest bias."""
        return -(2 ** (self.bias_bits - 1)), 2 ** (self.bias_bits - 1) - 1


@dataclass(frozen=True)
class BlockMinifloat(_SharedBias):
    """Minifloats whose exponent bias is shared by a block.

    bias = clamp(2^exponent_bits - 1 - floor(log2 max|x|), -2^(bias_bits-1), 2^(bias_bits-1) - 1) with the maximum over
    the block, whose binade so becomes the top one; then ``minifloat_ieee`` with that bias. A block of zeros takes the
    largest bias.

    Source: Fox et al., "A block minifloat representation for training deep neural networks", ICLR 2021.
    """

    family: ClassVar[str] = "block_minifloat"
    width: int
    exponent_bits: int
    bias_bits: int = 8
    block_size: int = 32

    def __post_init__(self) -> None:
        check_width(self.width, 2)
        check_exponent_bits(self.exponent_bits, self.width - 1)
        super().__post_init__()

    @property
    def mantissa_bits(self) -> int:
        """Bits of the mantissa, the implicit leading bit not counted."""
        return self.width - self.exponent_bits - 1


@dataclass(frozen=True)
class BlockLog(_SharedBias):
    """Signed powers of two whose exponent bias is shared by a block.

    bias = clamp(2^(width-1) - 1 - round(log2 max|x|), -2^(bias_bits-1), 2^(bias_bits-1) - 1) with the maximum over the
    block, whose nearest power of two so gets the top code; then ``log`` with that bias. A block of zeros takes the
    largest bias.

    Source: Miyashita, Lee, Murmann, "Convolutional neural networks using logarithmic data representation", 2016.
    """

    family: ClassVar[str] = "block_log"
    width: int
    bias_bits: int = 8
    block_size: int = 32

    def __post_init__(self) -> None:
        check_width(self.width, 2)
        super().__post_init__()

    @property
    def exponent_bits(self) -> int:
        """Bits of an element's exponent: all but the sign."""
        return self.width - 1
