"""Build a task or a text evaluation request from plain settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from mxlab.errors import FormatError, SpecError
from mxlab.eval.request import EvaluationRequest
from mxlab.eval.tasks import TaskRequest
from mxlab.eval.text import TextRequest
from mxlab.recipe import Recipe


def _keys(kind: type[TaskRequest] | type[TextRequest]) -> list[str]:
    return [f.name for f in fields(kind) if f.name not in ("recipe", "data_dir")]


KEYS = tuple(dict.fromkeys([*_keys(TaskRequest), *_keys(TextRequest)]))


def conflicting_keys(values: Mapping[str, Any]) -> set[str]:
    """Return the keys that do not go with ``values``: those of tasks alone where a text is named, and the reverse."""
    tasks, text = set(_keys(TaskRequest)), set(_keys(TextRequest))
    return tasks - text if "text" in values else text - tasks if "tasks" in values else set()


def request_from(recipe: Recipe, values: Mapping[str, Any], data_dir: Path | None = None) -> EvaluationRequest:
    """Return the request that ``values``, its fields by name, ask for: a TextRequest where a text is named.

    Raises:
        SpecError: values that do not go together, or one that its key does not take.
    """
    kind = TextRequest if "text" in values else TaskRequest
    if strange := [key for key in values if key not in _keys(kind)]:
        reason = "is not for a text" if kind is TextRequest else "needs a text to score"
        raise SpecError(f"{strange[0]} is given, which {reason}: an evaluation is of tasks or of a text, not of both")
    if "tasks" in values:
        tasks = values["tasks"]
        values = {**values, "tasks": tuple(tasks) if isinstance(tasks, list | tuple) else (tasks,)}
    try:
        return kind(recipe=recipe, data_dir=data_dir, **values)
    except FormatError as e:
        raise SpecError(str(e)) from None
