"""Recipes from any file that mxlab reads: its own, and those of other tools."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mxlab import shipped
from mxlab.recipe import Recipe, load_recipe

logger = logging.getLogger("mxlab")


def load_any_recipe(recipe: Recipe | str | Path) -> Recipe:
    """Return a recipe from a shipped name (``ex1``), a TOML file of mxlab's or of MASE's, or as it is.

    What there is to say of a file of MASE's (:mod:`mxlab.compat.mase`) is logged as warnings.

    Raises:
        SpecError: no such recipe or file, or one that cannot be read.
    """
    return load_recipe(recipe, readers=(_read_mase,))


def is_of_mase(name: str | Path) -> bool:
    """Return whether a recipe's name, or file, is that of one of MASE's files. Raises SpecError as above."""
    from mxlab.compat.mase import recipe as mase

    values = shipped.read_toml(shipped.find("recipe", name), str(name))
    return "name" not in values and "rules" not in values and mase.recognises(values)


def _read_mase(values: Mapping[str, Any], name: str, source: str) -> Recipe | None:
    from mxlab.compat.mase import recipe as mase  # only for a file that is not ours

    if not mase.recognises(values):
        return None
    config = mase.read(values, name, source)
    for note in config.notes:
        logger.warning("%s: %s", source, note)
    return config.recipe
