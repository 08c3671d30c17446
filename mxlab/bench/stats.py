"""Medians, quartiles and pairwise ratios of samples."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """The median of some samples, the quartiles around it, and how many they were."""

    median: float
    q1: float
    q3: float
    n: int


def spread(samples: Sequence[float]) -> Spread:
    """The quartiles of at least one sample; between two samples they are interpolated.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("no samples: nothing was measured")
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0], 1)
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, q1, q3, len(samples))


def ratios(samples: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Each sample over the reference's of the same round; a series that stopped early has fewer."""
    return [a / b for a, b in zip(samples, reference, strict=False)]
