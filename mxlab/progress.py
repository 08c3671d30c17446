"""Say what works, how far it is and how long it will take: on a terminal, in lines, or not at all. No torch, no rich.

Whatever takes long goes through :func:`track` or :class:`Steps`, wherever it is; who shows it is set once, at the edge
(:func:`shown_by`), as with logging. Steps may be nested: a sweep's points, a run's rows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, TypeVar

Item = TypeVar("Item")

INTERVAL = 30.0  # seconds between two lines


class Reporter(Protocol):
    """Shows steps: they begin, advance and end; inner ones before the outer ones."""

    def begin(self, steps: Steps) -> None:
        """Show new steps."""

    def advance(self, steps: Steps) -> None:
        """Do nothing: the next line will say it."""

    def end(self, steps: Steps) -> None:
        """Show that they are over."""


class Steps:
    """Work of so many steps, as a context; its reporter is the one that is set when it begins.

    Args:
        description: what is done, in a few words.
        total: how many steps; None where that is not known.
    """

    def __init__(self, description: str, total: int | None = None) -> None:
        self.description, self.total = description, total
        self.done = 0
        self._started = time.monotonic()
        self._reporter = _reporter

    def advance(self, count: int = 1) -> None:
        """Report ``count`` more steps as done."""
        self.done = self.done + count if self.total is None else min(self.done + count, self.total)
        if self._reporter is not None:
            self._reporter.advance(self)

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._started

    @property
    def remaining(self) -> float | None:
        """Seconds until the end at the present pace; None where nothing tells it yet."""
        if not self.done or self.total is None:
            return None
        return self.elapsed / self.done * (self.total - self.done)

    def __enter__(self) -> Steps:
        self._started, self._reporter = time.monotonic(), _reporter
        if self._reporter is not None:
            self._reporter.begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reporter is not None:
            self._reporter.end(self)


def track(items: Sequence[Item] | Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield ``items`` one by one, each a step that is done when the next is asked for."""
    if total is None and isinstance(items, Sequence):
        total = len(items)
    with Steps(description, total) as steps:
        for item in items:
            yield item
            steps.advance()


@contextmanager
def shown_by(reporter: Reporter | None) -> Iterator[None]:
    """Have ``reporter`` show all steps that begin while the context is open; None: nobody."""
    global _reporter
    former, _reporter = _reporter, reporter
    try:
        yield
    finally:
        _reporter = former


class LineReporter:
    """Writes a line when work begins, and one every half minute on how far it is: for logs, files and pipes."""

    def __init__(self, write: Callable[[str], object], interval: float = INTERVAL) -> None:
        self._write, self._interval = write, interval
        self._running: list[Steps] = []
        self._lock = threading.Lock()
        self._over = threading.Event()

    def begin(self, steps: Steps) -> None:
        """Write what begins, unless it is part of other work."""
        with self._lock:
            self._running.append(steps)
            is_outermost = len(self._running) == 1
        if is_outermost:
            count = f" ({steps.total})" if steps.total else ""
            self._write(f"{steps.description}{count} ...")
            self._over = threading.Event()
            threading.Thread(target=self._write_regularly, args=(self._over,), daemon=True).start()

    def advance(self, steps: Steps) -> None:
        """Nothing: the next line will say it."""

    def end(self, steps: Steps) -> None:
        """Forget the work, and stop writing when all of it is over."""
        with self._lock:
            if steps in self._running:
                self._running.remove(steps)
            if not self._running:
                self._over.set()

    def _write_regularly(self, over: threading.Event) -> None:
        while not over.wait(self._interval):
            with self._lock:
                running = list(self._running)
            if running:
                self._write("; ".join(map(line_of, running)))


def line_of(steps: Steps) -> str:
    """Return how far some steps are: ``ex1: 2 of 7, 1:30 passed, about 3:45 left``."""
    count = f"{steps.done} of {steps.total}, " if steps.total else f"{steps.done} done, " if steps.done else ""
    left = steps.remaining
    return f"{steps.description}: {count}{clock(steps.elapsed)} passed" + (
        "" if left is None else f", about {clock(left)} left"
    )


def clock(seconds: float) -> str:
    """Return a duration as minutes and seconds, ``1:05``, or ``1:02:03`` with hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


_reporter: Reporter | None = None
