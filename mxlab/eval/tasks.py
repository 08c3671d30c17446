"""Evaluate a model on tasks: load it, convert it, score it with lm-eval's own HFLM and ``simple_evaluate``."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import CacheHook
from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.models import huggingface

from mxlab import environment, rundir
from mxlab.checks import check_int
from mxlab.errors import RunError, SpecError
from mxlab.eval.request import EvaluationRequest, LoadModel, Outcome, check_rules_acted
from mxlab.model.apply import apply
from mxlab.model.observe import count_scale_clamps
from mxlab.progress import Steps
from mxlab.sources import models
from mxlab.sources.tasks import PASSAGES, digests, load_tasks

logger = logging.getLogger("mxlab")
_HFLM: Any = huggingface.HFLM  # lm-eval's registry hides its type


@dataclass(frozen=True)
class TaskRequest(EvaluationRequest):
    """Which tasks of lm-eval to score, and how.

    Attributes:
        tasks: names of lm-eval tasks, or ``mxlab_passages``.
        limit: rows of each task: a count (1 or more), a fraction (below 1), or None for all, as in lm-eval.
        max_length: longest context in tokens.

    Raises:
        SpecError, FormatError: a value out of range.
    """

    tasks: tuple[str, ...] = (PASSAGES,)
    limit: float | None = None
    max_length: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        limit = self.limit
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or not _usable(limit)):
            raise SpecError(f"limit is {limit!r}: it must be a whole number of rows, or a fraction between 0 and 1")
        if not self.tasks or not all(isinstance(task, str) and task for task in self.tasks):
            raise SpecError(f"tasks is {self.tasks!r}: name at least one task")
        check_int("max_length", self.max_length, 2, None, "a whole number of tokens, 2 or more")

    @property
    def sources(self) -> tuple[Hashable, ...]:
        """The model and the data it needs."""
        return self.model, self.tasks, self.data_dir

    def key(self) -> dict[str, Any]:
        """Return what tells it from others; raises SourceError where a data file is missing."""
        return {
            **super().key(),
            "tasks": list(self.tasks),
            "data": digests(self.tasks, self.data_dir),
            "limit": self.limit,
            "max_length": self.max_length,
        }

    def evaluate(self, folder: Path, load: LoadModel = models.load_model) -> Outcome:
        """Score the tasks; see :func:`evaluate_tasks`."""
        return evaluate_tasks(self, folder, load)


def evaluate_tasks(request: TaskRequest, folder: Path, load: LoadModel = models.load_model) -> Outcome:
    """Score tasks with lm-eval; its metrics go to ``folder`` as ``metrics_<time>.json``, exactly as it writes them.

    Raises:
        SourceError: the model or the data cannot be had.
        ConversionError: the recipe does not fit the model.
        RunError: the metrics could not be written.
    """
    # The tracker's clock starts with it; total_evaluation_time_seconds includes loading, as on lm-eval's command line.
    tracker = EvaluationTracker(output_path=str(folder / "metrics.json"))
    with Steps("loading tasks"):
        tasks = load_tasks(request.tasks, request.data_dir)
    loaded = request.load(load)
    conversion = apply(loaded.model, request.recipe, request.storage)
    clamps = count_scale_clamps(conversion)
    lm = _TimedHFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        batch_size=request.batch_size,
        max_length=_context(loaded.model, request.max_length),
    )
    results: Any = simple_evaluate(
        model=lm,
        model_args={"pretrained": request.model},
        tasks=list(request.tasks),
        task_manager=tasks.manager,
        batch_size=request.batch_size,
        device=str(loaded.model.device),
        limit=request.limit,
        log_samples=False,
        evaluation_tracker=tracker,
    )
    if results is None:
        raise RunError("lm-eval gave no results: this process is not the first of its group")
    check_rules_acted(conversion)
    tracker.save_results_aggregated(results=results)
    return Outcome(_metrics_file(folder), results["results"], conversion, lm.forward_seconds, clamps)


class _TimedHFLM(_HFLM):
    """lm-eval's HFLM, which counts the seconds inside the model's forward pass and reports progress.

    A row is done when its answer is handed to lm-eval's cache: several rows may share one call of the model. Rolling
    tasks hand over theirs at the end, so that windows are counted there as they go through the model.
    """

    forward_seconds = 0.0
    _steps: Steps | None = None

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.cache_hook = _AnswerHook(self._answered)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return self._counted("rows", super().loglikelihood, requests, len(requests), disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return self._counted("windows", super().loglikelihood_rolling, requests, None, disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return self._counted("rows", super().generate_until, requests, len(requests), disable_tqdm)

    def _counted(
        self, what: str, call: Callable[..., Any], requests: Any, total: int | None, disable_tqdm: bool
    ) -> Any:
        with Steps(what, total) as steps:
            self._steps = steps
            try:
                return call(requests, disable_tqdm=disable_tqdm or environment.inner_bars_are_hidden())
            finally:
                self._steps = None

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **more: Any) -> Any:
        hidden = disable_tqdm or environment.inner_bars_are_hidden()  # rolling tasks ask for a bar a batch
        return super()._loglikelihood_tokens(requests, disable_tqdm=hidden, **more)

    def _model_call(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._timed(super()._model_call, *args, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed(super()._model_generate, *args, **kwargs)

    def _timed(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = call(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.forward_seconds += time.perf_counter() - start
        if self._steps is not None and self._steps.total is None:
            self._steps.advance(len(result))
        return result

    def _answered(self) -> None:
        if self._steps is not None and self._steps.total is not None:
            self._steps.advance()


class _AnswerHook(CacheHook):
    """Tells of each answer that lm-eval hands to its cache; there is none."""

    def __init__(self, answered: Callable[[], None]) -> None:
        super().__init__(None)
        self._answered = answered

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._answered()


def _usable(limit: float) -> bool:
    return math.isfinite(limit) and limit > 0 and (limit < 1 or limit == int(limit))


def _context(model: Any, wanted: int) -> int:
    """Return the context to score with: what was asked for, or what the model has where that is shorter."""
    has = getattr(model.config, "max_position_embeddings", wanted)
    if has < wanted:
        logger.warning("the model's context is %d tokens: --max-length %d is cut to it", has, wanted)
    return min(has, wanted)


def _metrics_file(folder: Path) -> Path:
    """Return lm-eval's metrics file, once it is clear that it can be read: the tracker swallows write errors."""
    files = rundir.metrics_files(folder)
    try:
        json.loads(files[-1].read_text(encoding="utf-8"))
    except (IndexError, OSError, ValueError) as e:
        raise RunError(f"lm-eval could not write its metrics to {folder}: is the disk full? ({e})") from None
    return files[-1]
