"""One inspection as a folder: complete or absent, like the run directories of :mod:`mxlab.experiments.runs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxlab import rundir
from mxlab.errors import MetricError, SpecError
from mxlab.eval.scorer import check_context
from mxlab.eval.text import TextRequest, load_reference
from mxlab.experiments import runs
from mxlab.inspect.inspection import Inspection, inspect
from mxlab.inspect.remaining import Remaining, remaining
from mxlab.inspect.write import write_inspection, write_remaining
from mxlab.model.saved import check_same, conversion_of
from mxlab.sources import models, texts
from mxlab.sources.models import LoadedModel
from mxlab.sources.texts import CorpusText


def run(request: TextRequest, stage_folder: Path) -> tuple[Path, Inspection]:
    """Inspect the model of ``request`` on the first windows of its text, into a new folder of ``stage_folder``.

    Raises:
        MxlabError: as :func:`mxlab.inspect.inspection.inspect`; SourceError where the model or the text cannot be had;
            MetricError where the text is too short; RunError where the folder cannot be written; SpecError where the
            model is quantized already.
    """
    with runs.new_run(stage_folder) as folder:
        runs.write_origin(folder, request.recipe)
        text, loaded, rows = _read(request)
        if (carried := conversion_of(loaded.model)) is not None:
            raise SpecError(
                f"{request.model} is quantized already, under recipe {carried.recipe.name}: to see what it still "
                "loses, name the model that it was made from (--reference)"
            )
        inspection = inspect(loaded.model, request.recipe, rows)
        write_inspection(inspection, _origin(request, text, loaded.model.dtype), folder)
        return rundir.publish(folder, stage_folder, request.recipe.name), inspection


def run_remaining(request: TextRequest, stage_folder: Path) -> tuple[Path, Remaining]:
    """Inspect what the quantized model of ``request`` still loses beside its reference, into a new folder.

    Raises:
        MxlabError: as :func:`run` and :func:`mxlab.inspect.remaining.remaining`.
    """
    with runs.new_run(stage_folder) as folder:
        text, loaded, rows = _read(request)
        if (carried := conversion_of(loaded.model)) is None:
            raise SpecError(
                f"{request.model} is not quantized, and has lost nothing: to see what a recipe does, leave --reference "
                "out"
            )
        check_same(carried.recipe, request.recipe)
        runs.write_origin(folder, carried.recipe)
        found = remaining(loaded.model, load_reference(request, loaded.model, models.load_model), rows)
        write_remaining(found, _origin(request, text, loaded.model.dtype), folder)
        return rundir.publish(folder, stage_folder, found.recipe.name), found


def _read(request: TextRequest) -> tuple[CorpusText, LoadedModel, Tensor]:
    """Return the text, the model, and the token ids (windows, tokens)."""
    text = texts.load_text(request.text, request.data_dir)
    loaded = request.load(models.load_model)
    check_context(loaded.model, request.window)
    return text, loaded, first_windows(texts.encode(loaded.tokenizer, text), request.windows or 1, request.window)


def first_windows(ids: Tensor, windows: int, window: int) -> Tensor:
    """Return the first tokens of a text (tokens,) as (windows, tokens of a window).

    Raises:
        MetricError: there are not as many.
    """
    if len(ids) < windows * window:
        raise MetricError(
            f"the text has {len(ids)} tokens, fewer than {windows} windows of {window}: give a longer text, or fewer "
            "or shorter windows"
        )
    return ids[: windows * window].view(windows, window)


def _origin(request: TextRequest, text: CorpusText, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "model": models.identity(request.model),
        **({"reference": models.identity(request.reference)} if request.reference else {}),
        "dtype": str(dtype).removeprefix("torch."),
        "text": {"name": text.name, "sha256": text.sha256, "origin": text.origin},
    }
