"""MASE's search of rotations: kinds of layers, greedily, by the perplexity of a calibration text.

In each round every kind that is left is rotated in all layers, on top of those that were chosen before; the one with
the lowest perplexity is chosen, until none lowers it by more than a threshold.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mxlab.errors import ConversionError
from mxlab.eval.metrics import Loss, next_token_loss
from mxlab.formats import MXFormat
from mxlab.model.apply import freeze, prepare
from mxlab.model.conversion import Conversion
from mxlab.model.plan import QuantizedSite, make_plan
from mxlab.model.transforms import check_fit
from mxlab.progress import Steps
from mxlab.ptq.mase.tables import KV_CACHE, MATMUL_TYPES, RotationTable
from mxlab.ptq.mase.weights import Weights
from mxlab.ptq.search import with_changes
from mxlab.ptq.sites import layer_at
from mxlab.recipe import Recipe
from mxlab.recipe.rule import KV_ROLES
from mxlab.recipe.transform import Derotated

_NOT_SEARCHED = {"q": "qk_matmul", "p": "av_matmul"}  # what MASE rotates beside the eight, by role

logger = logging.getLogger("mxlab")


def searched(model: Any, recipe: Recipe, table: RotationTable, weights: Weights, ids: Tensor) -> Recipe:
    """Return the recipe with a rule for each layer, and in it the rotation where that lowers the perplexity.

    Args:
        model: the unquantized model, which is left alone.
        recipe: what is quantized.
        table: the options.
        weights: those that were chosen already.
        ids: token ids [windows, tokens] of the calibration text.

    Raises:
        ConversionError: a kind that is asked for and not there, or a size that has no Hadamard matrix.
    """
    plan = make_plan(model, recipe)
    kinds = _kinds(plan.sites, table)
    plain = plan.spelled_out()

    def rotated(chosen: Sequence[str]) -> Recipe:
        return with_changes(plain, {name: {"transform": Derotated()} for kind in chosen for name in kinds[kind]})

    def perplexity(chosen: Sequence[str]) -> float:
        trial = copy.deepcopy(model)
        return perplexity_of(trial, converted(trial, rotated(chosen), weights), ids)

    count = len(kinds)
    with Steps("searching MASE's rotations", 1 + count * (count + 1) // 2) as steps:
        chosen = greedy(list(kinds), perplexity, table.improvement_eps, steps.advance)
    logger.info("rotated: %s", ", ".join(chosen) or "nothing")
    return rotated(chosen) if chosen else recipe


def greedy(
    kinds: Sequence[str],
    perplexity: Callable[[Sequence[str]], float],
    threshold: float,
    advance: Callable[[], None] = lambda: None,
) -> list[str]:
    """Return the kinds that lower the perplexity, in the order in which they were chosen.

    Args:
        kinds: what there is to choose from.
        perplexity: of the model in which the given kinds are rotated.
        threshold: a kind is chosen if the perplexity falls by more than this.
        advance: told of every model that was tried.
    """
    chosen: list[str] = []
    present = perplexity(chosen)
    advance()
    logger.info("no rotation: perplexity %.4f", present)
    while left := [kind for kind in kinds if kind not in chosen]:
        found = {}
        for kind in left:
            found[kind] = perplexity([*chosen, kind])
            advance()
            logger.info("%s rotated: perplexity %.4f", ", ".join([*chosen, kind]), found[kind])
        best = min(found, key=lambda kind: found[kind])
        if not present - found[best] > threshold:
            break
        chosen.append(best)
        present = found[best]
    return chosen


@torch.no_grad()
def perplexity_of(model: Any, conversion: Conversion, ids: Tensor) -> float:
    """Return the perplexity of a converted model on token ids [windows, tokens], once its weights are on the grid."""
    freeze(conversion.sites)
    total = Loss(0.0, 0)
    for window in ids.to(model.device).split(1):
        total += next_token_loss(model(input_ids=window, use_cache=False).logits, window)
    return total.perplexity


def converted(model: Any, recipe: Recipe, weights: Weights) -> Conversion:
    """Convert a model in place and give it the weights that were chosen; the others are still to be quantized."""
    conversion = prepare(model, recipe)
    for site in conversion.sites:
        if site.name in weights:
            layer_at(site).freeze_as(weights[site.name])
    return conversion


def _kinds(sites: Sequence[QuantizedSite], table: RotationTable) -> dict[str, list[str]]:
    """Return the names of the sites of each kind that may be rotated."""
    found = {kind: [site for site in sites if _is_of(site, kind)] for kind in table.matmul_types or MATMUL_TYPES}
    for kind, alike in found.items():
        if table.matmul_types is not None and not alike:
            raise ConversionError(
                f"matmul_types of [rotation_search] has {kind}, and no {kind} of the model has a microscaling format "
                "for what would be rotated: take it out"
            )
        _check_sizes(kind, alike, list(found))
    for role, kind in _NOT_SEARCHED.items():
        if any(role in site.roles for site in sites):
            logger.warning("MASE would also try to rotate %s, mxlab does not", kind)
    return {kind: [site.name for site in alike] for kind, alike in found.items() if alike}


def _check_sizes(kind: str, alike: Sequence[QuantizedSite], kinds: Sequence[str]) -> None:
    for site in alike:
        try:
            check_fit(site, Derotated())
        except ConversionError as e:
            others = ", ".join(repr(other) for other in kinds if other != kind)
            raise ConversionError(
                f"[rotation_search] cannot rotate {kind}: {e}. MASE would warn and pass it by; here, say what is to be "
                f"tried: matmul_types = [{others}]"
            ) from None


def _is_of(site: QuantizedSite, kind: str) -> bool:
    roles: Mapping[str, Any] = site.formats
    if kind == KV_CACHE:
        return site.kind == "attention" and any(isinstance(roles.get(role), MXFormat) for role in KV_ROLES)
    return (
        site.kind == "linear" and site.name.rpartition(".")[2] == kind and isinstance(roles.get("activation"), MXFormat)
    )
