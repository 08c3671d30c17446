"""Running the points of a sweep: what is finished is skipped, what fails is recorded."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mxlab.errors import MxlabError, SourceError
from mxlab.eval.request import EvaluationRequest
from mxlab.experiments import runs
from mxlab.sources import devices
from mxlab.sources.model_pool import ModelPool

logger = logging.getLogger("mxlab")


@dataclass(frozen=True)
class Point:
    """One run of a sweep: what is varied, and the evaluation that comes of it."""

    name: str
    values: Mapping[str, Any]
    request: EvaluationRequest
    stage_folder: Path


@dataclass(frozen=True)
class PointResult:
    """How one run of a sweep ended (made, found finished, or failed), and its run directory, if it has one."""

    point: Point
    status: Literal["made", "found", "failed"]
    folder: Path | None = None
    error: str = ""


@dataclass(frozen=True)
class Summary:
    """How many runs of a sweep were made, found finished, and failed; and each of them."""

    finished: int = 0
    skipped: int = 0
    failed: int = 0
    results: tuple[PointResult, ...] = field(default=(), compare=False)

    def __add__(self, other: Summary) -> Summary:
        return Summary(
            self.finished + other.finished,
            self.skipped + other.skipped,
            self.failed + other.failed,
            self.results + other.results,
        )

    def __str__(self) -> str:
        return f"{self.finished} runs made, {self.skipped} found finished, {self.failed} failed"


class Engine:
    """Runs points one by one, with one pool of models; a model or data that could not be had is not asked for again."""

    def __init__(self) -> None:
        self._pool = ModelPool()
        self._missing: dict[tuple[Hashable, ...], SourceError] = {}

    def run(self, point: Point) -> Summary:
        """Run ``point``, unless it is finished. A failure, of whatever kind, is recorded and does not get out."""
        logger.info("%s: %s", point.stage_folder.name, point.name)
        key = None
        try:
            key = runs.run_key(point.request)
            if done := runs.find(point.stage_folder, key):
                logger.info("finished already: %s", done)
                return Summary(skipped=1, results=(PointResult(point, "found", done),))
            folder = self._evaluate(point, key)
            logger.info("written: %s", folder)
            return Summary(finished=1, results=(PointResult(point, "made", folder),))
        except Exception as e:  # one bad run must not end the others
            runs.record_failure(point.stage_folder, point.name, e, key)
            message = str(e) if isinstance(e, MxlabError) else f"{type(e).__name__}: {e}"
            logger.error("failed: %s: %s", point.name, message)
            return Summary(failed=1, results=(PointResult(point, "failed", error=message),))
        finally:
            devices.release_memory()

    def _evaluate(self, point: Point, key: dict[str, Any]) -> Path:
        request = point.request
        if request.sources in self._missing:
            raise SourceError(str(self._missing[request.sources]))
        options = {**request.recipe.options, **point.values}
        try:
            return runs.run(request, point.stage_folder, options, load=self._pool.load, key=key)
        except SourceError as e:
            self._missing[request.sources] = e
            raise
