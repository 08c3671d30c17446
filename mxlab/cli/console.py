"""Print, log and show progress."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from mxlab import environment
from mxlab.progress import LineReporter, Steps, shown_by

console = Console()
stderr = Console(stderr=True)


def print_line(text: Any) -> None:
    """Print a line to standard output, whatever is in it."""
    console.print(escape(str(text)), soft_wrap=True)


def print_text(text: Any) -> None:
    """Print a sentence to standard output, broken between words where a terminal is too narrow for it."""
    console.print(escape(str(text)), soft_wrap=not console.is_terminal)


def print_error(head: str, text: Any) -> None:
    """Print a line to standard error, its head in red."""
    stderr.print(f"[bold red]{head}[/] {escape(str(text))}", soft_wrap=True)


def print_table(table: Table) -> None:
    """Print a table; a file or a pipe has no width, so that it takes what it needs there."""
    (console if console.is_terminal else Console(width=240)).print(table)


def start_logging() -> None:
    """Show what mxlab logs on standard error."""
    logger = logging.getLogger("mxlab")
    logger.setLevel(logging.INFO)
    logger.addHandler(RichHandler(console=stderr, show_path=False, markup=False))
    logger.propagate = False


@contextmanager
def progress() -> Iterator[None]:
    """Show what works and how far it is: bars on a terminal, a line every half minute elsewhere."""
    environment.hide_inner_bars()
    if not stderr.is_terminal:
        with shown_by(LineReporter(lambda line: stderr.print(escape(line), soft_wrap=True))):
            yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=stderr, transient=True) as bars, shown_by(_Bars(bars)):
        yield


def loading_libraries() -> Steps:
    """Return the step in which a command imports torch and the like: seconds, on a slow machine many."""
    return Steps("loading libraries")


class _Bars:
    """Shows a bar for all steps that run."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._shown: dict[Steps, TaskID] = {}

    def begin(self, steps: Steps) -> None:
        self._shown[steps] = self._bars.add_task(escape(steps.description), total=steps.total)

    def advance(self, steps: Steps) -> None:
        self._bars.update(self._shown[steps], completed=steps.done)

    def end(self, steps: Steps) -> None:
        self._bars.remove_task(self._shown.pop(steps))
