"""Run directories: written once, complete or absent.

A run is written into a hidden folder beside its place and renamed when it is whole, so that a run that is killed, or
for which the disk is too small, leaves nothing that looks like a result.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import re
import shlex
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from mxlab import rundir
from mxlab.errors import RunError
from mxlab.eval.request import EvaluationRequest, LoadModel, Outcome
from mxlab.experiments import provenance
from mxlab.recipe import Recipe
from mxlab.sources import devices, models

logger = logging.getLogger("mxlab")

_EXERCISES = ("baseline", "ex1", "ex2")  # stages whose run directories other tools know by their options
_LONGEST = 40  # characters of a name in a folder's, which file systems limit to 255 bytes


def run(
    request: EvaluationRequest,
    stage_folder: Path,
    options: dict[str, Any] | None = None,
    command: str | None = None,
    load: LoadModel = models.load_model,
    key: dict[str, Any] | None = None,
) -> Path:
    """Evaluate ``request`` into a new run directory of ``stage_folder`` and return that directory.

    Args:
        request: what to evaluate: a :class:`mxlab.eval.tasks.Request` or a :class:`mxlab.eval.text.TextRequest`.
        stage_folder: ``results/<stage>``; the stage is its name.
        options: what a sweep varied, for the report; None for what the recipe says.
        command: the command line to record; None for this process's.
        load: where the model comes from.
        key: :func:`run_key` of ``request``, where it is known already.

    Raises:
        MxlabError: as the request's ``evaluate``; RunError where the run directory cannot be written.
    """
    options = request.recipe.options if options is None else options
    key = key or run_key(request)
    with new_run(stage_folder) as folder:
        write_origin(folder, request.recipe, command)
        with _logged(folder / rundir.LOG):
            outcome, batch_size = _evaluate(request, folder, load)
        key = {**key, "revision": models.revision(request.model)}  # this run may have fetched the model
        record = {"stage": stage_folder.name, "options": options, "quantized": request.recipe.quantizes, "key": key}
        _write_after(folder, outcome, {**record, "batch_size": batch_size})
        return rundir.publish(folder, stage_folder, label(request.recipe, request.model, stage_folder.name))


def _evaluate(request: EvaluationRequest, folder: Path, load: LoadModel) -> tuple[Outcome, int]:
    """Return the outcome and the batch size it took: half as large each time that memory ran out."""
    while True:
        try:
            with provenance.quiet_git():
                return request.evaluate(folder, load), request.batch_size
        except Exception as e:
            if not devices.is_out_of_memory(e):
                raise
            reason = str(e).strip().partition("\n")[0] or type(e).__name__
            if request.batch_size == 1:
                raise RunError(
                    f"memory runs out even at a batch size of 1: {reason}. Choose shorter windows or contexts, a "
                    "smaller dtype or model, or another device"
                ) from e
        # Only now is the exception gone, whose frames hold the model.
        devices.release_memory()
        logger.warning("memory ran out at a batch size of %d, trying half of it: %s", request.batch_size, reason)
        request = replace(request, batch_size=request.batch_size // 2)


def run_key(request: EvaluationRequest) -> dict[str, Any]:
    """Return what makes two runs the same run: a finished one with an equal key need not be run again."""
    return {**request.key(), "code": provenance.code_version()}


def find(stage_folder: Path, key: dict[str, Any]) -> Path | None:
    """Return the complete run directory of ``stage_folder`` with this key, whatever its name; else None."""
    for record in sorted(stage_folder.glob(f"[!.]*/{rundir.RECORD}")):
        complete = bool(rundir.metrics_files(record.parent))
        if complete and rundir.read_json(record).get("key") == key:
            return record.parent
    return None


def read_metrics(folder: Path) -> list[tuple[str, str, str, str]]:
    """Return the metrics of a run directory as rows of text: task, metric, value, standard error."""
    return [(found.task, found.name, found.value_text, found.stderr_text) for found in rundir.metrics(folder)]


def record_failure(stage_folder: Path, name: str, error: BaseException, key: dict[str, Any] | None = None) -> None:
    """Append a failed run to ``failures.jsonl`` of its stage; ``key`` is its :func:`run_key`, where it has one.

    Raises:
        RunError: the record cannot be written.
    """
    entry = {
        "label": name,
        "error": f"{type(error).__name__}: {error}",
        "key": key,
        "time": datetime.datetime.now().isoformat(timespec="seconds"),
        "traceback": "".join(traceback.format_exception(error)),
    }
    try:
        stage_folder.mkdir(parents=True, exist_ok=True)
        with (stage_folder / rundir.FAILURES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as e:
        raise RunError(f"{error} (and {rundir.FAILURES} of {stage_folder} cannot be written: {e.strerror})") from error


def label(recipe: Recipe, model: str, stage: str) -> str:
    """Return what a run directory is called behind its time: ``tier_c_Llama-3.2-1B_bs32_sbmix_cctrue``.

    The recipe, the model (the last part of its name), and the options of the exercises, ``mix`` where the recipe's
    formats differ; no options where it quantizes nothing. In the stages of the exercises, which are named like their
    recipe, the options alone, or the recipe's name where there are none.
    """
    varied = _options_label(recipe)
    if stage in _EXERCISES and stage == recipe.name:
        return varied or recipe.name
    short_name = re.sub(r"[^\w.+=,-]", "_", Path(model).expanduser().name, flags=re.ASCII)
    names = [recipe.name[:_LONGEST], short_name[:_LONGEST]]
    return "_".join([*names, varied] if varied else names)


def _options_label(recipe: Recipe) -> str:
    """``bs16_sb8_cctrue``; empty where the recipe quantizes nothing."""
    if not recipe.quantizes:
        return ""
    options = {"block_size": "mix", "scale_bits": "mix", **recipe.options}
    custom_cuda = str(options["custom_cuda"]).lower()
    return f"bs{options['block_size']}_sb{options['scale_bits']}_cc{custom_cuda}"


def write_origin(folder: Path, recipe: Recipe, command: str | None = None) -> None:
    """Write what a result comes from: the command (None for this process's), the environment and the recipe."""
    command = command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    described = provenance.describe()
    _write(folder / rundir.COMMAND, command + "\n")
    _write(folder / rundir.ENVIRONMENT_TEXT, provenance.as_text(described))
    _write(folder / rundir.ENVIRONMENT, _json(described))
    _write(folder / rundir.RECIPE, recipe.to_toml())


def _write_after(folder: Path, outcome: Outcome, record: dict[str, Any]) -> None:
    _write(folder / rundir.INVENTORY, _json(outcome.conversion.inventory()))
    measured = {"forward_seconds": outcome.forward_seconds, "scale_clamps": outcome.scale_clamps or None}
    _write(folder / rundir.RECORD, _json({"schema": rundir.SCHEMA, **record, **measured}))


@contextlib.contextmanager
def new_run(stage_folder: Path) -> Iterator[Path]:
    """Yield a hidden folder to write a run into (:func:`mxlab.rundir.partial`), its errors told to the user.

    Raises:
        RunError: it cannot be written; nothing is kept.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(rundir.partial(stage_folder))
        except OSError as e:
            raise RunError(f"cannot write to {stage_folder}: {e.strerror}; give another --out folder") from None
        try:
            yield folder
        except KeyboardInterrupt:
            logger.warning("stopped: nothing half-written was kept; start the same command again to go on")
            raise
        except OSError as e:
            raise RunError(f"the run was given up and nothing was kept: {e}; put that right and start it again") from e


@contextlib.contextmanager
def _logged(file: Path) -> Iterator[None]:
    """Copy everything printed and logged to ``file``."""
    with file.open("w", encoding="utf-8") as log:
        handler = logging.StreamHandler(log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s [%(name)s] %(message)s"))
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(_Tee(sys.stdout, log)))  # pyright: ignore
            stack.enter_context(contextlib.redirect_stderr(_Tee(sys.stderr, log)))  # pyright: ignore
            for name in ("mxlab", "lm_eval"):
                stack.enter_context(_handling(logging.getLogger(name), handler))
            yield


@contextlib.contextmanager
def _handling(source: logging.Logger, handler: logging.Handler) -> Iterator[None]:
    level = source.level
    source.addHandler(handler)
    source.setLevel(min(source.getEffectiveLevel(), logging.INFO))
    try:
        yield
    finally:
        source.removeHandler(handler)
        source.setLevel(level)


class _Tee:
    """A text stream that writes to a second one as well."""

    def __init__(self, stream: TextIO, copy: TextIO) -> None:
        self._stream, self._copy = stream, copy

    def write(self, text: str) -> int:
        self._copy.write(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._copy.flush()
        self._stream.flush()

    @property
    def rich_proxied_file(self) -> Any:
        """Where rich writes instead: the log has its own handlers, and no use for colours and bars."""
        return getattr(self._stream, "rich_proxied_file", self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"
