"""A forward pass of a language model, quantized and not."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mxlab.bench import mxpackage, targets, workloads
from mxlab.bench.results import PLAIN, Outcome, Row
from mxlab.bench.settings import ATTENTIONS, TextSettings, check_choices, check_dtypes, check_numerics
from mxlab.bench.timing import Timings, Twin, alternate, clock_for, spread
from mxlab.checks import check_int
from mxlab.compat.recipes import load_any_recipe
from mxlab.formats import Numerics


@dataclass(frozen=True, kw_only=True)
class ForwardSettings(TextSettings):
    """A batch of rows through the model, for every dtype and attention, under all recipes and numerics.

    ``tokens`` cuts the rows, or is the length of random ones; None is as they are.
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
        check_int("batch", self.batch, 1, None, "a whole number, 1 or more")
        if self.tokens is not None:
            check_int("tokens", self.tokens, 1, None, "a whole number, 1 or more")
        check_dtypes(self.dtypes)
        check_choices("attention", self.attentions, ATTENTIONS)
        check_numerics(self.numerics)
        for name in self.recipes:
            load_any_recipe(name)


@dataclass(frozen=True)
class _Variant:
    """A twin of the model: under which name, recipe and numerics, and what it is called with."""

    recipe: str
    twin: str
    call: Twin


def measure(settings: ForwardSettings) -> Iterator[tuple[str, Outcome]]:
    """Case after case: what it is, and its rows."""
    for dtype in settings.in_order(settings.dtypes):
        subject = workloads.load(settings.model, dtype, settings.device)
        ids, data = workloads.tokens(subject, settings.batch, settings.tokens, settings.data_dir)
        models = _models(settings, subject.model)
        for attention in settings.attentions:
            for model in models.values():
                model.set_attn_implementation(attention)
            variants = _variants(settings, models, ids)
            case = _case(settings, dtype, attention, ids, data)
            yield f"{settings.model} {dtype} {attention}", _outcome(settings, case, variants)


def _models(settings: ForwardSettings, plain: Any) -> dict[tuple[str, str], Any]:
    """Return the model and its quantized copies, all held at the same time, so that they can take turns."""
    quantized = {
        (name, numerics): workloads.converted(plain, workloads.variant(name, numerics))
        for name in settings.recipes
        for numerics in settings.numerics
    }
    return {("baseline", PLAIN): plain, **quantized}


def _variants(settings: ForwardSettings, models: dict[tuple[str, str], Any], ids: Tensor) -> list[_Variant]:
    found = [
        _Variant(recipe, twin, Twin(f"{recipe} {twin}", partial(_forward, model, ids)))
        for (recipe, twin), model in models.items()
    ]
    if settings.place.type == "cpu" and mxpackage.is_there():
        plain = models["baseline", PLAIN]
        for name in settings.recipes:
            guest = mxpackage.computing(plain, load_any_recipe(name), lambda model: _forward(model, ids))
            if guest:
                call = Twin(f"{name} {guest.name}", guest.call, guest.optional, guest.patience)
                found.append(_Variant(name, guest.name, call))
    return found


@torch.no_grad()
def _forward(model: Any, ids: Tensor) -> Tensor:
    """As lm-eval calls it: rows padded on the right, and no mask."""
    return model(ids).logits


def _case(settings: ForwardSettings, dtype: str, attention: str, ids: Tensor, data: str) -> dict[str, Any]:
    return {
        "model": settings.model,
        "dtype": dtype,
        "attention": attention,
        "rows": data,
        "batch": settings.batch,
        "tokens": ids.numel(),
        "threads": settings.threads,
        "device": settings.device,
    }


def _outcome(settings: ForwardSettings, case: dict[str, Any], variants: list[_Variant]) -> Outcome:
    timings = alternate([v.call for v in variants], settings.effort_in(case["dtype"]), clock_for(settings.place))
    row = functools.partial(_row, settings, case, timings, variants[0].call.name)
    return Outcome(
        [row(v) for v in variants if v.call.name in timings.samples],
        [f"{name}, forward {case['dtype']}: {error}" for name, error in timings.failures.items()],
    )


def _row(settings: ForwardSettings, case: dict[str, Any], timings: Timings, first: str, variant: _Variant) -> Row:
    samples, reference = timings.samples[variant.call.name], timings.samples[first]
    case = {**case, "recipe": variant.recipe}
    figures = {"tokens/s": case["tokens"] / spread(samples).median}
    if variant.twin == PLAIN:
        return Row(case, PLAIN, samples, figures=figures)
    target = None
    if variant.twin != mxpackage.NAME:
        target = targets.model_target(
            "forward",
            variant.recipe,
            model=settings.model,
            device=settings.place.type,
            dtype=case["dtype"],
            batch=settings.batch,
            threads=settings.threads,
        )
    return Row(case, variant.twin, samples, PLAIN, reference, figures, target)
