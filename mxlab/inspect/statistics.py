"""What a format does to the values of an operand, in sums that add up over tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from mxlab.errors import MetricError
from mxlab.formats import MXFormat, NumberFormat, Numerics
from mxlab.numerics import quantize, reference, scale_clamps

_OF_ZERO = -150  # stands for the exponent of a zero: below that of any float32
HISTOGRAMS = ("values", "elements", "scales")


@dataclass(frozen=True)
class Statistics:
    """Counts and sums over the elements x of one or more tensors; those of two add up.

    A scale is the one that the ``exact`` numerics choose; Q(x), and with it the noise, is that of the recipe's.

    Attributes:
        count: elements.
        signal: sum of x^2.
        noise: sum of (x - Q(x))^2, blocks that became NaN left out.
        amax: largest |x|.
        saturated: elements with x / scale beyond the largest element, or the smallest.
        flushed: elements other than zero that became zero.
        lost: elements that became NaN, because their block wants a larger scale than there is.
        saturated_noise: the part of ``noise`` that saturated elements make.
        flushed_noise: the part that flushed elements make.
        blocks: blocks that are not all zero.
        clamped: of these, those that want a smaller scale than there is.
        values: how many elements have which exponent floor(log2|x|); zeros have none.
        elements: the same of x / scale, which is what the element format must hold.
        scales: the same of the scales, a block counting once.
    """

    count: int = 0
    signal: float = 0.0
    noise: float = 0.0
    amax: float = 0.0
    saturated: int = 0
    flushed: int = 0
    lost: int = 0
    saturated_noise: float = 0.0
    flushed_noise: float = 0.0
    blocks: int = 0
    clamped: int = 0
    values: Mapping[int, int] = field(default_factory=dict)
    elements: Mapping[int, int] = field(default_factory=dict)
    scales: Mapping[int, int] = field(default_factory=dict)

    def __add__(self, other: Statistics) -> Statistics:
        sums: dict[str, Any] = {}
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            sums[f.name] = Counter(mine) + Counter(theirs) if f.name in HISTOGRAMS else mine + theirs
        return Statistics(**{**sums, "amax": max(self.amax, other.amax)})

    @property
    def sqnr_db(self) -> float:
        """10 log10(signal / noise); infinite where nothing changed."""
        return 10 * math.log10(self.signal / self.noise) if self.noise else math.inf

    @property
    def relative_error(self) -> float:
        """The root of noise / signal: how large the error is beside the tensor, in the Euclidean norm."""
        return math.sqrt(self.noise / self.signal) if self.noise else 0.0

    @property
    def outlier_ratio(self) -> float:
        """The largest magnitude over the root mean square; 0 of a tensor of zeros."""
        return self.amax / math.sqrt(self.signal / self.count) if self.signal else 0.0

    def summary(self) -> dict[str, float | None]:
        """Return the figures without the histograms, as plain values; JSON has no infinity: such an SQNR is None."""
        return {
            "sqnr_db": None if math.isinf(self.sqnr_db) else self.sqnr_db,
            "relative_error": self.relative_error,
            "amax": self.amax,
            "outlier_ratio": self.outlier_ratio,
            "clamped": _share(self.clamped, self.blocks),
            "lost": _share(self.lost, self.count),
            "saturated": _share(self.saturated, self.count),
            "flushed": _share(self.flushed, self.count),
            "saturated_noise": _share(self.saturated_noise, self.noise),
            "flushed_noise": _share(self.flushed_noise, self.noise),
            "count": self.count,
        }

    def histograms(self) -> dict[str, dict[int, int]]:
        """Return the three histograms, exponents ascending."""
        return {name: dict(sorted(getattr(self, name).items())) for name in HISTOGRAMS}


def measure(x: Tensor, fmt: NumberFormat, numerics: Numerics, axis: int = -1) -> Statistics:
    """Return the statistics of one tensor, any shape, that is quantized in blocks along ``axis``.

    Raises:
        MetricError: ``x`` holds NaN or infinities.
    """
    x = x.detach()
    if not x.numel():
        return Statistics()
    return _scaled(x, fmt, numerics, axis) if isinstance(fmt, MXFormat) else _unscaled(x, fmt, axis)


def _unscaled(x: Tensor, fmt: NumberFormat, axis: int) -> Statistics:
    """Return what can be said of a format without a scale."""
    exact, quantized = x.double(), quantize(x, fmt, axis=axis).double()
    lost = quantized.isnan()
    noise = (exact - quantized).square_().masked_fill_(lost, 0.0)
    flushed = (quantized == 0) & (exact != 0)
    return Statistics(
        count=x.numel(),
        signal=exact.square().sum().item(),
        noise=noise.sum().item(),
        amax=_largest(x),
        flushed=int(flushed.sum()),
        lost=int(lost.sum()),
        flushed_noise=noise.mul(flushed).sum().item(),
        values=_exponents(x.float()),
    )


def _scaled(x: Tensor, fmt: MXFormat, numerics: Numerics, axis: int) -> Statistics:
    cut = reference.block_layout(x, fmt, (axis % x.ndim,))
    blocks = cut.split(x.float())  # (..., blocks, block), padded with zeros
    amax = _largest(blocks)
    quantized = cut.split(quantize(x, fmt, axis=axis, numerics=numerics).float())
    scale = reference.scales(blocks, fmt, x.dtype)  # (..., blocks, 1)
    elements = blocks / scale
    lost = quantized.isnan()
    low, high = fmt.limits
    saturated = ((elements < low) | (elements > high)) & ~lost
    flushed = (quantized == 0) & (blocks != 0)
    noise = (blocks.double() - quantized).square_().masked_fill_(lost, 0.0)
    clamps = scale_clamps(x, fmt, axis)
    return Statistics(
        count=x.numel(),
        signal=blocks.double().square_().sum().item(),
        noise=noise.sum().item(),
        amax=amax,
        saturated=int(saturated.sum()),
        flushed=int(flushed.sum()),
        lost=int(lost.sum()),
        saturated_noise=noise.mul(saturated).sum().item(),
        flushed_noise=noise.mul(flushed).sum().item(),
        blocks=clamps["blocks"],
        clamped=clamps["clamped"],
        values=_exponents(blocks),
        elements=_exponents(elements),
        scales=_exponents(scale[(blocks != 0).any(-1)]),
    )


def _largest(x: Tensor) -> float:
    largest = x.abs().amax().item()
    if not math.isfinite(largest):
        raise MetricError(f"{int((~x.isfinite()).sum())} of {x.numel()} values are NaN or infinite before quantizing")
    return largest


def _exponents(x: Tensor) -> dict[int, int]:
    """Return how many values other than zero have which exponent floor(log2|x|)."""
    exponents = torch.frexp(x).exponent.masked_fill_(x == 0, _OF_ZERO + 1) - 1
    counts = torch.bincount((exponents - _OF_ZERO).flatten()).tolist()
    return {_OF_ZERO + i: n for i, n in enumerate(counts) if n and i}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
