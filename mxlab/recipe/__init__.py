"""What to quantize, as data: which modules, which of their roles, in which format. No torch.

Read in this order: ``rule`` (one rule: modules, layers, phase, and the format of each role), ``recipe`` (ordered rules,
the numerics and the element-wise rounding; TOML in and out; one hash), ``subset`` (parts of a recipe), ``mx_specs``
(microxcaling's options, as a recipe), ``carried`` (the recipe in a saved model's configuration).
"""

from mxlab.recipe.recipe import ALGORITHMS, Elementwise, Recipe, load_recipe
from mxlab.recipe.rule import (
    ATTENTION_ROLES,
    KV_ROLES,
    LINEAR_ROLES,
    PARTS,
    PHASES,
    ROLES,
    SELECTORS,
    Part,
    Phase,
    Rule,
)

__all__ = [
    "ALGORITHMS",
    "ATTENTION_ROLES",
    "KV_ROLES",
    "LINEAR_ROLES",
    "PARTS",
    "PHASES",
    "ROLES",
    "SELECTORS",
    "Elementwise",
    "Part",
    "Phase",
    "Recipe",
    "Rule",
    "load_recipe",
]
