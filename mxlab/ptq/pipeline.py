"""Quantize a model's weights by the algorithms that its recipe asks for."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from mxlab.errors import ConversionError
from mxlab.formats import MXFormat
from mxlab.model.apply import finish, prepare, prepare_to_observe
from mxlab.model.conversion import Conversion
from mxlab.model.nn.linear import QuantizedLayer
from mxlab.model.nn.operands import LinearOperands
from mxlab.model.plan import QuantizedSite
from mxlab.ptq.calibration import Windows
from mxlab.ptq.correction import correct
from mxlab.ptq.gptq import gptq
from mxlab.ptq.scales import block_scales
from mxlab.ptq.statistics import InputStatistics, input_statistics
from mxlab.ptq.streams import run_in_lockstep
from mxlab.recipe import Recipe
from mxlab.recipe.algorithms import Gptq

logger = logging.getLogger("mxlab")


def quantize_model(model: Any, original: Any, recipe: Recipe, windows: Windows) -> Conversion:
    """Convert ``model`` in place as ``recipe`` says, its weights chosen by the algorithms of the recipe.

    Args:
        model: the model, in evaluation mode.
        original: another copy of it, which stays unquantized; it cannot be used for anything else afterwards.
        recipe: with a table ``[algorithms.gptq]``.
        windows: the calibration text.

    Raises:
        ConversionError: the recipe does not fit the model, or an algorithm cannot treat a layer.
    """
    options = recipe.algorithm("gptq") or Gptq()
    _check(recipe)
    conversion = prepare(model, recipe)
    worker = _Worker(options, windows.held_out)
    with torch.no_grad():
        run_in_lockstep(conversion, prepare_to_observe(original, recipe), windows.ids, worker.visit)
    return finish(conversion)


class _Worker:
    """Quantizes one layer after the other, as the calibration text reaches it."""

    def __init__(self, options: Gptq, held_out: int) -> None:
        self._options, self._held_out = options, held_out
        self._last: tuple[Tensor, str, InputStatistics] | None = None

    def visit(self, site: QuantizedSite, x: Tensor, original: Tensor) -> None:
        """Quantize the weight of a site by its input, unless it cannot be or is done."""
        layer = site.module
        assert isinstance(layer, QuantizedLayer)
        if site.formats.get("weight") is None or layer.is_frozen or not layer.frozen.is_possible:
            return
        operands = layer.operands["prefill"]
        statistics = self._statistics(site, operands, x, original)
        weight = operands.transformed(layer.weight.detach().float(), site.input_axis)
        is_transposed = site.input_axis == 0
        found = self._best(site.name, weight.t() if is_transposed else weight, statistics, operands)
        layer.freeze_as(found.t().contiguous() if is_transposed else found)

    def _statistics(
        self, site: QuantizedSite, operands: LinearOperands, x: Tensor, original: Tensor
    ) -> InputStatistics:
        """Return the statistics of the input; layers that share it share them."""
        last = self._last
        if last is not None and last[0] is x and last[1] == operands.input_kind:
            return last[2]
        made = input_statistics(
            operands.on_activation(x), operands.transformed(original, -1), self._held_out, site.name
        )
        self._last = x, operands.input_kind, made
        return made

    def _best(self, name: str, weight: Tensor, statistics: InputStatistics, operands: LinearOperands) -> Tensor:
        """Return the quantized weight [out, in] that leaves the smallest error on the rows held out."""
        fmt, options = operands.weight, self._options
        assert isinstance(fmt, MXFormat)
        wanted = statistics.held_out_original @ weight.t()
        least, best, chosen = torch.inf, weight, (0.0, 0.0)
        for damping in options.damping:
            factor = statistics.factor(damping, options.order)
            corrected = correct(weight, statistics, factor) if max(options.correction) > 0 else weight
            for share in options.correction:
                target = torch.lerp(weight, corrected, share)
                scales = block_scales(target, fmt, statistics.gram.diagonal(), options.search)
                found = gptq(target, factor, scales, fmt)
                error = float((statistics.held_out @ found.t() - wanted).square().sum())
                if error < least:
                    least, best, chosen = error, found, (damping, share)
        loss = least / float(wanted.square().sum().clamp(min=1e-30))
        logger.debug("%s: %.4f of the output held out is lost, damping %g, correction %g", name, loss, *chosen)
        return best


def _check(recipe: Recipe) -> None:
    if recipe.numerics != "exact":
        raise ConversionError(f"recipe {recipe.name}: gptq computes in exact numerics; take numerics out of the recipe")
    for rule in recipe.rules:
        if rule.weight is not None and not isinstance(rule.weight, MXFormat):
            raise ConversionError(f"recipe {recipe.name}: gptq has no format {rule.weight}; use a microscaling one")
