"""TOML files as editors write them, whatever they hold."""

import codecs

import pytest

from mxlab import shipped
from mxlab.compat import mase
from mxlab.compat.recipes import load_any_recipe
from mxlab.errors import SpecError
from mxlab.experiments.format_study import load_study
from mxlab.experiments.sweep import load_sweep
from mxlab.recipe import Recipe, load_recipe

RECIPE = 'name = "mine"\n[[rules]]\npart = "mlp"\nweight = "fp4_e2m1@32"\n'
MASE = 'by = "type"\n[linear]\nname = "mxint"\nweight_block_size = 16\nweight_width = 4\n'
SWEEP = 'stage = "s"\nrecipe = "ex1"\n'
STUDY = 'formats = ["int8@32"]\n'


@pytest.mark.parametrize(
    ("load", "text"),
    [(load_recipe, RECIPE), (load_any_recipe, MASE), (mase.load, MASE), (load_sweep, SWEEP), (load_study, STUDY)],
)
def test_a_byte_order_mark_is_not_content(load, text, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_bytes(text.encode())
    expected = load(file)
    file.write_bytes(codecs.BOM_UTF8 + text.encode())
    assert load(file) == expected


def test_a_byte_order_mark_in_a_text():
    assert Recipe.from_toml("\ufeff" + RECIPE) == Recipe.from_toml(RECIPE)
    assert mase.load("\ufeff" + MASE) == mase.load(MASE)


def test_one_that_is_not_at_the_beginning_is_an_error():
    with pytest.raises(SpecError, match="recipe is not valid TOML"):
        shipped.parse_toml("a = 1\n\ufeffb = 2\n", "recipe")
