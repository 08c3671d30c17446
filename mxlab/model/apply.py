"""Converting a loaded model in place: :func:`apply`; what it did: :class:`~mxlab.model.conversion.Conversion`."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from mxlab.compat.recipes import load_any_recipe
from mxlab.errors import ConversionError
from mxlab.formats import MXFormat
from mxlab.model import sites
from mxlab.model.conversion import Conversion
from mxlab.model.nn import linear
from mxlab.model.nn.attention import EAGER_ROLES, INNER_ROLES, AttentionQuantizer
from mxlab.model.nn.experts import ExpertsQuantizer
from mxlab.model.nn.forward import computer_of
from mxlab.model.nn.linear import QuantizedLayer
from mxlab.model.nn.operands import LinearQuantizer
from mxlab.model.nn.phase import PassPhase
from mxlab.model.nn.shared_input import SharedInput
from mxlab.model.plan import Match, check_finite, match
from mxlab.numerics import scale_clamps
from mxlab.recipe import Recipe
from mxlab.recipe.rule import Phase

__all__ = ["Conversion", "apply", "prepare"]

logger = logging.getLogger("mxlab")


def apply(model: nn.Module, recipe: Recipe | str | Path) -> Conversion:
    """Convert ``model`` in place, as ``recipe`` says, and put the weights on the grid (of a model in evaluation mode).

    Args:
        model: a loaded Hugging Face model.
        recipe: a Recipe, the name of a shipped one (``"ex1"``), or a TOML file.

    Raises:
        SpecError: no such recipe.
        ConversionError: the model was converted before or is a quantized checkpoint, a rule matches nothing, a module
            cannot serve a role, or a weight is not finite. The model is then as it was.
    """
    chosen = load_any_recipe(recipe)
    found = _match(model, chosen)
    check_finite(found)
    # Counted first: on the grid, a block whose scale was clamped may be all zeros.
    clamps = _weight_clamps(found)
    conversion = _install(model, chosen, found)
    conversion = replace(conversion, weight_clamps=clamps, remarks=(*conversion.remarks, *_on_meta(found)))
    for layer in model.modules():
        if isinstance(layer, QuantizedLayer):
            layer.freeze()
        elif isinstance(experts := computer_of(layer), ExpertsQuantizer):
            experts.freeze()
    logger.info(conversion.summary())
    conversion.write_inventory()
    return conversion


def prepare(model: nn.Module, recipe: Recipe) -> Conversion:
    """Replace and hook what ``recipe`` names, on any device (meta too), without touching a weight.

    Raises:
        ConversionError: as :func:`apply`.
    """
    return _install(model, recipe, _match(model, recipe))


def _match(model: nn.Module, recipe: Recipe) -> list[Match]:
    if recipe.algorithms:
        raise ConversionError(
            f"recipe {recipe.name} asks for {', '.join(recipe.algorithms)}, which this version of mxlab does not have: "
            "take the table out of the recipe to quantize by rounding to nearest"
        )
    if any(isinstance(m, QuantizedLayer) or computer_of(m) for m in model.modules()):
        raise ConversionError(
            "this model is quantized already: load it anew, and use either MX_SPECS_JSON with a patched transformers "
            "or mxlab.apply, not both"
        )
    if (config := getattr(getattr(model, "config", None), "quantization_config", None)) is not None:
        method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", config)
        raise ConversionError(
            f"this checkpoint is quantized already ({method}): quantizing its values again would say nothing about a "
            "format; load the unquantized model"
        )
    return match(model, recipe)


@dataclass
class _Installer:
    """What the sites of one model share while they are converted."""

    model: nn.Module
    recipe: Recipe
    phase: PassPhase = field(default_factory=PassPhase)
    shared: defaultdict[str, SharedInput] = field(default_factory=lambda: defaultdict(SharedInput))  # by parent's name
    experts: dict[str, ExpertsQuantizer] = field(default_factory=dict)  # by the module's name

    def attention(self, site: Match) -> None:
        argument = sites.cache_argument(site.module)
        assert argument is not None
        AttentionQuantizer(site.by_phase, self.recipe.numerics, self.phase).attach(site.name, site.module, argument)

    def linear(self, site: Match) -> None:
        inputs = self.shared[site.name.rpartition(".")[0]]
        linear.convert(site.module, self._quantizers(site), inputs, self.phase, site.tied_to is not None)

    def expert(self, site: Match) -> None:
        name, module, weights = site.site.module_name, site.module, sites.multiplied(site.module)
        if name not in self.experts:
            self.experts[name] = ExpertsQuantizer(name, module, weights, site.site.input_axis == -2, self.phase)
        self.experts[name].add(site.site.weight, self._quantizers(site))

    def _quantizers(self, site: Match) -> dict[Phase, LinearQuantizer]:
        return {phase: _quantizer(self.recipe, formats) for phase, formats in site.by_phase.items()}


def _install(model: nn.Module, recipe: Recipe, found: list[Match]) -> Conversion:
    _check_experts(found, recipe)
    installer = _Installer(model, recipe)
    install = {"attention": installer.attention, "linear": installer.linear, "experts": installer.expert}
    remarks = _made_eager(model, found)
    for site in found:
        install[site.kind](site)
    for parent, inputs in installer.shared.items():
        inputs.attach(model.get_submodule(parent))
    if any(site.by_phase["prefill"] != site.by_phase["decode"] for site in found):
        installer.phase.attach(model)
    return Conversion(model, recipe, tuple(found), remarks=tuple(remarks))


def _quantizer(recipe: Recipe, formats: Mapping[str, Any]) -> LinearQuantizer:
    return LinearQuantizer(**formats, elementwise=recipe.elementwise, numerics=recipe.numerics)


def _check_experts(found: list[Match], recipe: Recipe) -> None:
    for site in found:
        if site.kind == "experts" and site.weight.dtype not in _quantizer(recipe, {}).untouched:
            raise ConversionError(
                f"{site.name}: experts have no element-wise rounding of {site.weight.dtype}; use exact numerics and "
                "bfloat = 0"
            )


def _made_eager(model: Any, found: list[Match]) -> list[str]:
    """Have the model compute its attention eagerly where a role lies inside; what was done, in words."""
    roles = {role for site in found for role in site.roles}
    present = getattr(getattr(model, "config", None), "_attn_implementation", None)
    wanted = ", ".join(sorted(roles.intersection(EAGER_ROLES if present == "sdpa" else INNER_ROLES)))
    if not wanted or present in (None, "eager"):
        return []
    model.set_attn_implementation("eager")
    if model.config._attn_implementation != "eager":
        raise ConversionError(
            f"{type(model).__name__} computes its attention by {present}, where {wanted} cannot be met, and cannot be "
            "switched: load it with attn_implementation='eager'"
        )
    return [f"attention is computed eagerly, not by {present}, for the sake of {wanted}"]


def _on_meta(found: list[Match]) -> list[str]:
    count = sum(site.kind != "attention" and site.weight.is_meta for site in found)
    return [f"{count} weights are on the meta device: they are quantized once they are there"] if count else []


def _weight_clamps(found: list[Match]) -> dict[str, int]:
    total: Counter[str] = Counter(blocks=0, clamped=0, overflowed=0)
    for site in found:
        fmt = site.formats.get("weight")
        if isinstance(fmt, MXFormat) and not site.weight.is_meta:
            total.update(scale_clamps(site.weight, fmt, site.site.input_axis))
    return dict(total)
