"""Say what to evaluate, and what comes of it, whatever is scored: tasks (``tasks``) or a text (``text``)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxlab.checks import check_choice, check_int
from mxlab.errors import RunError, SpecError
from mxlab.model.apply import Storage, check_storage
from mxlab.model.conversion import Conversion
from mxlab.recipe import Recipe
from mxlab.sources import models
from mxlab.sources.devices import AUTO, DTYPES, choose_device, choose_dtype, describe_dtype
from mxlab.sources.models import LoadedModel

# Name, dtype and device -> a model that the caller may change, as :func:`mxlab.sources.models.load_model`.
LoadModel = Callable[[str, str, str], LoadedModel]
logger = logging.getLogger("mxlab")


@dataclass(frozen=True)
class Outcome:
    """What an evaluation gave: the metrics file, what was converted, and what the file does not say."""

    metrics_file: Path
    results: dict[str, dict[str, Any]]
    conversion: Conversion
    forward_seconds: float
    scale_clamps: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class EvaluationRequest:
    """What every evaluation needs to know.

    Attributes:
        recipe: what to quantize.
        model: a hub name, a folder, or ``smollm2``.
        dtype: float32, bfloat16, float16 (by name, or torch's own), or auto for the fastest one that the device
            computes natively.
        device: auto, cpu, cuda, cuda:0, ...
        batch_size: rows or windows that go through the model at once.
        storage: how the quantized weights are kept, ``grid`` or ``packed``; see :func:`mxlab.apply`.
        data_dir: a folder with the data; None for the hub.

    Raises:
        SpecError, FormatError: a value out of range.
    """

    recipe: Recipe
    model: str = models.EMBEDDED
    dtype: str = AUTO
    device: str = "auto"
    batch_size: int = 16
    storage: Storage = "grid"
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in ("model", "device"):
            check_name(name, getattr(self, name))
        check_int("batch_size", self.batch_size, 1, None, "a whole number, 1 or more")
        check_storage(self.storage)
        object.__setattr__(self, "dtype", models.dtype_name(self.dtype))
        check_choice("dtype", self.dtype, (AUTO, *DTYPES))

    @property
    def sources(self) -> tuple[Hashable, ...]:
        """The model and the data it needs: where they fail for one evaluation, they fail for all with the same."""
        raise NotImplementedError

    def key(self) -> dict[str, Any]:
        """Return what tells it from others, as plain values: two with an equal key give the same result.

        Raises:
            SourceError: a file of the data is missing.
        """
        return {
            "recipe": self.recipe.hash,
            "model": models.identity(self.model),
            "revision": models.revision(self.model),
            "dtype": choose_dtype(self.dtype, choose_device(self.device)),
            "batch_size": self.batch_size,
            **({"storage": self.storage} if self.storage != "grid" else {}),  # runs of before it are still found
        }

    def evaluate(self, folder: Path, load: LoadModel) -> Outcome:
        """Run it; the metrics go to ``folder`` as ``metrics_<time>.json``, in lm-eval's layout."""
        raise NotImplementedError

    def load(self, load: LoadModel) -> LoadedModel:
        """Load the model in the dtype of the request; say which one ``auto`` is."""
        device = choose_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        if self.dtype == AUTO:
            logger.info("dtype auto is %s: %s", dtype, describe_dtype(device))
        return load(self.model, dtype, self.device)


def check_rules_acted(conversion: Conversion) -> None:
    """Raise RunError at a rule under which nothing computed; only warn where the model was compiled, which hides it."""
    if conversion.injection is not None and not conversion.injection.calls:
        raise RunError("None of the injected operators was called, so that the result would not be the recipe's")
    idle = conversion.idle_rules()
    if not idle:
        return
    others = f" (and {len(idle) - 1} more)" if len(idle) > 1 else ""
    remedy = (
        "it is for decode, and nothing was generated: texts and log-likelihoods are scored in prefill; choose a task "
        "that generates, or take the phase out of the rule"
        if idle[0].phase == "decode"
        else "no module that it quantizes took part; take the rule out, or evaluate what needs these modules"
    )
    message = f"{idle[0]}{others} never acted, so that the result would not be the recipe's: {remedy}"
    if any(hasattr(module, "_orig_mod") for module in conversion.model.modules()):
        logger.warning("%s (or its modules are compiled)", message)
        return
    raise RunError(message[0].upper() + message[1:])


def check_name(name: str, value: object) -> None:
    """Raise SpecError unless ``value`` is a text that is not empty."""
    if not isinstance(value, str) or not value:
        raise SpecError(f"{name} is {value!r}: it must be a name")
