"""Measure what a recipe gives: quantize, save, load what was saved, evaluate it beside the unquantized model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mxlab.compat.recipes import load_any_recipe
from mxlab.eval.text import TextRequest
from mxlab.ptq.job import RECORD, QuantizationJob
from mxlab.recipe import Recipe
from mxlab.rundir import RECIPE, read_json

METRICS = ("perplexity", "cross_entropy", "kl_divergence", "top1_agreement")


@dataclass(frozen=True)
class Measurement:
    """A model, and the text on which it is evaluated.

    Attributes:
        model: a hub name, a folder, or ``smollm2``.
        text: a text's name, or its file.
        window: tokens of a window.
        windows: the first so many windows; None for all.
        data_dir: a folder with the texts; None for the hub.
    """

    model: str
    text: str = "wikitext2"
    window: int = 2048
    windows: int | None = None
    data_dir: Path | None = None

    def of(self, recipe: Recipe, code: str, folder: Path | None = None) -> dict[str, Any]:
        """Return the metrics of a recipe, the bits it takes, the seconds and the memory that quantizing took.

        Args:
            recipe: with algorithms it is quantized first; without, everything is rounded to nearest.
            code: the version of mxlab.
            folder: where the quantized model goes, or is already; None for nowhere.

        Raises:
            RunError, SourceError, ConversionError, SpecError: as :meth:`QuantizationJob.run` and the evaluation.
        """
        with tempfile.TemporaryDirectory() as temporary:
            model, made, evaluated = self.model, {}, recipe
            if recipe.takes_calibration:
                saved = folder or Path(temporary) / "model"
                if not saved.exists():
                    QuantizationJob(self.model, recipe, code, data_dir=self.data_dir).run(saved, resume=True)
                model, made, evaluated = str(saved), read_json(saved / RECORD), load_any_recipe(saved / RECIPE)
            outcome = self._request(model, evaluated).evaluate(Path(temporary))
        [values] = outcome.results.values()
        return {
            "recipe": recipe.name,
            "model": self.model,
            "text": self.text,
            "window": self.window,
            "windows": self.windows,
            "tokens": values["tokens"],
            **{name: values[f"{name},none"] for name in METRICS},
            "bits_per_parameter": outcome.conversion.bits_per_parameter,
            "bits_per_weight": outcome.conversion.bits_per_weight,
            **{key: made[key] for key in ("seconds", "peak_memory_bytes") if key in made},
            "recipe_toml": recipe.to_toml(),
        }

    def _request(self, model: str, recipe: Recipe) -> TextRequest:
        return TextRequest(
            recipe=recipe,
            model=model,
            dtype="float32",
            batch_size=1,
            data_dir=self.data_dir,
            text=self.text,
            window=self.window,
            windows=self.windows,
            reference=self.model,
        )


def with_options(recipe: Recipe, changes: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """Return a recipe with options of its algorithms changed; those of an algorithm that it lacks are left out."""
    changed = {name: {**options, **changes.get(name, {})} for name, options in recipe.algorithms.items()}
    return replace(recipe, algorithms=changed)
