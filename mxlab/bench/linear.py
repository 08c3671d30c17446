"""One linear layer with quantized operands, against the same torch.nn.Linear."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from mxlab.bench import mxpackage
from mxlab.bench.results import BASELINE
from mxlab.bench.subjects import PACKED, variant
from mxlab.bench.timing import Contender
from mxlab.bench.workload import Case, Workload, check_count, check_dtypes, check_numerics, parse_shape
from mxlab.compat.recipes import load_any_recipe
from mxlab.errors import SpecError
from mxlab.formats import Numerics
from mxlab.model.apply import linear_operands
from mxlab.model.nn.linear import MxLinear
from mxlab.model.nn.packed import pack
from mxlab.recipe import Recipe, Rule
from mxlab.recipe.rule import PHASES

_NAME = "model.layers.0.self_attn.q_proj"  # by which a recipe's rules know the layer


@dataclass(frozen=True, kw_only=True)
class LinearWorkload(Workload):
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
            check_count("tokens", count)
        check_dtypes(self.dtypes)
        check_numerics(self.numerics)
        _rule(load_any_recipe(self.recipe))

    def __len__(self) -> int:
        """See :meth:`Workload.__len__`."""
        return len(self.dtypes) * len(self.shapes) * len(self.tokens)

    def cases(self) -> Iterator[Case]:
        """See :meth:`Workload.cases`."""
        for dtype, shape, count in product(self.in_order(self.dtypes), self.shapes, self.tokens):
            columns = {"in x out": shape, "tokens": count, "dtype": dtype, "recipe": self.recipe}
            yield Case(
                f"linear {shape} {dtype}, tokens: {count}",
                {**columns, "threads": self.threads, "device": self.device},
                self._contenders(parse_shape(shape), getattr(torch, dtype), count),
                self.effort_in(dtype),
                lambda _, seconds, __: {"µs/call": seconds.median * 1e6},
            )

    def _contenders(self, shape: tuple[int, ...], dtype: torch.dtype, tokens: int) -> list[Contender]:
        width, out = shape
        torch.manual_seed(0)
        plain = nn.Linear(width, out, bias=False, dtype=dtype, device=self.place).eval()
        x = torch.randn(1, tokens, width, dtype=dtype, device=self.place)
        found = [Contender(BASELINE, _on(plain, x))]
        found += [Contender(name, _on(_quantized(plain, self.recipe, name), x)) for name in self.numerics]
        if "exact" in self.numerics and self.place.type == "cpu":
            packed = _quantized(plain, self.recipe, "exact")
            pack(packed, _NAME)
            found.append(Contender(PACKED, _on(packed, x)))
        if mxpackage.is_there() and self.place.type == "cpu":
            recipe = load_any_recipe(self.recipe)
            alone = Recipe("linear", (_rule(recipe),), elementwise=recipe.elementwise)
            holder = nn.ModuleDict({"q_proj": plain})
            other = mxpackage.computing(holder, alone, lambda module: _on(module.get_submodule("q_proj"), x)())
            found += [other] if other else []
        return found


def _on(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return partial(torch.no_grad()(layer.__call__), x)


def _quantized(linear: nn.Linear, recipe_name: str, numerics: str) -> MxLinear:
    recipe = variant(recipe_name, numerics)
    operands = linear_operands(recipe, _rule(recipe).formats)
    return MxLinear.convert(copy.deepcopy(linear), dict.fromkeys(PHASES, operands))


def _rule(recipe: Recipe) -> Rule:
    for rule in recipe.rules:
        if rule.matches(_NAME) and not rule.is_attention:
            return rule
    raise SpecError(f"recipe {recipe.name} quantizes no linear layer such as {_NAME}: choose another, such as ex1")
