"""What the notebooks share: the settings of their runs, quiet logs, progress, a table and a figure of the results."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxlab import environment
from mxlab.errors import SpecError
from mxlab.experiments import runs
from mxlab.experiments.engines.local import Summary
from mxlab.progress import Steps, line_of, shown_by
from mxlab.report import dot_plots
from mxlab.report.read import read_tree
from mxlab.report.style import STYLE
from mxlab.sources import models, texts
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
    def texts(self) -> tuple[str, str]:
        """A text to evaluate on, and one to calibrate by: WikiText-2's, or where neither is at hand the passages."""
        if self.data_dir is not None:
            return "wikitext2", "wikitext2_valid"
        return (texts.PASSAGES, texts.PASSAGES) if self.model == models.EMBEDDED else ("wikitext2", "wikitext2_train")

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


def prepare() -> Settings:
    """Return the settings of this session; show warnings alone, and take Colab's token for the hub if it is there.

    Raises:
        SpecError: as :meth:`Settings.from_environment`.
    """
    logging.basicConfig(format="%(message)s")
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.WARNING)  # a run has its loggers say more, for its own log
    logging.getLogger("lm_eval").propagate = False  # it warns at every run that the model is loaded already
    environment.take_hub_token(_colab_secret)
    return Settings.from_environment()


def _colab_secret(name: str) -> str | None:
    """Return a secret of Colab's that this notebook may read; None elsewhere, or where there is none."""
    try:
        from google.colab import userdata  # pyright: ignore[reportMissingImports]

        return userdata.get(name)
    except Exception:  # no Colab, no such secret, or no leave to read it: each has an exception of its own
        return None


@contextmanager
def progress() -> Iterator[None]:
    """Show what works and how far it is in one line below the cell, as long as the context is open."""
    from IPython.display import display

    handle: Any = display({"text/plain": "..."}, raw=True, display_id=True)
    if handle is None:  # not in a notebook
        yield
        return
    reporter = _OneLine(lambda line: handle.update({"text/plain": line}, raw=True))
    with shown_by(reporter):
        yield
    handle.update({"text/plain": "done"}, raw=True)


class _OneLine:
    """Writes the steps that run into one line, twice a second at most."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._running: list[Steps] = []
        self._written = 0.0

    def begin(self, steps: Steps) -> None:
        self._running.append(steps)
        self._show()

    def advance(self, steps: Steps) -> None:
        self._show()

    def end(self, steps: Steps) -> None:
        if steps in self._running:
            self._running.remove(steps)

    def _show(self) -> None:
        if time.monotonic() - self._written > 0.5:
            self._written = time.monotonic()
            self._write("; ".join(map(line_of, self._running)))


def table(summary: Summary) -> Any:
    """Return a pandas table with a row for each run of a sweep: what was varied, and what was measured."""
    import pandas as pd

    rows = []
    for result in summary.results:
        measured = runs.read_metrics(result.folder) if result.folder else []
        metrics = {metric: float(value) for _, metric, value, _ in measured}
        rows.append({"stage": result.point.stage_folder.name, **result.point.values, **metrics})
    return pd.DataFrame(rows)


def figure(settings: Settings, stage: str) -> Any:
    """Return a picture of the runs of a stage beside the baseline."""
    import matplotlib as mpl
    from IPython.display import Image

    tree = read_tree(settings.results)
    results = tree.swept(stage) or tree.of_stage(stage)
    own = [result for result in results if result.run.model == settings.model]
    picture = io.BytesIO()
    with mpl.rc_context({**STYLE, "axes.grid.axis": "x"}):
        dot_plots.plot(own or results, tree.baselines).savefig(picture, bbox_inches="tight")
    return Image(data=picture.getvalue(), width=720)
