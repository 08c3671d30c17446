"""Greedy generation at batch 1, quantized and not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mxlab.bench import targets, workloads
from mxlab.bench.results import PLAIN, Outcome, Row
from mxlab.bench.settings import TextSettings, check_dtypes, check_numerics
from mxlab.bench.timing import Twin, alternate, clock_for, spread
from mxlab.checks import check_int
from mxlab.compat.recipes import load_any_recipe
from mxlab.formats import Numerics


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(TextSettings):
    """``tokens`` new tokens behind the first row, whatever the model would stop at."""

    BY_DEVICE: ClassVar[dict[str, dict[str, Any]]] = {"cuda": {"model": "llama-1b-random"}}

    repeats: int = 5
    tokens: int = 64
    dtypes: tuple[str, ...] = ("bfloat16",)
    recipes: tuple[str, ...] = ("ex2",)
    numerics: tuple[Numerics, ...] = ("exact",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("tokens", self.tokens, 1, None, "a whole number, 1 or more")
        check_dtypes(self.dtypes)
        check_numerics(self.numerics)
        for name in self.recipes:
            load_any_recipe(name)


def measure(settings: GenerateSettings) -> Iterator[tuple[str, Outcome]]:
    """Case after case: what it is, and its rows."""
    for dtype in settings.in_order(settings.dtypes):
        subject = workloads.load(settings.model, dtype, settings.device)
        ids, data = workloads.tokens(subject, 1, None, settings.data_dir)
        case = {"model": settings.model, "dtype": dtype, "prompt": f"{ids.shape[1]} tokens, {data}"}
        for name in settings.recipes:
            for numerics in settings.numerics:
                twin = workloads.converted(subject.model, workloads.variant(name, numerics))
                yield f"{name} {numerics} {dtype}", _outcome(settings, case, subject.model, twin, ids, name, numerics)


def _outcome(
    settings: GenerateSettings, case: dict[str, Any], plain: Any, quantized: Any, ids: Tensor, name: str, numerics: str
) -> Outcome:
    twins = [
        Twin(PLAIN, partial(_generate, plain, ids, settings.tokens)),
        Twin(numerics, partial(_generate, quantized, ids, settings.tokens)),
    ]
    samples = alternate(twins, settings.effort_in(case["dtype"]), clock_for(settings.place)).samples
    case = {**case, "recipe": name, "new tokens": settings.tokens, "threads": settings.threads}
    case = {**case, "device": settings.device}
    target = targets.model_target(
        "generate",
        name,
        model=settings.model,
        device=settings.place.type,
        dtype=case["dtype"],
        tokens=settings.tokens,
        threads=settings.threads,
    )
    figures = {twin: {"ms/token": spread(s).median * 1000 / settings.tokens} for twin, s in samples.items()}
    return Outcome(
        [
            Row(case, PLAIN, samples[PLAIN], figures=figures[PLAIN]),
            Row(case, numerics, samples[numerics], PLAIN, samples[PLAIN], figures[numerics], target),
        ]
    )


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
