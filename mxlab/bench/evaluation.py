"""Whole evaluations, quantized and not, through the same door as ``mxlab eval``: their time, and their peak memory."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mxlab.bench.results import Spread
from mxlab.bench.timing import Contender, Effort, Stopwatch
from mxlab.bench.workload import LAMBADA, Case, TextWorkload, check_count, check_dtypes, check_recipes
from mxlab.compat.recipes import load_any_recipe
from mxlab.errors import MxlabError
from mxlab.eval.tasks import TaskRequest, evaluate_tasks
from mxlab.experiments.provenance import quiet_git
from mxlab.sources.devices import peak_memory
from mxlab.sources.tasks import PASSAGES

BASELINE = "baseline"
_ALONE = "from mxlab.bench.evaluation import print_peak; import sys; print_peak(*sys.argv[1:])"


@dataclass(frozen=True, kw_only=True)
class LmEvalWorkload(TextWorkload):
    """``limit`` rows, under the baseline and all recipes, each run with its own loading and converting."""

    repeats: int = 3
    limit: int = 64
    batch: int = 16
    dtype: str = "bfloat16"
    recipes: tuple[str, ...] = ("ex1", "ex2")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dtypes((self.dtype,))
        check_count("limit", self.limit)
        check_count("batch", self.batch)
        check_recipes(self.recipes)

    def __len__(self) -> int:
        """See :meth:`Workload.__len__`."""
        return 2

    def cases(self) -> Iterator[Case]:
        """Yield the whole runs, and their forward passes, which they have timed themselves."""
        forward: defaultdict[str, list[float]] = defaultdict(list)
        names = (BASELINE, *self.recipes)
        if self.warmup:
            self._run(BASELINE, forward, min(2, self.limit))  # imports, and the data set's cache
            forward.clear()
        effort = Effort(self.repeats, warmup=0)  # a sample is one run
        whole = [Contender(name, partial(self._run, name, forward, self.limit)) for name in names]
        yield Case("lm-eval", self._columns("whole run"), whole, effort, self._figures)
        recorded = [Contender(name, partial(next, iter(forward[name]))) for name in names]
        effort = Effort(len(forward[BASELINE]), warmup=0, min_sample=0)
        yield Case(
            "its forward passes", self._columns("forward passes"), recorded, effort, self._figures, clock=Stopwatch()
        )

    def _run(self, name: str, forward: dict[str, list[float]], limit: int) -> None:
        request = TaskRequest(
            recipe=load_any_recipe(name),
            model=self.model,
            tasks=(self.task,),
            limit=limit,
            batch_size=self.batch,
            dtype=self.dtype,
            device=self.device,
            data_dir=self.data_dir,
        )
        # lm-eval prints while it works; the screen belongs to the results.
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), quiet_git():
            forward[name].append(evaluate_tasks(request, Path(folder)).forward_seconds)

    def _columns(self, what: str) -> dict[str, Any]:
        return {
            "timed": what,
            "model": self.model,
            "dtype": self.dtype,
            "rows": f"{self.limit} of {self.task}",
            "batch": self.batch,
            "threads": self.threads,
            "device": self.device,
        }

    def _figures(self, _: str, seconds: Spread, __: Spread | None) -> dict[str, float]:
        return {"examples/s": self.limit / seconds.median}


@dataclass(frozen=True, kw_only=True)
class MemoryWorkload(TextWorkload):
    """The peak resident memory of an evaluation of ``limit`` rows in a fresh process, loading included."""

    repeats: int = 1
    warmup: int = 0
    limit: int = 32
    dtype: str = "bfloat16"
    recipes: tuple[str, ...] = ("ex1", "ex2")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dtypes((self.dtype,))
        check_count("limit", self.limit)
        check_recipes(self.recipes)

    def __len__(self) -> int:
        """See :meth:`Workload.__len__`."""
        return 1

    def cases(self) -> Iterator[Case]:
        """See :meth:`Workload.cases`."""
        peaks: dict[str, list[float]] = defaultdict(list)
        names = (BASELINE, *self.recipes)

        def figures(name: str, _: Spread, __: Spread | None) -> dict[str, float]:
            peak, baseline = max(peaks[name]), max(peaks[BASELINE])
            return {"peak MiB": peak, "of the baseline's": peak / baseline}

        columns = {"model": self.model, "dtype": self.dtype, "rows": f"{self.limit} of {self.task}"}
        columns |= {"threads": self.threads, "device": self.device}
        contenders = [Contender(name, partial(self._evaluate_alone, name, peaks[name])) for name in names]
        yield Case("peak memory", columns, contenders, Effort(self.repeats, self.warmup), figures)

    def _evaluate_alone(self, recipe: str, peaks: list[float]) -> None:
        given = {"model": self.model, "dtype": self.dtype, "limit": self.limit, "device": self.device}
        given |= {"data_dir": str(self.data_dir) if self.data_dir else None}
        command = [sys.executable, "-c", _ALONE, recipe, json.dumps(given)]
        child = subprocess.run(command, check=False, capture_output=True, text=True)
        if child.returncode:
            raise MxlabError(f"the evaluation under {recipe} ended with {child.returncode}:\n{child.stderr[-2000:]}")
        peaks.append(float(child.stdout.split()[-1]))


def print_peak(recipe: str, given: str) -> None:
    """Evaluate under ``recipe``, told the rest in JSON, and print the peak resident memory of this process in MiB."""
    told = json.loads(given)
    data_dir = Path(told.pop("data_dir")) if told["data_dir"] else told.pop("data_dir")
    task = PASSAGES if data_dir is None else LAMBADA
    request = TaskRequest(recipe=load_any_recipe(recipe), tasks=(task,), data_dir=data_dir, **told)
    with tempfile.TemporaryDirectory() as folder:
        evaluate_tasks(request, Path(folder))
    print(peak_memory() / 2**20)
