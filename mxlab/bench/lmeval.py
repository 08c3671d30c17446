"""A short lm-eval run, quantized and not, through the same door as ``mxlab eval``."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mxlab.bench.results import Outcome, Row
from mxlab.bench.settings import TextSettings, check_dtypes
from mxlab.bench.timing import Effort, Twin, alternate, clock_for, spread
from mxlab.checks import check_int
from mxlab.compat.recipes import load_any_recipe
from mxlab.eval.tasks import TaskRequest, evaluate_tasks

PLAIN = "baseline"
WHOLE, FORWARD = "whole run", "forward passes"


@dataclass(frozen=True, kw_only=True)
class LmEvalSettings(TextSettings):
    """``limit`` rows, under the baseline and all recipes, each run with its own loading and converting."""

    repeats: int = 3
    limit: int = 64
    batch: int = 16
    dtype: str = "bfloat16"
    recipes: tuple[str, ...] = ("ex1", "ex2")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dtypes((self.dtype,))
        check_int("limit", self.limit, 1, None, "a whole number, 1 or more")
        check_int("batch", self.batch, 1, None, "a whole number, 1 or more")
        for name in self.recipes:
            load_any_recipe(name)


def measure(settings: LmEvalSettings) -> Iterator[tuple[str, Outcome]]:
    """One case: the runs take turns."""
    forward: defaultdict[str, list[float]] = defaultdict(list)
    names = [PLAIN, *settings.recipes]
    if settings.warmup:
        _run(settings, PLAIN, forward, min(2, settings.limit))  # imports, and the data set's cache
        forward.clear()
    twins = [Twin(name, partial(_run, settings, name, forward, settings.limit)) for name in names]
    # A sample is one run: there is no more warming up than of the first.
    whole = alternate(twins, Effort(settings.repeats, 0), clock_for(settings.place)).samples
    rows = [
        _row(settings, what, name, samples) for what, samples in ((WHOLE, whole), (FORWARD, forward)) for name in names
    ]
    yield ", ".join(names), Outcome(rows)


def _run(settings: LmEvalSettings, name: str, forward: dict[str, list[float]], limit: int) -> None:
    request = TaskRequest(
        recipe=load_any_recipe(name),
        model=settings.model,
        tasks=(settings.task,),
        limit=limit,
        batch_size=settings.batch,
        dtype=settings.dtype,
        device=settings.device,
        data_dir=settings.data_dir,
    )
    # lm-eval prints while it works; the screen belongs to the results.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        forward[name].append(evaluate_tasks(request, Path(folder)).forward_seconds)


def _row(settings: LmEvalSettings, what: str, name: str, samples: dict[str, list[float]]) -> Row:
    case: dict[str, Any] = {
        "timed": what,
        "model": settings.model,
        "dtype": settings.dtype,
        "rows": f"{settings.limit} of {settings.task}",
        "batch": settings.batch,
        "threads": settings.threads,
        "device": settings.device,
    }
    figures = {"examples/s": settings.limit / spread(samples[name]).median}
    if name == PLAIN:
        return Row(case, name, samples[name], figures=figures)
    return Row(case, name, samples[name], PLAIN, samples[PLAIN], figures)
