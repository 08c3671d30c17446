"""Formats of one to three bits: signs, times means of magnitudes along an axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mxlab.checks import check_bool, check_int
from mxlab.formats.family import MEAN_BITS, FormatFamily


@dataclass(frozen=True)
class Binary(FormatFamily):
    """One bit: a where x ≥ 0, else -a. With ``scaled``, a = mean|x| along the axis, else 1.

    With ``stochastic``, the probability of a is clip((x/a + 1)/2, 0, 1), so that the mean of the results is x clipped
    to ±a: the result is a where a·(2u - 1) < x, u in [0, 1) from Philox by seed and element index.

    The axis of a weight [out, in] is its last: one a for each output channel. For an activation [..., in] there is
    one for each token. Several axes share one.

    Sources: Courbariaux, Bengio, David, "BinaryConnect", NeurIPS 2015; Rastegari et al., "XNOR-Net", ECCV 2016, for
    the scale.
    """

    family: ClassVar[str] = "binary"
    width: ClassVar[int] = 1
    scaled: bool = False
    stochastic: bool = False

    def __post_init__(self) -> None:
        check_bool("scaled", self.scaled)
        check_bool("stochastic", self.stochastic)
        super().__post_init__()

    @property
    def block_size(self) -> int:
        """The whole axis where it shares a scale."""
        return 0 if self.scaled else 1

    @property
    def shared_bits(self) -> int:
        """The scale, if any."""
        return MEAN_BITS if self.scaled else 0

    @property
    def is_random(self) -> bool:
        """Whether the signs are drawn."""
        return self.stochastic


@dataclass(frozen=True)
class ResidualBinary(FormatFamily):
    """A sum of ``levels`` scaled signs, each of what those before it leave over.

    r_1 = x; a_i = mean|r_i| along the axis, b_i = 1 where r_i ≥ 0, else -1, r_(i+1) = r_i - a_i·b_i;
    the result is the sum of all a_i·b_i.

    The axis is as in ``binary``. :class:`mxlab.train.binary_residual.BinaryResidual` learns the means instead.

    Source: Ghasemzadeh, Samragh, Koushanfar, "ReBNet: residual binarized neural network", FCCM 2018.
    """

    family: ClassVar[str] = "binary_residual"
    block_size: ClassVar[int] = 0
    levels: int = 2

    def __post_init__(self) -> None:
        check_int("levels", self.levels, 1, 3, "1 to 3")
        super().__post_init__()

    @property
    def width(self) -> int:
        """A bit for each level."""
        return self.levels

    @property
    def shared_bits(self) -> int:
        """A mean for each level."""
        return self.levels * MEAN_BITS


@dataclass(frozen=True)
class Ternary(FormatFamily):
    """Minus one, zero or one, times a scale; stored in two bits.

    t = 0.75·mean|x| along the axis, a = the mean of those |x| that are above t;
    the result is a·sign(x) where |x| > t, else 0.

    The axis is as in ``binary``.

    Source: Li, Zhang, Liu, "Ternary weight networks", 2016; 0.75 is the threshold for normally distributed values.
    """

    family: ClassVar[str] = "ternary"
    width: ClassVar[int] = 2
    block_size: ClassVar[int] = 0
    shared_bits: ClassVar[int] = MEAN_BITS
