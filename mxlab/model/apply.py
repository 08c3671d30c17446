"""Convert a loaded model in place: plan, install, freeze.

:func:`apply` does all three. :func:`prepare` stops before the weights are touched, which also serves models whose
weights are yet to come. :func:`prepare_to_observe` installs what shows operands and quantizes nothing.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from mxlab import environment
from mxlab.compat.recipes import load_any_recipe
from mxlab.errors import ConversionError, SpecError
from mxlab.formats import NumberFormat
from mxlab.model import saved, sites
from mxlab.model.conversion import Conversion
from mxlab.model.nn import linear
from mxlab.model.nn.attention import EAGER_ROLES, INNER_ROLES, QuantizedAttention, make_room_for_offset
from mxlab.model.nn.experts import QuantizedExperts
from mxlab.model.nn.forward import override_of
from mxlab.model.nn.guard import WeightGuard
from mxlab.model.nn.injection import Injection
from mxlab.model.nn.linear import QuantizedLayer
from mxlab.model.nn.operands import LinearOperands
from mxlab.model.nn.packed import PackedLayer, pack, packable_format
from mxlab.model.nn.phase import PassPhase
from mxlab.model.nn.shared_input import SharedInput
from mxlab.model.nn.weights import TensorVersion, make_room_for_transform
from mxlab.model.observe import count_weight_clamps
from mxlab.model.plan import Plan, QuantizedSite, make_plan
from mxlab.model.structure import cache_argument
from mxlab.progress import track
from mxlab.recipe import Phase, Recipe
from mxlab.recipe.carried import carried_recipe
from mxlab.recipe.mx_specs import injected_options
from mxlab.recipe.recipe import MASE
from mxlab.recipe.rule import KV_ROLES
from mxlab.recipe.transform import Transform

Storage = Literal["grid", "packed"]
STORAGES: tuple[Storage, ...] = ("grid", "packed")
logger = logging.getLogger("mxlab")

# What asks for an algorithm in a file of MASE's (mxlab.compat.mase).
_KEYS_OF_MASE = {
    "gptq": "the table [gptq] and every gptq = true",
    "clip_search": "every clip_search = true",
    "rotation_search": "the table [rotation_search]",
}


def apply(model: nn.Module, recipe: Recipe | str | Path, storage: Storage = "grid") -> Conversion:
    """Convert ``model`` in place, as ``recipe`` says, and quantize its weights (of a model in evaluation mode).

    Weights of a model that was saved under the recipe are not quantized again. One converted under it is left alone.

    Args:
        model: a loaded Hugging Face model.
        recipe: a Recipe, the name of a shipped one (``"ex1"``), or a TOML file.
        storage: how the weights of linear layers are kept. ``grid``: in the dtype of the model, where they can be
            trained. ``packed``: in the bits of their format, multiplied in integers where that can be; such a weight
            has no parameter any more. Caches that join tensors (``DynamicCache``, with sliding windows too) then keep K
            and V in the bits of theirs; where gradients are wanted, in ``torch.compile``, and in caches that copy them
            (``StaticCache``), they are values.

    Raises:
        SpecError: no such recipe or storage.
        ConversionError: the model was converted under another recipe or is a quantized checkpoint, a rule matches
            nothing, a module cannot serve a role or be packed, or a weight is not finite. The model is then unchanged.
    """
    chosen = load_any_recipe(recipe)
    check_storage(storage)
    if (present := saved.conversion_of(model)) is not None:
        saved.check_same(present.recipe, chosen)
        if storage == "packed":
            check_packable(present.sites)
            pack_sites(present.sites)
        return present
    is_new = saved.carried_config(model) is None
    if is_new:
        _refuse_algorithms(chosen)
    plan = _checked_plan(model, chosen)
    if is_new:
        _refuse_fitted(chosen)
    plan.check_finite()
    if storage == "packed":
        check_packable(plan.sites)
    versions = saved.frozen_versions(saved.carried_config(model))
    # Counted first: once quantized, a block whose scale was clamped may be all zeros.
    clamps = count_weight_clamps([site for site in plan.sites if not _is_frozen(site, versions)])
    conversion = _install(plan, clamps=clamps, remarks=_meta_remarks(plan))
    (pack_sites if storage == "packed" else freeze)(plan.sites)
    logger.info(conversion.summary())
    conversion.write_inventory(environment.inventory_file())
    return conversion


def finish(conversion: Conversion) -> Conversion:
    """Quantize the weights that are not yet quantized, once those of the others have been chosen."""
    freeze(conversion.sites)
    logger.info(conversion.summary())
    return conversion


def prepare(model: nn.Module, recipe: Recipe) -> Conversion:
    """Install what ``recipe`` names, on any device (meta too), without touching a weight.

    Raises:
        ConversionError: as :func:`apply`.
    """
    return _install(_checked_plan(model, recipe))


def prepare_to_observe(model: nn.Module, recipe: Recipe) -> Conversion:
    """Install what shows the operands that ``recipe`` would quantize, and leaves them, and the weights, unchanged.

    Raises:
        ConversionError: as :func:`apply`.
    """
    return _install(_checked_plan(model, recipe), is_passive=True)


def make_room(model: nn.Module, recipe: Recipe) -> None:
    """Give the modules of a model the buffers for what is fitted to them under ``recipe``, before these are loaded.

    Raises:
        ConversionError: the recipe does not fit the model.
    """
    if not any(rule.is_fitted for rule in recipe.rules):
        return
    for site in make_plan(model, recipe).sites:
        if site.kind == "linear":
            make_room_for_transform(site.module, site.transform, site.input_axis)
        elif site.k_offset:
            make_room_for_offset(site.name, site.module, site.shape)


def _is_frozen(site: QuantizedSite, versions: Mapping[str, TensorVersion]) -> bool:
    """Return whether a weight was on the grid when the model was saved, and has not changed since."""
    version = versions.get(f"{site.module_name}.{site.parameter}")
    return version is not None and not site.weight.is_meta and version.verify(site.weight)


def _checked_plan(model: nn.Module, recipe: Recipe) -> Plan:
    if any(isinstance(m, QuantizedLayer) or override_of(m) for m in model.modules()):
        raise ConversionError(
            "this model is quantized already: load it anew, and use either MX_SPECS_JSON with a patched transformers "
            "or mxlab.apply, not both"
        )
    if (carried := saved.carried_config(model)) is not None:
        saved.check_same(carried_recipe(carried), recipe)
    elif (config := getattr(getattr(model, "config", None), "quantization_config", None)) is not None:
        method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", config)
        raise ConversionError(
            f"this checkpoint is quantized already ({method}): quantizing its values again would say nothing about a "
            "format; load the unquantized model"
        )
    return make_plan(model, recipe)


def refuse_calibrated(recipe: Recipe) -> None:
    """Raise ConversionError where a recipe asks for what only a calibration text gives."""
    _refuse_algorithms(recipe)
    _refuse_fitted(recipe)


def _refuse_fitted(recipe: Recipe) -> None:
    for rule in recipe.rules:
        if rule.is_fitted:
            what = "k_offset" if rule.k_offset else str(rule.transform)
            raise ConversionError(
                f"recipe {recipe.name}: {rule} asks for {what}, which is fitted by calibration, and this model was not "
                "quantized with it: use mxlab quantize, and load what it saves"
            )


def _refuse_algorithms(recipe: Recipe) -> None:
    if not recipe.algorithms:
        return
    asked, keys = ", ".join(recipe.algorithms), "[algorithms]"
    if MASE in recipe.algorithms:
        tables = recipe.algorithms[MASE]
        asked, keys = f"MASE's {', '.join(tables)}", ", ".join(_KEYS_OF_MASE[name] for name in tables)
    raise ConversionError(
        f"recipe {recipe.name} asks for {asked}, which take a calibration text: use mxlab quantize, and load what it "
        f"saves; or take {keys} out, to round to nearest"
    )


def _install(
    plan: Plan, is_passive: bool = False, clamps: Mapping[str, int] | None = None, remarks: Sequence[str] = ()
) -> Conversion:
    model, recipe = plan.model, plan.recipe
    _check_experts(plan)
    injection = Injection(injected_options(recipe)) if recipe.inject and not is_passive else None
    remarks = (*_make_eager(model, plan.sites, injection), *remarks)
    installer = _Installer(recipe, is_passive)
    for site in plan.sites:
        installer.install(site)
    for parent, shared in installer.shared.items():
        shared.install(model.get_submodule(parent))
    if any(site.by_phase["prefill"] != site.by_phase["decode"] for site in plan.sites):
        installer.phase.install(model)
    conversion = Conversion(model, recipe, plan.sites, dict(clamps or {}), remarks, injection)
    if injection is not None:
        injection.install(model)
        saved.SavePretrained(conversion).install()
    if plan.sites and not is_passive:
        saved.expect_frozen(conversion, saved.frozen_versions(saved.carried_config(model)))
        WeightGuard([site.name for site in plan.sites if site.kind == "linear"]).install(model)
        saved.SavePretrained(conversion).install()
    return conversion


@dataclass
class _Installer:
    """Converts the sites of one model, one after the other; holds what they share."""

    recipe: Recipe
    is_passive: bool
    phase: PassPhase = field(default_factory=PassPhase)
    shared: defaultdict[str, SharedInput] = field(default_factory=lambda: defaultdict(SharedInput))  # by parent's name
    experts: dict[str, QuantizedExperts] = field(default_factory=dict)  # by the module's name

    def install(self, site: QuantizedSite) -> None:
        """Convert the module of a site."""
        if site.kind == "attention":
            if site.k_offset and not self.is_passive:
                make_room_for_offset(site.name, site.module, site.shape)
            argument = cache_argument(site.module)
            assert argument is not None  # or it would not be an attention
            QuantizedAttention(
                site.name,
                site.module,
                argument,
                site.by_phase,
                self.recipe.numerics,
                self.phase,
                self.is_passive,
                site.transform,
            ).install()
        elif site.kind == "linear":
            shared = self.shared[site.name.rpartition(".")[0]]
            linear.convert(site.module, self._operands(site), shared, self.phase, site.tied_to is not None)
        else:
            self._experts(site).add(site.parameter, self._operands(site))

    def _experts(self, site: QuantizedSite) -> QuantizedExperts:
        name, module = site.module_name, site.module
        if name not in self.experts:
            weights = sites.multiplied_parameters(module, site.part)
            self.experts[name] = QuantizedExperts(name, module, weights, site.input_axis == -2, self.phase)
            self.experts[name].install()
        return self.experts[name]

    def _operands(self, site: QuantizedSite) -> dict[Phase, LinearOperands]:
        if self.is_passive:
            return dict.fromkeys(site.by_phase, LinearOperands())
        return {phase: linear_operands(self.recipe, of, site.transform) for phase, of in site.by_phase.items()}


def linear_operands(
    recipe: Recipe, formats: Mapping[str, NumberFormat], transform: Transform | None = None
) -> LinearOperands:
    """Return how ``recipe`` treats the operands of a linear layer with these formats by role."""
    return LinearOperands(**formats, elementwise=recipe.elementwise, numerics=recipe.numerics, transform=transform)


def freeze(found: Sequence[QuantizedSite]) -> None:
    """Quantize the weights of all converted modules in place, as far as they can be."""
    for module in track(list(dict.fromkeys(site.module for site in found)), "quantizing weights"):
        if isinstance(module, QuantizedLayer):
            module.freeze()
        elif isinstance(experts := override_of(module), QuantizedExperts):
            experts.freeze()


def check_storage(storage: str) -> None:
    """Raise SpecError unless ``storage`` names one."""
    if storage not in STORAGES:
        raise SpecError(f"storage is {storage!r}: it must be one of {', '.join(STORAGES)}")


def check_packable(found: Sequence[QuantizedSite]) -> None:
    """Raise ConversionError at the first weight that cannot be packed."""
    for site in found:
        if site.kind == "experts" and "weight" in site.roles:
            raise ConversionError(
                f"{site.name}: experts cannot be packed; leave them out by a rule without weight, or use storage='grid'"
            )
        roles = ("weight",) if site.kind == "linear" else KV_ROLES if site.kind == "attention" else ()
        for role in roles:
            if role in site.roles:
                packable_format(site.by_phase.values(), site.name, role)


def pack_sites(found: Sequence[QuantizedSite]) -> None:
    """Pack the weights of converted linear layers, one after the other, and have attentions keep codes in caches."""
    for site in found:
        if isinstance(attention := override_of(site.module), QuantizedAttention):
            attention.keeps_codes = True
    for site in track([s for s in found if s.kind == "linear" and "weight" in s.roles], "packing weights"):
        if not isinstance(site.module, PackedLayer):
            assert isinstance(site.module, QuantizedLayer)
            pack(site.module, site.name)


def _check_experts(plan: Plan) -> None:
    untouched = linear_operands(plan.recipe, {}).untouched
    for site in plan.sites:
        if site.kind == "experts" and site.weight.dtype not in untouched:
            raise ConversionError(
                f"{site.name}: experts have no element-wise rounding of {site.weight.dtype}; use exact numerics and "
                "bfloat = 0"
            )


def _make_eager(model: Any, found: tuple[QuantizedSite, ...], injection: Injection | None) -> list[str]:
    """Have the model compute its attention eagerly where what is quantized is met only there; say so in words."""
    roles = {role for site in found for role in site.roles}
    present = getattr(getattr(model, "config", None), "_attn_implementation", None)
    wanted = ", ".join(sorted(roles.intersection(EAGER_ROLES if present == "sdpa" else INNER_ROLES)))
    if injection is not None:
        wanted = "its products and softmax"
    if not wanted or present in (None, "eager"):
        return []
    model.set_attn_implementation("eager")
    if model.config._attn_implementation != "eager":
        raise ConversionError(
            f"{type(model).__name__} computes its attention by {present}, where {wanted} cannot be met, and cannot be "
            "switched: load it with attn_implementation='eager'"
        )
    return [f"attention is computed eagerly, not by {present}, for the sake of {wanted}"]


def _meta_remarks(plan: Plan) -> list[str]:
    count = sum(site.kind != "attention" and site.weight.is_meta for site in plan.sites)
    return [f"{count} weights are on the meta device: they are quantized once they are there"] if count else []
