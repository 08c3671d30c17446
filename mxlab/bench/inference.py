"""Forward passes and greedy generation of a language model, quantized and not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mxlab.bench import mxpackage, subjects, targets
from mxlab.bench.results import BASELINE, Spread
from mxlab.bench.timing import Contender
from mxlab.bench.workload import (
    ATTENTIONS,
    Case,
    TextWorkload,
    check_choices,
    check_count,
    check_dtypes,
    check_numerics,
    check_recipes,
    tokens_per_second,
)
from mxlab.compat.recipes import load_any_recipe
from mxlab.formats import Numerics


@dataclass(frozen=True, kw_only=True)
class ForwardWorkload(TextWorkload):
    """A batch of rows through the model, for every dtype and attention, under all recipes and numerics.

    ``tokens`` cuts the rows, or is the length of random ones; None leaves them whole.
    """

    BY_DEVICE: ClassVar[dict[str, dict[str, Any]]] = {
        "cuda": {"model": "llama-1b-random", "batch": 32, "tokens": 128, "dtypes": ("bfloat16",)}
    }

    batch: int = 16
    tokens: int | None = None
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    attentions: tuple[str, ...] = ATTENTIONS
    recipes: tuple[str, ...] = ("ex1", "ex2")
    numerics: tuple[Numerics, ...] = ("exact", "microxcaling")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("batch", self.batch)
        if self.tokens is not None:
            check_count("tokens", self.tokens)
        check_dtypes(self.dtypes)
        check_choices("attention", self.attentions, ATTENTIONS)
        check_numerics(self.numerics)
        check_recipes(self.recipes)

    def __len__(self) -> int:
        """See :meth:`Workload.__len__`."""
        return len(self.dtypes) * len(self.attentions)

    def cases(self) -> Iterator[Case]:
        """See :meth:`Workload.cases`."""
        for dtype in self.in_order(self.dtypes):
            subject = subjects.load(self.model, dtype, self.device)
            ids, data = subjects.tokens(subject, self.batch, self.tokens, self.data_dir)
            columns = {"model": self.model, "dtype": dtype, "rows": data, "batch": self.batch, "tokens": ids.numel()}
            columns |= {"threads": self.threads, "device": self.device}
            quantized = self._quantized(subject.model)
            contenders = self._contenders(subject.model, quantized, dtype, ids)
            for attention in self.attentions:
                for model in (subject.model, *quantized.values()):
                    model.set_attn_implementation(attention)
                name = f"{self.model} {dtype} {attention}"
                yield Case(
                    name,
                    {**columns, "attention": attention},
                    contenders,
                    self.effort_in(dtype),
                    partial(tokens_per_second, ids.numel()),
                )

    def _quantized(self, plain: Any) -> dict[tuple[str, str], Any]:
        """Return copies by recipe and numerics, all held at the same time, so that they can take turns."""
        found = {
            (name, numerics): subjects.converted(plain, subjects.variant(name, numerics))
            for name in self.recipes
            for numerics in self.numerics
        }
        packed = {
            (name, subjects.PACKED): subjects.converted(plain, subjects.variant(name, "exact"), "packed")
            for name in self.recipes
            if "exact" in self.numerics and self.place.type == "cpu"
        }
        return found | packed

    def _contenders(
        self, plain: Any, quantized: dict[tuple[str, str], Any], dtype: str, ids: Tensor
    ) -> list[Contender]:
        found = [Contender(BASELINE, partial(_forward, plain, ids), {"recipe": "baseline"})]
        for (recipe, numerics), model in quantized.items():
            call, target = partial(_forward, model, ids), self._target(recipe, dtype, numerics)
            found.append(Contender(numerics, call, {"recipe": recipe}, target))
        if mxpackage.is_there() and self.place.type == "cpu":
            for name in self.recipes:
                other = mxpackage.computing(plain, load_any_recipe(name), partial(_forward, ids=ids), {"recipe": name})
                found += [other] if other else []
        return found

    def _target(self, recipe: str, dtype: str, contender: str) -> targets.Target | None:
        setting = {"model": self.model, "device": self.place.type, "dtype": dtype, "batch": self.batch}
        storage = "packed" if contender == subjects.PACKED else "grid"
        return targets.model_target("forward", recipe, **setting, threads=self.threads, storage=storage)


@dataclass(frozen=True, kw_only=True)
class GenerateWorkload(TextWorkload):
    """``tokens`` new tokens behind the first row at batch 1, whatever the model would stop at."""

    BY_DEVICE: ClassVar[dict[str, dict[str, Any]]] = {"cuda": {"model": "llama-1b-random"}}

    repeats: int = 5
    tokens: int = 64
    dtypes: tuple[str, ...] = ("bfloat16",)
    recipes: tuple[str, ...] = ("ex2",)
    numerics: tuple[Numerics, ...] = ("exact",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("tokens", self.tokens)
        check_dtypes(self.dtypes)
        check_numerics(self.numerics)
        check_recipes(self.recipes)

    def __len__(self) -> int:
        """See :meth:`Workload.__len__`."""
        return len(self.dtypes) * len(self.recipes) * len(self.numerics)

    def cases(self) -> Iterator[Case]:
        """See :meth:`Workload.cases`."""
        for dtype in self.in_order(self.dtypes):
            subject = subjects.load(self.model, dtype, self.device)
            ids, data = subjects.tokens(subject, 1, None, self.data_dir)
            columns = {"model": self.model, "dtype": dtype, "prompt": f"{ids.shape[1]} tokens, {data}"}
            columns |= {"new tokens": self.tokens, "threads": self.threads, "device": self.device}
            for name in self.recipes:
                for numerics in self.numerics:
                    quantized = subjects.converted(subject.model, subjects.variant(name, numerics))
                    contenders = [
                        Contender(BASELINE, partial(_generate, subject.model, ids, self.tokens)),
                        Contender(
                            numerics,
                            partial(_generate, quantized, ids, self.tokens),
                            target=self._target(name, dtype, "grid"),
                        ),
                    ]
                    if numerics == "exact" and self.place.type == "cpu":
                        packed = subjects.converted(subject.model, subjects.variant(name, numerics), "packed")
                        call, target = partial(_generate, packed, ids, self.tokens), self._target(name, dtype, "packed")
                        contenders.append(Contender(subjects.PACKED, call, target=target))
                    yield Case(
                        f"generating, {name} {numerics} {dtype}",
                        {**columns, "recipe": name},
                        contenders,
                        self.effort_in(dtype),
                        self._figures,
                    )

    def _figures(self, _: str, seconds: Spread, __: Spread | None) -> dict[str, float]:
        return {"ms/token": seconds.median * 1000 / self.tokens}

    def _target(self, recipe: str, dtype: str, storage: str) -> targets.Target | None:
        setting = {"model": self.model, "device": self.place.type, "dtype": dtype, "storage": storage}
        return targets.model_target("generate", recipe, **setting, tokens=self.tokens, threads=self.threads)


@torch.no_grad()
def _forward(model: Any, ids: Tensor) -> Tensor:
    """Call the model as lm-eval does: rows padded on the right, and no mask."""
    return model(ids).logits


@torch.no_grad()
def _generate(model: Any, ids: Tensor, count: int) -> Tensor:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
        pad_token_id=0,
    )
