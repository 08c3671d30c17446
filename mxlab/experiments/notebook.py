"""What the notebooks share: the settings of their runs, from the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxlab import environment
from mxlab.errors import SpecError
from mxlab.sources import models
from mxlab.sources.tasks import PASSAGES

LLAMA = "meta-llama/Llama-3.2-1B"


@dataclass(frozen=True)
class Settings:
    """What the notebooks evaluate, and where their results go.

    Attributes:
        model: ``MXLAB_MODEL``, else Llama-3.2-1B (from the hub, with the token in ``HF_TOKEN``).
        tasks: ``MXLAB_TASKS``, separated by commas; else ``lambada_openai``, or for the embedded model without a data
            folder the embedded passages.
        limit: ``MXLAB_LIMIT``: rows, or a fraction below 1; None leaves each sweep its own.
        data_dir: ``MXLAB_DATA_DIR``, a folder with lambada_openai.jsonl; None for the hub.
        results: ``MXLAB_RESULTS``, else ``results``.
    """

    model: str
    tasks: tuple[str, ...]
    limit: float | None
    data_dir: Path | None
    results: Path

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] | None = None) -> Settings:
        """Return the settings of this session. Raises SpecError where ``MXLAB_LIMIT`` is not a number."""
        given = environment.variables() if variables is None else variables
        model = given.get(environment.MODEL) or LLAMA
        folder = given.get(environment.DATA_DIR)
        embedded = model == models.EMBEDDED and not folder
        tasks = given.get(environment.TASKS) or (PASSAGES if embedded else "lambada_openai")
        results = Path(given.get(environment.RESULTS) or "results")
        limit = _number(given.get(environment.LIMIT))
        return cls(model, tuple(tasks.split(",")), limit, Path(folder) if folder else None, results)

    @property
    def of_sweep(self) -> dict[str, Any]:
        """What :func:`mxlab.experiments.sweep.with_settings` takes."""
        chosen = {"model": self.model, "tasks": list(self.tasks)}
        return chosen if self.limit is None else {**chosen, "limit": self.limit}


def _number(text: str | None) -> float | None:
    try:
        return None if not text else float(text) if float(text) < 1 else int(text)
    except ValueError:
        raise SpecError(f"MXLAB_LIMIT is {text!r}: it must be a number of rows, or a fraction below 1") from None
