"""Quantize the weights of one layer after the other, as the calibration text reaches it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxlab.model.conversion import Conversion
from mxlab.model.nn.linear import QuantizedLayer
from mxlab.model.plan import QuantizedSite
from mxlab.ptq import wush
from mxlab.ptq.chosen import ChosenLayer
from mxlab.ptq.resume import Progress
from mxlab.ptq.rounding import best_rounding
from mxlab.ptq.sites import by_outputs, layer_at, round_to_nearest, weight_format, weight_in_basis
from mxlab.ptq.statistics import InputStatistics, apart, input_statistics
from mxlab.recipe.algorithms import Gptq
from mxlab.recipe.transform import Wush
from mxlab.sources.devices import return_freed_memory

logger = logging.getLogger("mxlab")


class LayerQuantizer:
    """Chooses a transform where it is to be fitted, scales and elements; what it has chosen is in ``chosen``.

    Args:
        options: of the rounding.
        held_out: the share of the text, its end, that decides among options.
        conversion: of the model.
        groups: the layers that share an input.
        progress: what is kept of each layer.
        learns: whether the weights are to learn from what they were to be, which is kept then.
    """

    def __init__(
        self,
        options: Gptq,
        held_out: float,
        conversion: Conversion,
        groups: Sequence[Sequence[QuantizedSite]],
        progress: Progress,
        learns: bool,
    ) -> None:
        self._options, self._held_out, self._progress, self._learns = options, held_out, progress, learns
        self._layers = layers = {site.name: site for site in conversion.sites if site.kind == "linear"}
        self._sharing = {site.name: [layers[other.name] for other in group] for group in groups for site in group}
        self._last: _Seen | None = None
        self._fitted: set[str] = set()  # names of the layers whose transforms are
        self.count = sum(_is_to_be_chosen(site) for site in layers.values())
        self.chosen: list[ChosenLayer] = []  # that learn

    def visit(self, site: QuantizedSite, x: Tensor, original: Tensor) -> int:
        """Quantize the weight of a site by its inputs; return how many were: none where it cannot be or is done."""
        if not _is_to_be_chosen(site):
            return 0
        kept = self._progress.load(site.name)
        if kept is None:
            kept = self._progress.keep(site.name, self._choose(site, x, original))
            return_freed_memory()
        self._take_over(site, kept)
        return 1

    def round_unseen(self) -> None:
        """Round to nearest what no token of the text has reached, and say which layers these are.

        A transform that was to be fitted stays the identity, unless a layer with the same input was reached.
        """
        self._last = None
        unseen = [site for site in self._layers.values() if _is_to_be_chosen(site)]
        for site in unseen:
            round_to_nearest(site)
        if unseen:
            more = f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
            logger.warning(
                "the calibration text reaches none of %s: rounded to nearest; calibrate with more tokens",
                ", ".join(site.name for site in unseen[:3]) + more,
            )

    def _choose(self, site: QuantizedSite, x: Tensor, original: Tensor) -> dict[str, Tensor | None]:
        """Return what a layer is to have, by name."""
        if isinstance(site.transform, Wush) and site.name not in self._fitted:
            self._fit(site, site.transform, x)
        layer, fmt = layer_at(site), weight_format(site)
        statistics = self._statistics(site, layer, x, original)
        weight = weight_in_basis(by_outputs(site), layer.operands["prefill"], layer.input_transform)
        values, scales, target = best_rounding(site.name, weight, statistics, fmt, self._options)
        values = values.to(site.weight.dtype)
        learning = {"scales": scales, "target": target} if self._learns else {}
        return {"values": values, "transform": layer.input_transform, **learning}

    def _fit(self, site: QuantizedSite, transform: Wush, x: Tensor) -> None:
        """Fit the transform of all layers that share the input of ``site`` and are to be transformed so."""
        weights = [by_outputs(other) for other in self._alike(site)]
        self._set_transform(site, wush.fit(weights, apart(x, self._held_out)[0], transform.size))

    def _alike(self, site: QuantizedSite) -> list[QuantizedSite]:
        """Return the layers that share the input of ``site``, and its transform."""
        sharing = self._sharing.get(site.name, [site])  # an expert may have got none of the tokens that told
        return [other for other in sharing if other.transform == site.transform]

    def _set_transform(self, site: QuantizedSite, matrices: Tensor) -> None:
        for other in self._alike(site):
            room = layer_at(other).input_transform
            assert room is not None
            room.copy_(matrices)
            self._fitted.add(other.name)

    def _take_over(self, site: QuantizedSite, kept: Mapping[str, Tensor]) -> None:
        """Give a layer what was chosen for it, now or before an interruption."""
        if "transform" in kept:
            self._set_transform(site, kept["transform"])
        layer, first = layer_at(site), self._alike(site)[0]
        layer.freeze_as(kept["values"].to(site.weight.device))
        if self._learns:
            chosen = ChosenLayer(site.name, weight_format(site), kept["scales"], kept["target"], layer, first.name)
            self.chosen.append(chosen)

    def _statistics(self, site: QuantizedSite, layer: QuantizedLayer, x: Tensor, original: Tensor) -> InputStatistics:
        """Return the statistics of the input; layers that share it, transformed and quantized, share them."""
        operands, matrices = layer.operands["prefill"], layer.input_transform
        if self._last is not None and self._last.is_of(x, operands.input_kind, matrices):
            return self._last.statistics
        self._last = None  # its memory
        if not self._options.corrects:
            _, original = apart(original, self._held_out)
        made = input_statistics(
            operands.on_activation(x, matrices=matrices),
            operands.transformed(original, -1, matrices),
            self._held_out,
            site.name,
            self._options.corrects,
        )
        self._last = _Seen(x, operands.input_kind, matrices, made)
        return made


@dataclass(frozen=True)
class _Seen:
    """An input, how it was transformed and quantized, and its statistics."""

    x: Tensor
    kind: str
    matrices: Tensor | None
    statistics: InputStatistics

    def is_of(self, x: Tensor, kind: str, matrices: Tensor | None) -> bool:
        """Return whether the statistics are those of an input that is treated so."""
        if self.x is not x or self.kind != kind:
            return False
        if self.matrices is None or matrices is None:
            return self.matrices is matrices
        return torch.equal(self.matrices, matrices)


def _is_to_be_chosen(site: QuantizedSite) -> bool:
    layer = layer_at(site)
    return site.formats.get("weight") is not None and not layer.is_frozen and layer.frozen.is_possible
