"""One token behind a long text, quantized and not: what reading the keys and values of the text costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mxlab.bench import subjects
from mxlab.bench.results import BASELINE, Spread
from mxlab.bench.timing import Contender
from mxlab.bench.workload import Case, TextWorkload, check_count, check_dtypes, check_recipes
from mxlab.model import footprint


@dataclass(frozen=True, kw_only=True)
class DecodeWorkload(TextWorkload):
    """Further tokens at batch 1, one a call, behind the first ``context`` tokens of the texts."""

    repeats: int = 15
    context: int = 2048
    dtypes: tuple[str, ...] = ("bfloat16",)
    recipes: tuple[str, ...] = ("ex2",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("context", self.context)
        check_dtypes(self.dtypes)
        check_recipes(self.recipes)

    def __len__(self) -> int:
        """See :meth:`Workload.__len__`."""
        return len(self.dtypes) * len(self.recipes)

    def cases(self) -> Iterator[Case]:
        """See :meth:`Workload.cases`."""
        for dtype in self.in_order(self.dtypes):
            subject = subjects.load(self.model, dtype, self.device)
            ids, data = subjects.text(subject, self.context, self.data_dir)
            columns = {"model": self.model, "dtype": dtype, "context": f"{self.context} tokens, {data}"}
            columns |= {"threads": self.threads, "device": self.device}
            for name in self.recipes:
                recipe = subjects.variant(name, "exact")
                models = {
                    BASELINE: subject.model,
                    "grid": subjects.converted(subject.model, recipe),
                    subjects.PACKED: subjects.converted(subject.model, recipe, "packed"),
                }
                caches = {contender: subjects.read(model, ids) for contender, model in models.items()}
                yield Case(
                    f"a token behind {self.context}, {name} {dtype}",
                    {**columns, "recipe": name},
                    [
                        Contender(contender, partial(_one_token, models[contender], caches[contender]))
                        for contender in models
                    ],
                    self.effort_in(dtype),
                    partial(_figures, {contender: footprint.cache_bytes(cache) for contender, cache in caches.items()}),
                )


def _figures(sizes: dict[str, int], name: str, seconds: Spread, _: Spread | None) -> dict[str, float]:
    return {"ms/token": seconds.median * 1000, "MB of K and V": sizes[name] / 1e6}


@torch.no_grad()
def _one_token(model: Any, cache: Any) -> Tensor:
    """Return the logits behind one more token, which the cache then holds."""
    ids = torch.full((1, 1), 5, device=model.device)
    return model(ids, past_key_values=cache).logits
