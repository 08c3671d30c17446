"""What is paid once: converting a model, and importing mxlab."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from mxlab.bench import targets, workloads
from mxlab.bench.results import Outcome, Row
from mxlab.bench.settings import Settings, check_dtypes
from mxlab.compat.recipes import load_any_recipe
from mxlab.model.apply import apply
from mxlab.sources import models

_IMPORT = "import time; start = time.perf_counter(); import mxlab; print(time.perf_counter() - start)"


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(Settings):
    """``mxlab.apply`` on fresh copies of a model."""

    BY_DEVICE: ClassVar = {"cuda": {"model": "llama-1b-random"}}

    repeats: int = 5
    model: str = models.EMBEDDED
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    recipes: tuple[str, ...] = ("ex1",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dtypes(self.dtypes)
        for name in self.recipes:
            load_any_recipe(name)


@dataclass(frozen=True, kw_only=True)
class ImportSettings(Settings):
    """``import mxlab`` in fresh processes."""

    repeats: int = 11


def measure_convert(settings: ConvertSettings) -> Iterator[tuple[str, Outcome]]:
    """Case after case: what it is, and its row."""
    for dtype in settings.dtypes:
        model = workloads.load(settings.model, dtype, settings.device).model
        for name in settings.recipes:
            case = {"model": settings.model, "dtype": dtype, "recipe": name, "threads": settings.threads}
            case["device"] = settings.device
            samples = [_seconds_to_convert(model, name) for _ in range(settings.warmup + settings.repeats)]
            target = targets.seconds_target("convert") if settings.model == models.EMBEDDED else None
            row = Row(case, "mxlab.apply", samples[settings.warmup :], target=target)
            yield f"{name} {dtype}", Outcome([row])


def measure_import(settings: ImportSettings) -> Iterator[tuple[str, Outcome]]:
    """One case; the first processes, which fill the disk cache, are the warm-up."""
    samples = [_seconds_to_import() for _ in range(settings.warmup + settings.repeats)][settings.warmup :]
    row = Row(
        {"python": sys.version.partition(" ")[0]}, "import mxlab", samples, target=targets.seconds_target("import")
    )
    yield "import mxlab", Outcome([row])


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
