"""An inspection of one model under one recipe: :func:`inspect`."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from mxlab.compat.recipes import load_any_recipe
from mxlab.errors import SpecError
from mxlab.inspect.operands import Operand, collect
from mxlab.inspect.sensitivity import Sensitivity, sensitivity
from mxlab.inspect.statistics import Statistics
from mxlab.model.apply import Conversion, apply
from mxlab.progress import track
from mxlab.recipe import Recipe
from mxlab.recipe.rule import ROLES

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Inspection:
    """What a recipe does to every operand of a model, and what each part of it costs.

    ``rows`` are the windows and the tokens of each. ``notes`` are what a user should know of the conversion.
    """

    recipe: Recipe
    rows: tuple[int, int]
    operands: tuple[Operand, ...]
    sensitivity: Sensitivity
    notes: tuple[str, ...]

    def by(self, key: Callable[[Operand], Key]) -> dict[Key, Statistics]:
        """Return the statistics of all operands with the same key, together; those of weights first."""
        found: defaultdict[Key, Statistics] = defaultdict(Statistics)
        for operand in sorted(self.operands, key=lambda o: ROLES.index(o.role)):
            found[key(operand)] += operand.statistics
        return dict(found)

    def worst(self, role: str, count: int) -> list[Operand]:
        """Return the operands of a role with the lowest SQNR, the lowest first."""
        return sorted((o for o in self.operands if o.role == role), key=lambda o: o.statistics.sqnr_db)[:count]

    @property
    def roles(self) -> list[str]:
        """The roles that are quantized."""
        present = {operand.role for operand in self.operands}
        return [role for role in ROLES if role in present]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON: histograms for each projection, other figures for each module."""
        windows, window = self.rows
        kinds = self.by(lambda o: (o.projection, o.role, o.format))
        return {
            "kind": "recipe",
            "recipe": self.recipe.name,
            "hash": self.recipe.hash,
            "windows": windows,
            "window": window,
            "notes": list(self.notes),
            "sensitivity": asdict(self.sensitivity),
            "operands": [
                {"module": o.module, "role": o.role, "format": o.format, **o.statistics.summary()}
                for o in self.operands
            ],
            "histograms": [
                {"projection": projection, "role": role, "format": fmt, **found.histograms()}
                for (projection, role, fmt), found in kinds.items()
            ],
        }


def inspect(model: Any, recipe: Recipe | str | Path, rows: Tensor) -> Inspection:
    """Inspect ``model`` under ``recipe`` on calibration text; the model is not changed.

    Every pass is a prefill: formats for decode alone do not take part. Where the recipe has attention computed eagerly,
    so it is in all passes, that of the unquantized model too.

    Args:
        model: an unquantized Hugging Face causal LM in evaluation mode; one more copy of it must fit into memory.
        recipe: a Recipe, the name of a shipped one, or a TOML file.
        rows: (windows, tokens) of token ids.

    Raises:
        SpecError: no such recipe, or one that quantizes nothing in prefill.
        ConversionError: the recipe does not fit the model.
        MetricError: an operand or the logits of the unquantized model hold NaN or infinities.
    """
    chosen = load_any_recipe(recipe)
    conversion = apply(copy.deepcopy(model), chosen)
    if not any(site.formats for site in conversion.sites):
        raise SpecError(
            f"recipe {chosen.name} gives no operand of this model a format in prefill: there is nothing to inspect"
        )
    notes = tuple(conversion.notes)
    with _attention_of(model, conversion):
        del conversion  # and its model
        batches = track(list(rows.to(model.device).split(1)), "statistics")
        operands = tuple(collect(model, chosen, batches))
        costs = sensitivity(model, chosen, rows)
    return Inspection(chosen, (rows.shape[0], rows.shape[1]), operands, costs, notes)


@contextmanager
def _attention_of(model: Any, conversion: Conversion) -> Iterator[None]:
    """Let ``model`` compute its attention as the converted one does."""
    present, wanted = (getattr(m.config, "_attn_implementation", None) for m in (model, conversion.model))
    if present == wanted:
        yield
        return
    model.set_attn_implementation(wanted)
    try:
        yield
    finally:
        model.set_attn_implementation(present)
