"""Results as plain values and as JSON, for the commands that print them."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from mxlab import rundir
from mxlab.report.run import Run, read_run
from mxlab.shipped import read_toml


def record(run: Run) -> dict[str, Any]:
    """Return a run as plain values: what was evaluated, and for each task its metrics; None is what is not known."""
    metrics: dict[str, dict[str, Any]] = {}
    for found in rundir.metrics(run.folder):
        metrics.setdefault(found.task, {})[found.name] = {"value": found.value, "stderr": found.stderr}
    recipe = run.folder / rundir.RECIPE
    return {
        "folder": str(run.folder),
        "stage": run.stage,
        "run": run.run_id,
        "recipe": read_toml(recipe, str(recipe)).get("name") if recipe.is_file() else None,
        "model": run.model,
        "dtype": run.dtype,
        "batch_size": run.batch_size,
        "device": run.device,
        "options": None if run.options is None else dict(run.options),
        "rows": rundir.rows(run.folder),
        "seconds": rundir.seconds(run.folder),
        "metrics": metrics,
    }


def read_records(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the records of run directories. Raises ReportError where one cannot be read."""
    return [record(results[0].run) for folder in folders if (results := read_run(folder.resolve()))]


def print_json(value: Any) -> None:
    """Print a value as JSON, numbers that JSON does not have (NaN, infinities) as texts."""
    typer.echo(json.dumps(_finite(value), indent=1, allow_nan=False))


@contextlib.contextmanager
def results_alone(alone: bool) -> Iterator[None]:
    """Keep off standard output, where ``alone``, what others print there: lm-eval does while it works."""
    with contextlib.redirect_stdout(sys.stderr) if alone else contextlib.nullcontext():
        yield


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
