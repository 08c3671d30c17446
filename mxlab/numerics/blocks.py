"""Cutting a tensor into the blocks that share a scale, and putting it together again; exponents, and ends of ranges."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """How a tensor of ``shape`` is cut along ``axes``: tiles of ``block_size`` elements a side (0: the whole axis).

    Several axes form joint tiles. An axis that the block size does not divide is padded with zeros at its end, so
    that a trailing partial block is a block of its own and no block straddles two rows.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    block_size: int

    @property
    def _sides(self) -> list[int]:
        # No longer than the axis, or a block size of a billion would pad to a billion.
        lengths = [max(self.shape[axis], 1) for axis in self.axes]
        return [min(self.block_size or length, length) for length in lengths]

    @property
    def _counts(self) -> list[int]:
        return [-(-self.shape[axis] // side) for axis, side in zip(self.axes, self._sides, strict=True)]

    @property
    def _rest(self) -> list[int]:
        return [length for axis, length in enumerate(self.shape) if axis not in self.axes]

    def split(self, x: Tensor) -> Tensor:
        """``x`` of ``shape`` as (rest..., counts..., elements of a block); a view where the layout allows it."""
        n = len(self.axes)
        x = x.movedim(self.axes, tuple(range(-n, 0)))  # (rest..., axes...)
        missing = [c * s - x.shape[i - n] for i, (c, s) in enumerate(zip(self._counts, self._sides, strict=True))]
        if any(missing):
            x = F.pad(x, [pad for m in reversed(missing) for pad in (0, m)])
        pairs = [length for pair in zip(self._counts, self._sides, strict=True) for length in pair]
        x = x.reshape(*self._rest, *pairs)  # (rest..., count, side, count, side, ...)
        r = len(self._rest)
        order = [*range(r), *range(r, r + 2 * n, 2), *range(r + 1, r + 2 * n, 2)]
        return x.permute(order).flatten(-n)  # (rest..., counts..., block)

    def join(self, blocks: Tensor) -> Tensor:
        """Return the inverse of :meth:`split`: a contiguous tensor of ``shape``, padding dropped."""
        n, r = len(self.axes), len(self._rest)
        x = blocks.unflatten(-1, self._sides)  # (rest..., counts..., sides...)
        order = [*range(r), *(r + i + n * k for i in range(n) for k in range(2))]
        x = x.permute(order)  # (rest..., count, side, count, side, ...)
        x = x.reshape(*self._rest, *(c * s for c, s in zip(self._counts, self._sides, strict=True)))
        for i, axis in enumerate(self.axes):
            x = x.narrow(i - n, 0, self.shape[axis])
        return x.movedim(tuple(range(-n, 0)), self.axes).contiguous()


def floor_log2(x: Tensor) -> Tensor:
    """Return floor(log2 x) of positive finite float32 values, as int32, exact for subnormals; -126 where x is 0.

    Read off the bits (frexp): a floating-point log2 rounds up just below a power of two.
    """
    exponent = torch.frexp(x).exponent - 1
    return torch.where(x == 0, -126, exponent)


def exp2(exponent: Tensor) -> Tensor:
    """2^exponent as float32 for integer exponents, exact: subnormal from -127 to -149, then 0; infinite above 127."""
    biased = (exponent + 127).clamp(0, 255)
    normal = (biased << 23).view(torch.float32)
    subnormal = torch.where(exponent < -149, 0, 1 << (exponent + 149).clamp(0, 22)).to(torch.int32)
    return torch.where(exponent < -126, subnormal.view(torch.float32), normal)


def saturated(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``y`` with what ``dtype`` cannot hold, infinities included, replaced by its largest value; NaN stays."""
    largest = torch.finfo(dtype).max
    return y.clamp(-largest, largest)
