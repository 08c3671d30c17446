"""Counting how often the shared scale leaves its range: on all weights, and on the first batch of what flows."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

from torch import Tensor, nn

from mxlab.formats import MXFormat, NumberFormat
from mxlab.model.conversion import Conversion
from mxlab.model.nn.attention import AttentionQuantizer
from mxlab.model.nn.forward import computer_of
from mxlab.model.plan import Match
from mxlab.numerics import scale_clamps


class ScaleClampCounter:
    """Counts, per role, the blocks whose shared exponent is out of range (see :func:`mxlab.numerics.scale_clamps`).

    Activations, K and V are counted during the model's first forward pass; then every hook is taken off again.
    """

    def __init__(self, conversion: Conversion) -> None:
        formats = [item for site in conversion.sites for by_role in site.by_phase.values() for item in by_role.items()]
        roles = {role for role, fmt in formats if isinstance(fmt, MXFormat)} - {"bias", "output"}
        self.counts = {role: Counter(blocks=0, clamped=0, overflowed=0) for role in sorted(roles)}
        self._sites = conversion.sites
        if "weight" in roles:
            self.counts["weight"].update(conversion.weight_clamps)
        self._handles = [
            self._watch(site, fmt)
            for site in conversion.sites
            if site.kind == "linear" and isinstance(fmt := site.formats.get("activation"), MXFormat)
        ]
        for site in conversion.attentions:
            self._set_observer(site, self._count)
        self._handles.append(conversion.model.register_forward_hook(self._stop))

    def _watch(self, site: Match, fmt: MXFormat) -> Any:
        return site.module.register_forward_pre_hook(partial(self._count_input, fmt))

    def _count_input(self, fmt: MXFormat, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._count("activation", fmt, args[0])

    def _count(self, role: str, fmt: NumberFormat, x: Tensor) -> None:
        if isinstance(fmt, MXFormat):
            self.counts[role].update(scale_clamps(x, fmt))

    def _stop(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        for site in self._sites:
            self._set_observer(site, None)

    @staticmethod
    def _set_observer(site: Match, observer: Any) -> None:
        if isinstance(quantizer := computer_of(site.module), AttentionQuantizer):
            quantizer.observer = observer

    def to_dict(self) -> dict[str, dict[str, int]]:
        """The counts as plain values for JSON."""
        return {role: dict(count) for role, count in self.counts.items()}
