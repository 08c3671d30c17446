"""Parts of a recipe: what is left when roles or modules are taken away."""

import pytest

from mxlab.errors import SpecError
from mxlab.formats import MXFormat
from mxlab.recipe import Elementwise, Recipe
from mxlab.recipe.rule import Rule
from mxlab.recipe.subset import ALL_ROLES, only_modules, only_roles, without_modules, without_roles

FP4, FP8 = MXFormat.parse("fp4_e2m1@16"), MXFormat.parse("fp8_e4m3@16")
LINEAR = Rule(name="layers.0.up", weight=FP4, activation=FP8)
DECODE = Rule(name="layers.1.up", phase="decode", weight=FP4)
ATTENTION = Rule(name="layers.0.attn", k=FP4, v=FP8)
RECIPE = Recipe("r", (LINEAR, DECODE, ATTENTION), "microxcaling", Elementwise(bfloat=16))


def test_only_some_roles():
    assert only_roles(RECIPE, ("weight",)) == Recipe(
        "r", (Rule(name="layers.0.up", weight=FP4), DECODE), "microxcaling", Elementwise()
    )
    assert only_roles(RECIPE, ("k", "v")).rules == (ATTENTION,)
    assert only_roles(RECIPE, ()).rules == ()


def test_all_roles_are_the_recipe():
    assert only_roles(RECIPE, ALL_ROLES) == RECIPE
    assert without_roles(RECIPE, ()) == RECIPE


def test_without_roles_is_the_rest():
    assert without_roles(RECIPE, ("weight", "k")) == only_roles(RECIPE, ("activation", "v", "elementwise"))


def test_rounding_around_matmuls_is_a_role_of_linear_layers():
    alone = only_roles(RECIPE, ("elementwise",))
    assert alone.rules == (Rule(name="layers.0.up"), Rule(name="layers.1.up", phase="decode"))
    assert alone.elementwise == RECIPE.elementwise
    assert without_roles(RECIPE, ("elementwise",)) == Recipe("r", RECIPE.rules, "microxcaling", Elementwise())


def test_modules():
    assert only_modules(RECIPE, ["layers.0.up", "layers.0.attn"]).rules == (LINEAR, ATTENTION)
    assert without_modules(RECIPE, ["layers.0.up"]).rules == (DECODE, ATTENTION)
    assert only_modules(RECIPE, ["layers.0.up"]).elementwise == RECIPE.elementwise


@pytest.mark.parametrize(
    "rule", [Rule(modules=".*up", weight=FP4), Rule(part="mlp", weight=FP4), Rule(name="layers.0.up", skip=True)]
)
def test_recipes_that_choose_by_pattern_are_refused(rule):
    recipe = Recipe("loose", (LINEAR, rule))
    for restrict in (only_roles, without_roles, only_modules, without_modules):
        with pytest.raises(SpecError, match=r"recipe loose: the rule for .* does not quantize one named module"):
            restrict(recipe, ("weight",))


def test_what_transforms_and_offsets_are_for_goes_with_its_roles():
    values = [
        {"name": "a", "weight": "fp4@32", "activation": "fp4@32", "bias": "fp8_e4m3@32", "transform": "hadamard@32"},
        {"name": "b", "k": "int4@32", "v": "int4@32", "transform": "hadamard", "k_offset": True},
    ]
    recipe = Recipe.from_dict({"name": "r", "rules": values})
    assert only_roles(recipe, ALL_ROLES) == recipe
    [bias] = only_roles(recipe, ["bias"]).rules
    assert bias.transform is None
    [v] = only_roles(recipe, ["v"]).rules
    assert v.transform is not None
    assert not v.k_offset
