"""One linear layer with quantized operands, against the same torch.nn.Linear."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from mxlab.bench import mxpackage
from mxlab.bench.results import PLAIN, Outcome, Row
from mxlab.bench.settings import Settings, check_dtypes, check_numerics, parse_shape
from mxlab.bench.timing import Twin, alternate, clock_for, spread
from mxlab.bench.workloads import variant
from mxlab.checks import check_int
from mxlab.compat.recipes import load_any_recipe
from mxlab.errors import SpecError
from mxlab.formats import Numerics
from mxlab.model.apply import linear_operands
from mxlab.model.nn.linear import MxLinear
from mxlab.recipe import Recipe, Rule
from mxlab.recipe.rule import PHASES

_NAME = "model.layers.0.self_attn.q_proj"  # as which a recipe's rules know the layer


@dataclass(frozen=True, kw_only=True)
class LinearSettings(Settings):
    """Every shape (in x out) with every number of tokens, in every dtype, under all numerics."""

    repeats: int = 21
    warmup: int = 2
    shapes: tuple[str, ...] = ("576x576", "576x192", "576x1536", "1536x576")
    tokens: tuple[int, ...] = (1, 2048)
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    numerics: tuple[Numerics, ...] = ("exact", "microxcaling")
    recipe: str = "ex1"

    def __post_init__(self) -> None:
        super().__post_init__()
        for shape in self.shapes:
            if len(parse_shape(shape)) != 2:
                raise SpecError(f"shape is {shape!r}: a linear layer has two axes, in x out, such as 576x1536")
        for count in self.tokens:
            check_int("tokens", count, 1, None, "a whole number, 1 or more")
        check_dtypes(self.dtypes)
        check_numerics(self.numerics)
        _rule(load_any_recipe(self.recipe))


def measure(settings: LinearSettings) -> Iterator[tuple[str, Outcome]]:
    """Case after case: what it is, and its rows."""
    for dtype in settings.in_order(settings.dtypes):
        for shape in settings.shapes:
            for count in settings.tokens:
                yield f"{shape} {dtype}, tokens: {count}", _outcome(settings, shape, dtype, count)


@torch.no_grad()
def _outcome(settings: LinearSettings, shape: str, dtype: str, tokens: int) -> Outcome:
    width, out = parse_shape(shape)
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    plain = nn.Linear(width, out, bias=False, dtype=kind, device=settings.place).eval()
    x = torch.randn(1, tokens, width, dtype=kind, device=settings.place)
    twins = [Twin(PLAIN, partial(plain, x))]
    twins += [Twin(name, partial(_quantized(plain, settings.recipe, name), x)) for name in settings.numerics]
    if settings.place.type == "cpu" and mxpackage.is_there():
        holder = nn.ModuleDict({"q_proj": plain})
        recipe = Recipe(
            "linear",
            (_rule(load_any_recipe(settings.recipe)),),
            elementwise=load_any_recipe(settings.recipe).elementwise,
        )
        guest = mxpackage.computing(holder, recipe, lambda module: module.get_submodule("q_proj")(x))
        twins += [guest] if guest else []
    timings = alternate(twins, settings.effort_in(dtype), clock_for(settings.place))
    case = {"in x out": shape, "tokens": tokens, "dtype": dtype, "recipe": settings.recipe, "threads": settings.threads}
    return Outcome(
        [_row({**case, "device": settings.device}, name, timings.samples) for name in timings.samples],
        [f"{name}, linear {shape}: {error}" for name, error in timings.failures.items()],
    )


def _row(case: dict[str, Any], twin: str, samples: dict[str, list[float]]) -> Row:
    figures = {"µs/call": spread(samples[twin]).median * 1e6}
    if twin == PLAIN:
        return Row(case, twin, samples[twin], figures=figures)
    return Row(case, twin, samples[twin], PLAIN, samples[PLAIN], figures)


def _quantized(linear: nn.Linear, recipe_name: str, numerics: str) -> MxLinear:
    recipe = variant(recipe_name, numerics)
    rule = _rule(recipe)
    quantizer = linear_operands(recipe, rule.formats)
    return MxLinear.convert(copy.deepcopy(linear), dict.fromkeys(PHASES, quantizer))


def _rule(recipe: Recipe) -> Rule:
    for rule in recipe.rules:
        if rule.matches(_NAME) and not rule.is_attention:
            return rule
    raise SpecError(f"recipe {recipe.name} quantizes no linear layer such as {_NAME}: choose another, such as ex1")
