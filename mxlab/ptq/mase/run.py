"""Quantize a model by the algorithms that a MASE file asks for, in MASE's order."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from mxlab.errors import ConversionError
from mxlab.model.apply import finish
from mxlab.model.conversion import Conversion
from mxlab.ptq.calibration import Windows
from mxlab.ptq.mase.rotation import converted, searched
from mxlab.ptq.mase.tables import MaseTables
from mxlab.ptq.mase.weights import Weights, chosen_weights
from mxlab.ptq.resume import Progress
from mxlab.recipe import Recipe
from mxlab.recipe.recipe import MASE
from mxlab.recipe.transform import Derotated

_SEARCH = "rotation_search"

logger = logging.getLogger("mxlab")


def quantize_model(model: Any, original: Any, recipe: Recipe, windows: Windows, progress: Progress) -> Conversion:
    """Convert ``model`` in place as a MASE file says, with MASE's meaning of its tables.

    Args:
        model: the model, in evaluation mode.
        original: another copy of it; it cannot be used for anything else afterwards.
        recipe: of the file.
        windows: ``ids`` for GPTQ, ``rest`` for the search of rotations (:func:`mxlab.ptq.mase.windows.windows`).
        progress: where the steps are kept.

    Raises:
        SpecError: a table asks for what cannot be done.
        ConversionError: the recipe does not fit the model, or a table a layer.
    """
    if recipe.numerics != "exact":
        raise ConversionError(f"recipe {recipe.name}: MASE's tables are computed in exact numerics: take numerics out")
    tables = MaseTables.of(recipe)
    if tables.gptq is not None:
        logger.info(
            "MASE's GPTQ: the inputs of a block are rounded at once; second moments of activations not quantized"
        )
    weights = chosen_weights(original, recipe, tables, windows.ids, progress)
    found = _rotated(model, recipe, tables, weights, windows, progress)
    if any(isinstance(rule.transform, Derotated) for rule in found.rules):
        logger.warning(
            "MASE's rotations are undone before the product: what is multiplied is not on the grid of the format, "
            "which holds for what is stored alone"
        )
    return finish(converted(model, found, weights))


def _rotated(
    model: Any, recipe: Recipe, tables: MaseTables, weights: Weights, windows: Windows, progress: Progress
) -> Recipe:
    """Return the recipe with the rotations that were found in its rules, and without the table that asks for them."""
    if (table := tables.rotation) is None:
        return recipe
    return progress.recipe(_SEARCH, lambda: _without_search(searched(model, recipe, table, weights, windows.rest)))


def _without_search(recipe: Recipe) -> Recipe:
    others = {name: table for name, table in recipe.algorithms[MASE].items() if name != _SEARCH}
    return replace(recipe, algorithms={MASE: others} if others else {})
