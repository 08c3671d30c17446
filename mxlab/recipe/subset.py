"""Cut parts from a recipe: some of its roles, or some of its modules. Nothing here needs torch.

The rules of the recipe must name one module each, as :meth:`mxlab.model.plan.Plan.spelled_out` makes them: where rules
select by pattern, taking one away would let a later one step in.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from mxlab.errors import SpecError
from mxlab.recipe import Elementwise, Recipe
from mxlab.recipe.rule import ROLES, TRANSFORMED_ROLES, Rule

ELEMENTWISE = "elementwise"  # the rounding around the matmuls, as a role
ALL_ROLES = (*ROLES, ELEMENTWISE)


def only_roles(recipe: Recipe, roles: Collection[str]) -> Recipe:
    """Return what keeps only these of :data:`ALL_ROLES`."""
    rounds = ELEMENTWISE in roles and recipe.elementwise.is_used
    rules = tuple(
        kept
        for rule in _spelled_out(recipe)
        if (kept := _with_roles(rule, roles)).formats or (rounds and not rule.is_attention)
    )
    return replace(recipe, rules=rules, elementwise=recipe.elementwise if rounds else Elementwise())


def without_roles(recipe: Recipe, roles: Collection[str]) -> Recipe:
    """Return all but these of :data:`ALL_ROLES` are quantized."""
    return only_roles(recipe, [role for role in ALL_ROLES if role not in roles])


def only_modules(recipe: Recipe, names: Collection[str]) -> Recipe:
    """Return what keeps only the modules of these qualified names."""
    return replace(recipe, rules=tuple(rule for rule in _spelled_out(recipe) if rule.name in names))


def without_modules(recipe: Recipe, names: Collection[str]) -> Recipe:
    """Return all modules but those of these qualified names are quantized."""
    return replace(recipe, rules=tuple(rule for rule in _spelled_out(recipe) if rule.name not in names))


def _with_roles(rule: Rule, roles: Collection[str]) -> Rule:
    dropped: dict[str, Any] = {role: None for role in rule.formats if role not in roles}
    if not set(rule.formats).intersection(roles).intersection(TRANSFORMED_ROLES):
        dropped["transform"] = None
    return replace(rule, **dropped, k_offset=rule.k_offset and "k" in roles)


def _spelled_out(recipe: Recipe) -> tuple[Rule, ...]:
    """Return the rules. Raises SpecError where one does not name its module, or names it to skip it."""
    for rule in recipe.rules:
        if rule.name is None or rule.skip or rule.layers is not None:
            raise SpecError(
                f"recipe {recipe.name}: {rule} does not quantize one named module: spell the recipe out first"
            )
    return recipe.rules
