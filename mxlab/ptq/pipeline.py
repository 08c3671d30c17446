"""Quantize a model's weights by the algorithms that its recipe asks for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mxlab.errors import ConversionError
from mxlab.formats import MXFormat
from mxlab.model.apply import finish, prepare, prepare_to_observe
from mxlab.model.conversion import Conversion
from mxlab.model.nn.linear import QuantizedLayer
from mxlab.model.plan import QuantizedSite
from mxlab.numerics.block_transform import inverse_transposed
from mxlab.numerics.reference import block_layout
from mxlab.ptq import wush
from mxlab.ptq.calibration import Windows
from mxlab.ptq.chosen import ChosenWeight
from mxlab.ptq.correction import correct
from mxlab.ptq.distillation import distill
from mxlab.ptq.gptq import gptq
from mxlab.ptq.scales import block_scales
from mxlab.ptq.statistics import InputStatistics, input_statistics
from mxlab.ptq.streams import layers_by_input, run_in_lockstep
from mxlab.recipe import Recipe
from mxlab.recipe.algorithms import Gptq
from mxlab.recipe.transform import Wush

logger = logging.getLogger("mxlab")

_PROBE = 8  # tokens that tell which layers share an input


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
    conversion, observed = prepare(model, recipe), prepare_to_observe(original, recipe)
    groups = layers_by_input(observed, windows.ids[:1, :_PROBE])
    worker = _Worker(options, windows.held_out, conversion, groups)
    with torch.no_grad():
        run_in_lockstep(conversion, observed, windows.ids, worker.visit)
    conversion = finish(conversion)
    if (distillation := recipe.algorithm("distillation")) is not None:
        distill(conversion, original, worker.chosen, windows, distillation)
    return conversion


class _Worker:
    """Quantizes one layer after the other, as the calibration text reaches it."""

    def __init__(
        self, options: Gptq, held_out: int, conversion: Conversion, groups: Sequence[Sequence[QuantizedSite]]
    ) -> None:
        self._options, self._held_out = options, held_out
        layers = {site.name: site for site in conversion.sites}
        self._sharing = {site.name: [layers[other.name] for other in group] for group in groups for site in group}
        self._last: tuple[Tensor, str, InputStatistics] | None = None
        self._fitted: set[str] = set()  # names of the layers whose transforms are
        self.chosen: list[ChosenWeight] = []

    def visit(self, site: QuantizedSite, x: Tensor, original: Tensor) -> None:
        """Quantize the weight of a site by its input, unless it cannot be or is done."""
        layer = site.module
        assert isinstance(layer, QuantizedLayer)
        if isinstance(site.transform, Wush) and site.name not in self._fitted:
            self._fit(site, site.transform, x)
        if site.formats.get("weight") is None or layer.is_frozen or not layer.frozen.is_possible:
            return
        operands = layer.operands["prefill"]
        fmt = operands.weight
        assert isinstance(fmt, MXFormat)
        statistics = self._statistics(site, layer, x, original)
        matrices = None if layer.input_transform is None else inverse_transposed(layer.input_transform)
        weight = operands.transformed(_by_outputs(site), -1, matrices)
        found = self._best(site.name, weight, statistics, fmt)
        chosen = ChosenWeight(site.name, layer, fmt, *found[1:])
        chosen.freeze_as(found[0])
        self.chosen.append(chosen)

    def _fit(self, site: QuantizedSite, transform: Wush, x: Tensor) -> None:
        """Fit the transform of all layers that share the input of ``site`` and are to be transformed so."""
        group = [other for other in self._sharing[site.name] if other.transform == transform]
        matrices = wush.fit([_by_outputs(other) for other in group], x[: len(x) - self._held_out], transform.size)
        for other in group:
            assert isinstance(other.module, QuantizedLayer)
            assert other.module.input_transform is not None
            other.module.input_transform.copy_(matrices)
            self._fitted.add(other.name)

    def _statistics(self, site: QuantizedSite, layer: QuantizedLayer, x: Tensor, original: Tensor) -> InputStatistics:
        """Return the statistics of the input; layers that share it, transformed and quantized, share them."""
        operands = layer.operands["prefill"]
        last = self._last
        if last is not None and last[0] is x and last[1] == operands.input_kind:
            return last[2]
        made = input_statistics(
            operands.on_activation(x, matrices=layer.input_transform),
            operands.transformed(original, -1, layer.input_transform),
            self._held_out,
            site.name,
        )
        self._last = x, operands.input_kind, made
        return made

    def _best(
        self, name: str, weight: Tensor, statistics: InputStatistics, fmt: MXFormat
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the quantized weight [out, in] that leaves the smallest error on the rows held out.

        With it come the scales of its blocks [out, blocks, 1], and what was rounded [out, in].
        """
        options = self._options
        wanted = statistics.held_out_original @ weight.t()
        cut = block_layout(weight, fmt, (1,))
        least, best, chosen = torch.inf, (weight, weight, weight), (0.0, 0.0)
        for damping in options.damping:
            corrected = correct(weight, statistics, damping) if max(options.correction) > 0 else weight
            for share in options.correction:
                target = torch.lerp(weight, corrected, share)
                scales = block_scales(target, fmt, statistics.gram.diagonal(), options.search)
                found = gptq(target, statistics.gram, scales, fmt, damping, options.order)
                error = float((statistics.held_out @ found.t() - wanted).square().sum())
                if error < least:
                    least, best, chosen = error, (found, cut.split(scales)[..., :1].clone(), target), (damping, share)
        loss = least / float(wanted.square().sum().clamp(min=1e-30))
        logger.debug("%s: %.4f of the output held out is lost, damping %g, correction %g", name, loss, *chosen)
        return best


def _by_outputs(site: QuantizedSite) -> Tensor:
    """Return the weight of a linear layer as float32 [out, in]."""
    weight = site.weight.detach().float()
    return weight.t() if site.input_axis == 0 else weight


def _check(recipe: Recipe) -> None:
    if recipe.numerics != "exact":
        raise ConversionError(f"recipe {recipe.name}: gptq computes in exact numerics; take numerics out of the recipe")
    for rule in recipe.rules:
        if rule.weight is not None and not isinstance(rule.weight, MXFormat):
            raise ConversionError(f"recipe {recipe.name}: gptq has no format {rule.weight}; use a microscaling one")
