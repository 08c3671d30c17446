"""docs/recipes.md says what is true: its example, its table of architectures."""

import re

import pytest

import mxlab
from mxlab.errors import ConversionError
from mxlab.model import sites
from mxlab.recipe import Recipe
from mxlab.recipe.rule import ATTENTION_ROLES

from support import architectures
from support.paths import ROOT

PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
INT8 = mxlab.MXFormat("int8", 8)


def rows() -> dict[str, tuple[str, str]]:
    table = PAGE.partition("<!-- architectures -->")[2].partition("<!-- end -->")[0]
    found = re.findall(r"^\| ([\w.]+) \| ([\d, ]+) \| ([\w, ]+) \|$", table, re.MULTILINE)
    return {name: (linears, roles) for name, linears, roles in found}


def test_every_architecture_is_in_the_table():
    assert sorted(rows()) == sorted(architectures.MODELS)


@pytest.mark.parametrize("name", sorted(architectures.MODELS))
def test_a_row(name):
    linears, roles = rows()[name]
    model = architectures.build(name)
    parts = [site.part for site in sites.find_sites(model) if site.kind != "attention" and site.layer == 0]
    assert linears == f"{parts.count('mlp')}, {parts.count('attention')}"
    assert roles.split(", ") == [role for role in ATTENTION_ROLES if serves(name, role)]


def serves(name: str, role: str) -> bool:
    rule = mxlab.Rule(part="attention", **{role: INT8})
    try:
        mxlab.apply(architectures.build(name), Recipe("test", (rule,)))
    except ConversionError:
        return False
    return True


@pytest.mark.parametrize("text", re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL))
def test_an_example(text):
    recipe = Recipe.from_toml(text)
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    model = architectures.build("llama", num_hidden_layers=4)
    conversion = mxlab.apply(model, recipe)
    formats = {site.name: site for site in conversion.sites}
    assert "model.layers.0.mlp.down_proj" not in formats
    assert str(formats["model.layers.3.mlp.up_proj"].formats["weight"]) == "fp8_e4m3@32,scale_rule=rceil"
    assert str(formats["model.layers.2.mlp.up_proj"].formats["weight"]) == "fp4_e2m1@16,scale=e4m3"
    assert str(formats["model.layers.2.self_attn"].by_phase["decode"]["k"]) == "int4@32"
