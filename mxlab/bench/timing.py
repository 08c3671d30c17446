"""Time contenders in turn: each once a round, so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from mxlab.bench.targets import Target
from mxlab.progress import Steps

_LEAST_SAMPLES = 2  # of a contender whose time is up
_LEAST_ROUNDS = 3  # of a case whose time is up


@dataclass(frozen=True)
class Contender:
    """One of the things that are timed side by side.

    Attributes:
        name: what it is called in the results.
        call: does it once; what it returns is dropped, but by :class:`Stopwatch`.
        columns: what its row of results says besides the columns of its case.
        target: a bound on one figure of its row.
        optional: a failure is noted, and the others go on without it.
        time_limit: seconds of samples after which it is sampled no more, so that a slow one does not hold up the rest.
    """

    name: str
    call: Callable[[], object]
    columns: Mapping[str, Any] = field(default_factory=dict)
    target: Target | None = None
    optional: bool = False
    time_limit: float = math.inf


@dataclass(frozen=True)
class Effort:
    """How often everything is measured: ``repeats`` rounds after ``warmup`` calls of each contender.

    A sample is the mean of as many calls as take ``min_sample`` seconds, so that the clock's own cost does not show. No
    round begins after ``time_limit`` seconds, once there are three: a slow machine gives fewer samples.
    """

    repeats: int
    warmup: int = 2
    min_sample: float = 0.002
    time_limit: float = 60.0


@dataclass
class Series:
    """The seconds a call of one contender took, in the order of the rounds; or why there are none."""

    samples: list[float] = field(default_factory=list)
    failure: str | None = None


class Clock(Protocol):
    """Times calls."""

    def seconds(self, call: Callable[[], object], number: int) -> float:
        """Return the seconds that one of ``number`` calls in a row takes."""
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


class Stopwatch:
    """For calls that take their own time and return it in seconds."""

    def seconds(self, call: Callable[[], Any], number: int) -> float:
        """See :class:`Clock`."""
        return statistics.fmean(call() for _ in range(number))


def clock_for(device: torch.device) -> Clock:
    """Return the clock that is right for work on ``device``."""
    return CudaClock(device) if device.type == "cuda" else WallClock()


def alternate(
    contenders: Sequence[Contender], effort: Effort, clock: Clock, description: str = "timing"
) -> list[Series]:
    """Time ``contenders`` in turn, A B C A B C ..., after a warm-up of each; show the rounds as ``description``.

    Returns:
        a series for each contender, in their order.

    Raises:
        Exception: whatever a contender raises that is not optional.
    """
    found = [Series() for _ in contenders]
    running: list[tuple[Contender, Series, int]] = []
    with Steps(description, effort.repeats) as rounds:
        for contender, series in zip(contenders, found, strict=True):
            with _tolerated(contender, series):
                running.append((contender, series, _warm_up(contender, effort, clock)))
        started = time.perf_counter()
        for done in range(effort.repeats):
            if done >= _LEAST_ROUNDS and time.perf_counter() - started > effort.time_limit:
                break
            running = [entry for entry in running if _sample(*entry, clock)]
            rounds.advance()
    return found


def _sample(contender: Contender, series: Series, number: int, clock: Clock) -> bool:
    """Add a sample of ``number`` calls; return whether the contender goes on."""
    with _tolerated(contender, series):
        series.samples.append(clock.seconds(contender.call, number))
    is_up = sum(series.samples) * number > contender.time_limit and len(series.samples) >= _LEAST_SAMPLES
    return series.failure is None and not is_up


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Have torch, and with it the kernels, compute with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _warm_up(contender: Contender, effort: Effort, clock: Clock) -> int:
    """Call the contender ``warmup`` times; return how many calls make a sample."""
    took = min((clock.seconds(contender.call, 1) for _ in range(effort.warmup)), default=math.inf)
    return max(1, math.ceil(effort.min_sample / max(took, 1e-9)))


@contextmanager
def _tolerated(contender: Contender, series: Series) -> Iterator[None]:
    """Note the failure of an optional contender, and drop what was measured of it."""
    try:
        yield
    except Exception as e:
        if not contender.optional:
            raise
        series.samples.clear()
        series.failure = f"{type(e).__name__}: {e}"
