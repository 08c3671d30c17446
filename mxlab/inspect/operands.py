"""The operands of a model: every tensor that a recipe quantizes, and what its format does to it.

Each is met in the unquantized model, on calibration text: the figures say what a format does to that tensor, not what
the errors of earlier layers have made of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mxlab.errors import MetricError
from mxlab.formats import NumberFormat, Numerics
from mxlab.inspect.statistics import Statistics, measure
from mxlab.model import sites
from mxlab.model.nn.attention import AttentionQuantizer
from mxlab.model.nn.experts import ExpertsQuantizer
from mxlab.model.nn.operands import LinearQuantizer
from mxlab.model.nn.phase import PassPhase
from mxlab.model.plan import Match, match
from mxlab.recipe import Recipe

# What is told of a tensor: its role, its format, itself, and the axis of its blocks.
Observe = Callable[[str, NumberFormat, Tensor, int], None]


@dataclass(frozen=True)
class Operand:
    """One role of one module, its format, and what that does to the values."""

    module: str
    role: str
    format: str
    statistics: Statistics

    @property
    def layer(self) -> int | None:
        """The decoder layer; None outside of them."""
        return sites.layer_of(self.module)

    @property
    def projection(self) -> str:
        """What its module has in common with those of other layers: see :func:`projection_of`."""
        return projection_of(self.module)


def projection_of(name: str) -> str:
    """What a module is called within its decoder layer, all experts alike: ``mlp.up_proj``, ``mlp.experts.*.w1``.

    A module outside of them keeps its qualified name.
    """
    parts = name.split(".")
    inside = next((parts[i + 1 :] for i, part in enumerate(parts) if part.isdecimal()), parts) or parts
    return ".".join("*" if part.isdecimal() else part for part in inside)


def collect(model: nn.Module, recipe: Recipe, batches: Iterable[Tensor]) -> list[Operand]:
    """The operands of ``model`` under ``recipe``, in its formats for prefill; the model stays as it is.

    Args:
        model: unquantized.
        recipe: what would be quantized.
        batches: token ids (batch, length), on the model's device.

    Raises:
        ConversionError: the recipe does not fit the model.
        MetricError: an operand holds NaN or infinities.
    """
    watched: Any = copy.deepcopy(model)
    collector = _Collector(recipe.numerics)
    for site in match(watched, recipe):
        collector.watch(site)
    with torch.no_grad():
        for ids in batches:
            watched(input_ids=ids, use_cache=False)
    return [Operand(name, role, str(fmt), found) for (name, role, fmt), found in collector.found.items()]


class _Collector:
    """Adds up the statistics of what it sees, by module, role and format."""

    def __init__(self, numerics: Numerics) -> None:
        self.found: dict[tuple[str, str, NumberFormat], Statistics] = {}
        self._numerics: Numerics = numerics
        self._experts: dict[str, ExpertsQuantizer] = {}  # by the module's name

    def watch(self, site: Match) -> None:
        """Measure the weight and the bias of a site now, its other operands whenever it is called."""
        for role, fmt in site.formats.items():
            self.found[site.name, role, fmt] = Statistics()
        {"linear": self._linear, "experts": self._expert, "attention": self._attention}[site.kind](site)
        for role, x, axis in _parameters(site):
            self._observe(site.name, role, site.formats[role], x, axis)

    def _linear(self, site: Match) -> None:
        if "activation" in site.formats:
            site.module.register_forward_pre_hook(partial(self._on_input, site))
        if "output" in site.formats:
            site.module.register_forward_hook(partial(self._on_output, site))

    def _on_input(self, site: Match, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._observe(site.name, "activation", site.formats["activation"], args[0])

    def _on_output(self, site: Match, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._observe(site.name, "output", site.formats["output"], output)

    def _expert(self, site: Match) -> None:
        name, module = site.site.module_name, site.module
        if name not in self._experts:
            is_transposed = site.site.input_axis == -2
            weights = sites.multiplied(module)
            self._experts[name] = ExpertsQuantizer(name, module, weights, is_transposed, PassPhase())
        shown = _Shown(activation=site.formats.get("activation"), observe=partial(self._observe, site.name))
        self._experts[name].add(site.site.weight, {"prefill": shown, "decode": shown})

    def _attention(self, site: Match) -> None:
        argument = sites.cache_argument(site.module)
        assert argument is not None  # or it would be no attention
        watcher = _AttentionWatcher(site.by_phase, self._numerics)
        watcher.observer = partial(self._observe, site.name)
        watcher.attach(site.name, site.module, argument)

    def _observe(self, name: str, role: str, fmt: NumberFormat, x: Tensor, axis: int = -1) -> None:
        try:
            self.found[name, role, fmt] += measure(x, fmt, self._numerics, axis)
        except MetricError as e:
            raise MetricError(f"the {role} of {name}, in the unquantized model: {e}") from None


def _parameters(site: Match) -> Iterable[tuple[str, Tensor, int]]:
    """The operands that do not depend on the text, and the axes of their blocks."""
    if "weight" in site.formats:
        yield "weight", site.weight, site.site.input_axis
    if "bias" in site.formats:
        yield "bias", site.module.get_parameter("bias"), -1


@dataclass(frozen=True)
class _Shown(LinearQuantizer):
    """Shows the inputs of a layer's products, and leaves them as they are."""

    observe: Observe | None = None

    def on_activation(self, x: Tensor, out: Tensor | None = None, axis: int = -1) -> Tensor:
        if self.activation is not None and self.observe is not None:
            self.observe("activation", self.activation, x, axis)
        return x

    def on_weight(self, weight: Tensor, axis: int = -1) -> Tensor:
        return weight


class _AttentionWatcher(AttentionQuantizer):
    """Shows an attention's operands to its observer, and leaves them as they are."""

    def quantize(self, role: str, x: Tensor, axis: int = -1) -> Tensor:
        fmt = self.formats.get(role)
        if fmt is not None and self.observer is not None:
            masked = x < torch.finfo(x.dtype).min / 2  # of the softmax's input
            self.observer(role, fmt, x.masked_fill(masked, 0.0))
        return x
