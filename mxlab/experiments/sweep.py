"""Sweeps: the grid of a TOML file, models and recipes among its keys, as the points that an engine runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mxlab import shipped
from mxlab.checks import check_int, check_keys
from mxlab.compat.recipes import load_any_recipe
from mxlab.errors import SpecError
from mxlab.eval.request import EvaluationRequest
from mxlab.eval.settings import KEYS, conflicting_keys, request_from
from mxlab.experiments.engines.gpus import started
from mxlab.experiments.engines.local import Engine, Point, Summary
from mxlab.progress import track
from mxlab.recipe.mx_specs import OPTIONS, override
from mxlab.sources import models


@dataclass(frozen=True)
class Sweep:
    """One stage of an experiment: a recipe, what it is evaluated on, and the values each option takes in turn.

    ``settings`` and the keys of ``grid`` are MX options and fields of :class:`~mxlab.eval.tasks.Request`, or where they
    name a ``text`` of :class:`~mxlab.eval.text.TextRequest`. ``recipe`` is None where the grid has recipes.
    """

    stage: str
    recipe: str | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, list[Any]] = field(default_factory=dict)

    def points(self) -> Iterator[dict[str, Any]]:
        """Yield every combination of the grid, the last key varying fastest."""
        for values in itertools.product(*self.grid.values()):
            yield _plain(dict(zip(self.grid, values, strict=True)))

    def at(self, values: Mapping[str, Any], out: Path, data_dir: Path | None) -> Point:
        """Return the run at these values of the grid; raises as :meth:`request`."""
        request = self.request(values, data_dir)
        name = " ".join(f"{k}={v}" for k, v in values.items()) or request.recipe.name
        return Point(name, values, request, out / self.stage)

    def request(self, point: Mapping[str, Any], data_dir: Path | None) -> EvaluationRequest:
        """Return the evaluation at one point of the grid.

        Raises:
            SpecError: a value that its key does not take.
        """
        chosen = _plain({"recipe": self.recipe, **self.settings, **point})
        recipe = override(load_any_recipe(chosen.pop("recipe")), {k: v for k, v in chosen.items() if k in OPTIONS})
        return request_from(recipe, {k: v for k, v in chosen.items() if k not in OPTIONS}, data_dir)


def load_sweep(path: str | Path) -> Sweep:
    """Return a sweep from a TOML file, or a shipped one by name (``ex1``).

    The file has ``stage``, ``recipe`` (here or in the grid), any of the request's fields and MX options, and a table
    ``[grid]`` of lists: docs/sweeps.md.

    Raises:
        SpecError: no such file, not TOML, an unknown or missing key, or an empty grid entry.
    """
    return _parse(shipped.read_toml(shipped.find("sweep", path), str(path)), str(path))


def run_sweep(sweep: Sweep, out: Path, data_dir: Path | None = None, workers: int = 1) -> Summary:
    """Run every point of ``sweep`` into ``out/<stage>``; one that fails is recorded and the rest goes on.

    Args:
        sweep: what to run.
        out: the results folder.
        data_dir: a folder with the data; None for the hub.
        workers: processes, each with a GPU of its own; 1 for this process.

    Raises:
        SpecError: a point that no request can be made of, or too many workers; then nothing is run.
        RunError: a worker died.
    """
    return run_sweeps([sweep], out, sweep.stage, data_dir, workers)


def run_sweeps(
    sweeps: Sequence[Sweep], out: Path, description: str, data_dir: Path | None = None, workers: int = 1
) -> Summary:
    """Run the points of several sweeps as :func:`run_sweep` those of one; progress shows ``description``."""
    check_int("workers", workers, 1, None, "a whole number, 1 or more")
    points = [sweep.at(values, out, data_dir) for sweep in sweeps for values in sweep.points()]
    if workers == 1:
        engine = Engine()
        return sum((engine.run(point) for point in track(points, description)), Summary())
    with started(points, workers) as futures:
        return sum((future.result() for future in track(futures, description)), Summary())


def _parse(values: dict[str, Any], source: str) -> Sweep:
    known = ["stage", "recipe", "grid", *KEYS, *OPTIONS]
    grid = values.get("grid", {})
    if not isinstance(grid, dict):
        raise SpecError(f"{source}: grid must be a table of lists, such as [grid] block_size = [16, 32]")
    check_keys(values, known, source)
    check_keys(grid, [k for k in known if k not in ("stage", "grid")], f"{source}, [grid]")
    for key, entry in grid.items():
        if not isinstance(entry, list) or not entry:
            raise SpecError(f"{source}, [grid]: {key} is {entry!r}: it must be a list of values")
    for key, more in (("stage", ""), ("recipe", ", or a list of recipes in [grid]")):
        given = values.get(key)
        if (given is not None or key not in grid) and (not isinstance(given, str) or not given):
            raise SpecError(f'{source}: needs {key}, such as {key} = "ex1"{more}')
    if Path(values["stage"]).name != values["stage"] or values["stage"].startswith("."):
        raise SpecError(f"{source}: stage is {values['stage']!r}: it names a folder, without / and without a dot first")
    settings = {k: v for k, v in values.items() if k not in ("stage", "recipe", "grid")}
    sweep = Sweep(values["stage"], values.get("recipe"), settings, grid)
    try:
        for point in sweep.points():
            sweep.request(point, None)
    except SpecError as e:
        raise SpecError(f"{source}: {e}") from None
    return sweep


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with the names of torch's dtypes in their place, which can be recorded."""
    return {key: models.dtype_name(value) if key == "dtype" else value for key, value in values.items()}


def with_settings(sweep: Sweep, settings: Mapping[str, Any]) -> Sweep:
    """Return ``sweep`` with these settings in place of its own; a key of the grid is no longer swept.

    Where they name a text, the sweep's own settings for tasks give way, and the reverse.
    """
    gone = {*settings, *conflicting_keys(settings)}
    kept, grid = ({k: v for k, v in values.items() if k not in gone} for values in (sweep.settings, sweep.grid))
    return replace(sweep, settings={**kept, **settings}, grid=grid)
