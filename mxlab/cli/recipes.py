"""Find the recipe that a command line means."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mxlab.compat.recipes import load_any_recipe
from mxlab.errors import SpecError
from mxlab.recipe import Recipe
from mxlab.recipe.carried import recipe_of_model
from mxlab.recipe.mx_specs import ENVIRONMENT_VARIABLE, MxSpecs, override, parse_assignment


def chosen_recipe(name: str | None, assignments: list[str], model: str) -> Recipe:
    """Return the recipe called ``name``; where none is named that of MX_SPECS_JSON, or the one that ``model`` carries.

    Raises:
        SpecError: several of them, or assignments to one that quantizes nothing.
    """
    specs = MxSpecs.from_environment()
    if specs is not None and name is not None:
        raise SpecError(
            f"{ENVIRONMENT_VARIABLE} is set and --recipe {name} is given: that would quantize twice. Unset the "
            "variable, or leave --recipe out to evaluate under it"
        )
    if specs is not None:
        recipe = specs.to_recipe("mx_specs")
    elif name is None:
        recipe = recipe_of_model(model) or load_any_recipe("baseline")
    else:
        recipe = load_any_recipe(name)
    changed = override(recipe, assigned(assignments))
    if assignments and not changed.quantizes:
        raise SpecError(f"recipe {recipe.name} quantizes nothing, so that --set {assignments[0]} has no effect")
    # A recipe that quantizes is no baseline, and must not stand among them.
    return replace(changed, name="custom") if changed.quantizes and not recipe.quantizes else changed


def chosen_recipes(names: list[str] | None, assignments: list[str] | None, model: str) -> list[Recipe]:
    """Return the recipes of these names, or without any the one that :func:`chosen_recipe` finds; raises as that."""
    return [chosen_recipe(name, assignments or [], model) for name in names or [None]]


def assigned(assignments: list[str]) -> dict[str, Any]:
    """Return the options of ``--set name=value`` by name."""
    return dict(map(parse_assignment, assignments))
