"""The two kinds of evaluation, lm-eval's tasks and a text's perplexity, told apart by the values given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from mxlab.errors import FormatError, SpecError
from mxlab.eval.request import Evaluation
from mxlab.eval.tasks import Request
from mxlab.eval.text import TextRequest
from mxlab.recipe import Recipe


def _keys(kind: type[Request] | type[TextRequest]) -> list[str]:
    return [f.name for f in fields(kind) if f.name not in ("recipe", "data_dir")]


KEYS = tuple(dict.fromkeys([*_keys(Request), *_keys(TextRequest)]))


def displaced(values: Mapping[str, Any]) -> set[str]:
    """The keys that have no place beside ``values``: those of tasks alone where a text is named, and the reverse."""
    tasks, text = set(_keys(Request)), set(_keys(TextRequest))
    return tasks - text if "text" in values else text - tasks if "tasks" in values else set()


def make(recipe: Recipe, values: Mapping[str, Any], data_dir: Path | None = None) -> Evaluation:
    """The evaluation that ``values``, fields of a Request or a TextRequest, ask for: the latter where a text is named.

    Raises:
        SpecError: values that do not go together, or one that its key does not take.
    """
    kind = TextRequest if "text" in values else Request
    if strange := [key for key in values if key not in _keys(kind)]:
        reason = "is not for a text" if kind is TextRequest else "needs a text to score"
        raise SpecError(f"{strange[0]} is given, which {reason}: an evaluation is of tasks or of a text, not of both")
    if "tasks" in values:
        values = {**values, "tasks": _listed(values["tasks"])}
    try:
        return kind(recipe=recipe, data_dir=data_dir, **values)
    except FormatError as e:
        raise SpecError(str(e)) from None


def _listed(tasks: Any) -> tuple[str, ...]:
    return tuple(tasks) if isinstance(tasks, list | tuple) else (tasks,)
