"""What is paid once: converting a model, and importing mxlab."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from mxlab.bench import subjects, targets
from mxlab.bench.timing import Contender, Effort, Stopwatch
from mxlab.bench.workload import Case, Workload, check_dtypes, check_recipes
from mxlab.model.apply import apply
from mxlab.sources import models

_IMPORT = "import time; start = time.perf_counter(); import mxlab; print(time.perf_counter() - start)"


@dataclass(frozen=True, kw_only=True)
class ConvertWorkload(Workload):
    """``mxlab.apply`` on fresh copies of a model."""

    BY_DEVICE: ClassVar[dict[str, dict[str, Any]]] = {"cuda": {"model": "llama-1b-random"}}

    repeats: int = 5
    model: str = models.EMBEDDED
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    recipes: tuple[str, ...] = ("ex1",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dtypes(self.dtypes)
        check_recipes(self.recipes)

    def __len__(self) -> int:
        """See :meth:`Workload.__len__`."""
        return len(self.dtypes) * len(self.recipes)

    def cases(self) -> Iterator[Case]:
        """See :meth:`Workload.cases`."""
        target = targets.seconds_target("convert") if self.model == models.EMBEDDED else None
        for dtype in self.dtypes:
            model = subjects.load(self.model, dtype, self.device).model
            for name in self.recipes:
                columns = {"model": self.model, "dtype": dtype, "recipe": name, "threads": self.threads}
                converting = Contender("mxlab.apply", partial(_seconds_to_convert, model, name), target=target)
                yield Case(
                    f"converting, {name} {dtype}",
                    {**columns, "device": self.device},
                    [converting],
                    Effort(self.repeats, self.warmup, min_sample=0),
                    clock=Stopwatch(),
                )


@dataclass(frozen=True, kw_only=True)
class ImportWorkload(Workload):
    """``import mxlab`` in fresh processes; the first of them, which fill the disk cache, are the warm-up."""

    repeats: int = 11

    def __len__(self) -> int:
        """See :meth:`Workload.__len__`."""
        return 1

    def cases(self) -> Iterator[Case]:
        """See :meth:`Workload.cases`."""
        importing = Contender("import mxlab", _seconds_to_import, target=targets.seconds_target("import"))
        columns = {"python": sys.version.partition(" ")[0]}
        yield Case(
            "import mxlab", columns, [importing], Effort(self.repeats, self.warmup, min_sample=0), clock=Stopwatch()
        )


def _seconds_to_convert(model: torch.nn.Module, recipe: str) -> float:
    fresh = copy.deepcopy(model)
    start = _now()
    apply(fresh, recipe)
    return _now() - start


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _seconds_to_import() -> float:
    command = [sys.executable, "-c", _IMPORT]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
