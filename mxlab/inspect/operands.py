"""Measure every tensor that a recipe quantizes, and what its format does to it.

Tensors are those of the unquantized model on calibration text: the figures say what a format does to a tensor, not what
the errors of earlier layers have made of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxlab.errors import MetricError
from mxlab.formats import NumberFormat
from mxlab.inspect.statistics import Statistics, measure
from mxlab.model.apply import prepare_to_observe
from mxlab.model.observe import observe
from mxlab.model.plan import QuantizedSite
from mxlab.recipe import Recipe


@dataclass(frozen=True)
class Operand:
    """One role of one module, its format, and what that does to the values; the layer is None outside of the layers."""

    module: str
    role: str
    format: str
    statistics: Statistics
    layer: int | None = None

    @property
    def projection(self) -> str:
        """What its module is called in every layer: see :func:`projection_of`."""
        return projection_of(self.module)


def projection_of(name: str) -> str:
    """Return the name of a module within its decoder layer, all experts alike: ``mlp.up_proj``, ``mlp.experts.*.w1``.

    A module outside the layers keeps its qualified name.
    """
    parts = name.split(".")
    inside = next((parts[i + 1 :] for i, part in enumerate(parts) if part.isdecimal()), parts) or parts
    return ".".join("*" if part.isdecimal() else part for part in inside)


def collect(model: nn.Module, recipe: Recipe, batches: Iterable[Tensor]) -> list[Operand]:
    """Measure the operands of ``model`` under ``recipe``, in its formats for prefill; the model stays unchanged.

    Args:
        model: unquantized.
        recipe: what would be quantized.
        batches: token ids (batch, length), on the model's device.

    Raises:
        ConversionError: the recipe does not fit the model.
        MetricError: an operand holds NaN or infinities.
    """
    watched: Any = copy.deepcopy(model)
    conversion = prepare_to_observe(watched, recipe)
    found: dict[tuple[str, str, NumberFormat], Statistics] = {}

    def add(site: QuantizedSite, role: str, x: Tensor, axis: int) -> None:
        if (fmt := site.formats.get(role)) is None:
            return  # it has one in decode alone
        try:
            found[site.name, role, fmt] += measure(x, fmt, recipe.numerics, axis)
        except MetricError as e:
            raise MetricError(f"the {role} of {site.name}, in the unquantized model: {e}") from None

    for site in conversion.sites:
        found |= {(site.name, role, fmt): Statistics() for role, fmt in site.formats.items()}
        for role, tensor, axis in site.quantized_parameters():
            add(site, role, tensor, axis)
    with torch.no_grad(), observe(conversion, add):
        for ids in batches:
            watched(input_ids=ids, use_cache=False)
    layers = {site.name: site.layer for site in conversion.sites}
    return [Operand(name, role, str(fmt), of, layers[name]) for (name, role, fmt), of in found.items()]
