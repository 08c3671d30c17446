"""The weights of a model as MASE's GPTQ and its search of clipping leave them.

GPTQ passes the calibration text through a model none of whose activations is quantized; a layer reads what the layers
before make of it with the weights that were chosen for them, as in MASE.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mxlab.errors import ConversionError
from mxlab.formats import MXFormat
from mxlab.model.apply import prepare_to_observe
from mxlab.model.conversion import Conversion
from mxlab.model.observe import observe_inputs
from mxlab.model.plan import QuantizedSite
from mxlab.numerics import reference
from mxlab.progress import Steps
from mxlab.ptq.mase import gptq
from mxlab.ptq.mase.tables import GptqTable, MaseTables
from mxlab.ptq.resume import Progress
from mxlab.ptq.sites import by_outputs, layer_at, weight_format
from mxlab.ptq.statistics import check_finite
from mxlab.ptq.streams import forward
from mxlab.recipe import Recipe, Rule

Weights = dict[str, Tensor]  # on the grid, [out, in], by the layer's name


@torch.no_grad()
def chosen_weights(original: Any, recipe: Recipe, tables: MaseTables, ids: Tensor, progress: Progress) -> Weights:
    """Return the weights that the tables of a file choose; those of all other layers are rounded to nearest.

    Args:
        original: the unquantized model; it ends with the weights of GPTQ.
        recipe: what is quantized.
        tables: of the file.
        ids: token ids [windows, tokens], for GPTQ.
        progress: where the weight of each layer is kept.

    Raises:
        ConversionError: a table is for a layer that it cannot treat, or an input is not finite.
    """
    observed = prepare_to_observe(original, recipe)
    for_clipping = _selected(observed, tables.clip_modules, "clip_search")
    found = {site.name: _clipped(site) for site in for_clipping}
    if tables.gptq is not None and (selected := _selected(observed, tables.gptq_modules, "gptq")):
        with Steps("quantizing by MASE's GPTQ", len(selected)) as steps:
            quantizer = _GptqPass(tables.gptq, selected, progress, steps)
            with observe_inputs(observed, quantizer.visit):
                forward(original, ids)
        found |= quantizer.found
    return found


class _GptqPass:
    """Quantizes the weight of each layer as the calibration text reaches it."""

    def __init__(self, table: GptqTable, sites: Sequence[QuantizedSite], progress: Progress, steps: Steps) -> None:
        self._table, self._progress, self._steps = table, progress, steps
        self._names = {site.name for site in sites}
        self._last: tuple[Tensor, Tensor] | None = None  # an input, and its second moments
        self.found: Weights = {}

    def visit(self, site: QuantizedSite, x: Tensor) -> None:
        """Quantize the weight of a site, which reads ``x`` [windows, tokens, in], and give it to the layer."""
        if site.name not in self._names or site.name in self.found:
            return
        kept = self._progress.load(site.name)
        if kept is None:
            kept = self._progress.keep(site.name, {"values": self._quantized(site, x)})
        self.found[site.name] = kept["values"].to(site.weight.device)
        layer_at(site).freeze_as(self.found[site.name])
        self._steps.advance()

    def _quantized(self, site: QuantizedSite, x: Tensor) -> Tensor:
        weight, fmt, table = by_outputs(site), weight_format(site), self._table
        judge = gptq.output_judge(x, table.cali_batch_size) if table.clip_search_y else None
        round_block = partial(_rounded_block, fmt, table.quantile_search, judge)
        return gptq.block_gptq(weight, self._gram(site, x), _block_size(weight, fmt), table.percdamp, round_block)

    def _gram(self, site: QuantizedSite, x: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x:
            rows = x.flatten(0, -2).float()
            check_finite(rows, site.name, "take gptq = true out of its selector")
            self._last = x, rows.t() @ rows
        return self._last[1]


def _clipped(site: QuantizedSite) -> Tensor:
    """Return the weight of a site on the grid, each block with the scale that loses least of the weight itself."""
    weight, fmt = by_outputs(site), weight_format(site)
    parts = weight.split(_block_size(weight, fmt), 1)
    return torch.cat([_rounded_block(fmt, True, None, part, 0) for part in parts], 1)


def _rounded_block(fmt: MXFormat, searches: bool, judge: gptq.Judge | None, part: Tensor, start: int) -> Tensor:
    if not searches:
        return gptq.round_to_nearest(part, fmt)
    if judge is None:
        return gptq.round_by_quantiles(part, fmt, gptq.weight_error)
    return gptq.round_by_quantiles(part, fmt, lambda difference: judge(difference, start))


def _block_size(weight: Tensor, fmt: MXFormat) -> int:
    return reference.block_layout(weight, fmt, (1,)).block_size or weight.shape[1]


# ---- which layers


def _selected(observed: Conversion, selectors: Sequence[str], table: str) -> list[QuantizedSite]:
    """Return the sites that came under one of the selectors, each checked to be one that ``table`` can treat."""
    rules = observed.recipe.rules
    found = [site for site in observed.sites if _pattern(rules[site.rules["prefill"]]) in selectors]
    for site in found:
        _check(site, table)
    return found


def _pattern(rule: Rule) -> str | None:
    """Return how :mod:`mxlab.compat.mase` writes the selector of a rule where it says which layers a table is for."""
    if rule.type is not None:
        return ".*"
    return rule.modules if rule.name is None else re.escape(rule.name)


def _check(site: QuantizedSite, table: str) -> None:
    if site.kind != "linear" or site.layer is None or site.tied_to is not None:
        reason = f"its weight is that of {site.tied_to}, too" if site.tied_to else f"{site.name} is none of them"
        raise ConversionError(
            f"{site.name}: {table} = true is for linear layers inside the decoder layers, and {reason}: give it a "
            f"selector of its own without {table} = true"
        )
    fmt = site.formats["weight"]
    if not isinstance(fmt, MXFormat) or fmt.scale_rule not in gptq.SEARCHED_RULES or fmt.is_random:
        raise ConversionError(
            f"{site.name}: {table} = true has no format {fmt}: use mxint or mxfp, or take {table} = true out"
        )
