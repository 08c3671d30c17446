"""The parts of a recipe on one model: its roles, the decoder layers, the projections."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from mxlab.inspect.operands import projection_of
from mxlab.model.apply import linear_operands
from mxlab.model.plan import QuantizedSite, make_plan
from mxlab.recipe import Recipe
from mxlab.recipe.rule import ROLES
from mxlab.recipe.subset import ELEMENTWISE, only_modules, only_roles, without_modules, without_roles

GROUPS = ("role", "layer", "projection")  # the ways to cut a recipe into parts
OUTSIDE = "outside"  # the layer of a module outside the layers

# What a role is called where it is to blame; K and V share the blame.
_ROLE_NAMES = {"weight": "weights", "activation": "activations", "k": "KV", "v": "KV"}


@dataclass(frozen=True)
class Cut:
    """A part of a recipe, and the two recipes that single it out."""

    group: str
    name: str
    alone: Recipe
    without: Recipe


def cut(model: nn.Module, recipe: Recipe) -> tuple[Recipe, list[Cut]]:
    """Return the recipe, spelled out, and its parts."""
    plan = make_plan(model, recipe)
    sites, whole = plan.sites, plan.spelled_out()
    roles = [
        Cut("role", name, only_roles(whole, members), without_roles(whole, members))
        for name, members in _roles(sites, recipe).items()
    ]
    layers = _gathered((OUTSIDE if site.layer is None else str(site.layer), site) for site in sites)
    projections = _gathered((_projection(site), site) for site in sites)
    modules = [
        Cut(group, name, only_modules(whole, members), without_modules(whole, members))
        for group, found in (("layer", layers), ("projection", projections))
        for name, members in found.items()
    ]
    return whole, [*roles, *modules]


def _roles(sites: Sequence[QuantizedSite], recipe: Recipe) -> dict[str, list[str]]:
    """Return the roles that are quantized, by what they are called together."""
    present = {role for site in sites for role in site.formats}
    named: defaultdict[str, list[str]] = defaultdict(list)
    for role in (role for role in ROLES if role in present):
        named[_ROLE_NAMES.get(role, role)].append(role)
    untouched = linear_operands(recipe, {}).untouched
    if any(site.weight.dtype not in untouched for site in sites if site.kind != "attention"):
        named[ELEMENTWISE].append(ELEMENTWISE)
    return dict(named)


def _gathered(named: Iterable[tuple[str, QuantizedSite]]) -> dict[str, list[str]]:
    """Return the modules of each name."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name, site in named:
        found[name].append(site.name)
    return dict(found)


def _projection(site: QuantizedSite) -> str:
    """Return the name of its kind, and of an attention, which has no weight, what is quantized there."""
    name = projection_of(site.name)
    return f"{name} ({', '.join(site.formats)})" if site.kind == "attention" else name
