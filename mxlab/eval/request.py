"""What :func:`mxlab.experiments.runs.run` takes, whatever its kind, and what an evaluation gives."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from mxlab.model.conversion import Conversion
from mxlab.recipe import Recipe
from mxlab.sources.models import LoadedModel

# Name, dtype and device -> a model that the caller may change, as :func:`mxlab.sources.models.load_model`.
LoadModel = Callable[[str, str, str], LoadedModel]


@dataclass(frozen=True)
class Outcome:
    """What an evaluation gave: the metrics file, what was converted, and what the file does not say."""

    metrics_file: Path
    results: dict[str, dict[str, Any]]
    conversion: Conversion
    forward_seconds: float
    scale_clamps: Mapping[str, Mapping[str, int]]


class Evaluation(Protocol):
    """A frozen dataclass that says what to evaluate, and how."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def recipe(self) -> Recipe:
        """What to quantize."""
        ...

    @property
    def model(self) -> str:
        """What to evaluate: a hub name, a folder, or ``smollm2``."""
        ...

    @property
    def device(self) -> str:
        """Where: auto, cpu, cuda, cuda:0, ..."""
        ...

    @property
    def sources(self) -> tuple[Hashable, ...]:
        """The model and the data it needs: where they fail for one evaluation, they fail for all with the same."""
        ...

    @property
    def batch_size(self) -> int:
        """What goes through the model at once."""
        ...

    def key(self) -> dict[str, Any]:
        """What tells it from others, as plain values: two with an equal key give the same result."""
        ...

    def evaluate(self, folder: Path, load: LoadModel) -> Outcome:
        """Run it; the metrics go to ``folder`` as ``metrics_<time>.json``, in lm-eval's layout."""
        ...
