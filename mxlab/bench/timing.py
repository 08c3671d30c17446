"""Alternating measurements: each twin once a round, so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch


@dataclass(frozen=True)
class Spread:
    """The median of some samples, the quartiles around it, and how many they were."""

    median: float
    q1: float
    q3: float
    n: int


def spread(samples: Sequence[float]) -> Spread:
    """Return the quartiles of at least one sample; between two samples they are interpolated.

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
    """Return each sample over the reference's of the same round; a series that stopped early has fewer."""
    return [a / b for a, b in zip(samples, reference, strict=False)]


_AT_LEAST = 2  # samples of an impatient twin
_ROUNDS = 3  # of a measurement, however long they take


@dataclass(frozen=True)
class Twin:
    """Something to time.

    Attributes:
        name: what it is called in the results.
        call: does it once; what it returns is dropped.
        optional: a failure is noted, and the others go on without it.
        patience: seconds after which it is sampled no more, so that a slow guest does not hold up the rest.
    """

    name: str
    call: Callable[[], object]
    optional: bool = False
    patience: float = math.inf


@dataclass(frozen=True)
class Effort:
    """How often everything is measured: ``repeats`` rounds after ``warmup`` calls of each twin.

    A sample is the mean of as many calls as take ``min_sample`` seconds, so that the clock's own cost does not show. No
    round begins after ``time_limit`` seconds, once there are three: a slow machine gives fewer samples.
    """

    repeats: int
    warmup: int = 2
    min_sample: float = 0.002
    time_limit: float = 60.0


@dataclass
class Timings:
    """Seconds a call, by twin, in the order of the rounds; and why an optional twin is missing."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


class Clock(Protocol):
    """Times calls."""

    def seconds(self, call: Callable[[], object], number: int) -> float:
        """Seconds that one of ``number`` calls in a row takes."""
        ...


class WallClock:
    """For the CPU: what a call returns is finished."""

    def seconds(self, call: Callable[[], object], number: int) -> float:
        """See :class:`Clock`."""
        start = time.perf_counter()
        for _ in range(number):
            call()
        return (time.perf_counter() - start) / number


class CudaClock:
    """For a GPU: between two events on the stream that the calls queue their work on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, call: Callable[[], object], number: int) -> float:
        """See :class:`Clock`."""
        with torch.cuda.device(self.device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            for _ in range(number):
                call()
            end.record()
            torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / number  # milliseconds


def clock_for(device: torch.device) -> Clock:
    """Return the clock that is right for work on ``device``."""
    return CudaClock(device) if device.type == "cuda" else WallClock()


def alternate(twins: Sequence[Twin], effort: Effort, clock: Clock) -> Timings:
    """Time ``twins`` in turn, A B C A B C ..., after a warm-up of each.

    Raises:
        Exception: whatever a twin raises that is not optional.
    """
    timings = Timings()
    running: dict[str, tuple[Twin, int]] = {}
    for twin in twins:
        with _tolerated(twin, timings):
            running[twin.name] = twin, _warm_up(twin, effort, clock)
    started = time.perf_counter()
    for done in range(effort.repeats):
        if done >= _ROUNDS and time.perf_counter() - started > effort.time_limit:
            break
        for twin, number in list(running.values()):
            with _tolerated(twin, timings):
                samples = timings.samples.setdefault(twin.name, [])
                samples.append(clock.seconds(twin.call, number))
                if len(samples) >= _AT_LEAST and sum(samples) * number > twin.patience:
                    del running[twin.name]
            if twin.name in timings.failures:
                running.pop(twin.name, None)
                timings.samples.pop(twin.name, None)
    return timings


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Have torch, and with it the kernels, compute with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _warm_up(twin: Twin, effort: Effort, clock: Clock) -> int:
    """Call the twin ``warmup`` times; returns how many calls make a sample."""
    took = min((clock.seconds(twin.call, 1) for _ in range(effort.warmup)), default=math.inf)
    return max(1, math.ceil(effort.min_sample / max(took, 1e-9)))


@contextmanager
def _tolerated(twin: Twin, timings: Timings) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        if not twin.optional:
            raise
        timings.failures[twin.name] = f"{type(e).__name__}: {e}"
