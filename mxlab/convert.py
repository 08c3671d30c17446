"""Converting a loaded model in place: :func:`apply`, and what it did: :class:`Conversion`."""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mxlab import recipe as recipes
from mxlab.errors import ConversionError
from mxlab.formats import MXFormat
from mxlab.nn.attention import KVQuantizer
from mxlab.nn.linear import LinearQuantizer, MxLinear, is_convertible
from mxlab.nn.sharing import SharedInput
from mxlab.numerics import scale_clamps
from mxlab.recipe import Recipe, Rule
from mxlab.specs import INVENTORY_VARIABLE

logger = logging.getLogger("mxlab")


@dataclass(frozen=True)
class Site:
    """A module that was replaced (a linear layer) or hooked (an attention), and the formats of its roles.

    ``shape`` is the weight's [out, in] of a linear layer, (K/V heads, head_dim) of an attention where known.
    """

    name: str
    module: nn.Module
    kind: str
    shape: tuple[int, ...]
    formats: dict[str, MXFormat]
    kv: KVQuantizer | None = None


@dataclass(frozen=True)
class Conversion:
    """What :func:`apply` did to ``model``.

    ``weight_clamps`` counts, over all quantized weights as they were before, the blocks whose shared scale was out of
    range (see :func:`mxlab.numerics.scale_clamps`).
    """

    model: nn.Module
    recipe: Recipe
    sites: tuple[Site, ...]
    weight_clamps: dict[str, int] = field(default_factory=dict)

    @property
    def linears(self) -> list[Site]:
        """The linear layers that were replaced."""
        return [site for site in self.sites if site.kind == "linear"]

    @property
    def attentions(self) -> list[Site]:
        """The attentions whose K and V are quantized."""
        return [site for site in self.sites if site.kind == "attention"]

    @cached_property
    def bits_per_parameter(self) -> float:
        """Average storage of the model's parameters in bits: quantized weights with their scales, others as they are.

        A parameter that is used in several places (tied embeddings) counts once.
        """
        quantized = {id(s.module.weight): s.formats["weight"] for s in self.linears if "weight" in s.formats}
        parameters = list(self.model.parameters())
        bits = sum(_storage_bits(tuple(p.shape), quantized.get(id(p)), p.element_size()) for p in parameters)
        return bits / max(sum(p.numel() for p in parameters), 1)

    @property
    def notes(self) -> list[str]:
        """What a user should know: axes that the block size does not divide."""
        uneven = Counter(
            (site.kind, role, site.shape[-1], fmt.block_size)
            for site in self.sites
            for role, fmt in site.formats.items()
            if site.shape and fmt.block_size and site.shape[-1] % fmt.block_size
        )
        return [
            f"{role} of {count} {kind}s: the axis of {length} is not a multiple of the block size {block}; "
            f"its last block has {length % block} elements"
            for (kind, role, length, block), count in uneven.items()
        ]

    def summary(self) -> str:
        """One line: how many layers, which formats, KV or not."""
        if not self.sites:
            return f"recipe {self.recipe.name}: nothing is quantized"
        parts = [
            f"recipe {self.recipe.name}: {_described('linear layer', self.linears) or 'linear layers not quantized'}",
            _described("attention", self.attentions) or "KV not quantized",
            f"{self.recipe.numerics} numerics",
        ]
        if self.linears and (left := self.linears_in_high_precision):
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            parts.append(f"left in high precision: {', '.join(left[:3])}{more}")
        return "; ".join([*parts, *self.notes])

    @property
    def linears_in_high_precision(self) -> list[str]:
        """The names of the linear layers that no rule matched."""
        replaced = {id(site.module) for site in self.linears}
        return [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and id(m) not in replaced]

    def inventory(self) -> dict[str, Any]:
        """What was replaced and what was left, as plain values for JSON."""
        return {
            "recipe": self.recipe.to_dict(),
            "hash": self.recipe.hash,
            "linear_layers": len(self.linears),
            "attentions": len(self.attentions),
            "bits_per_parameter": self.bits_per_parameter,
            "sites": [
                {
                    "module": site.name,
                    "kind": site.kind,
                    "shape": list(site.shape),
                    "formats": {role: str(fmt) for role, fmt in site.formats.items()},
                    "bits_per_element": {role: fmt.bits_per_element for role, fmt in site.formats.items()},
                }
                for site in self.sites
            ],
            "linear_layers_in_high_precision": self.linears_in_high_precision,
            "notes": self.notes,
        }

    def write_inventory(self) -> None:
        """Write the inventory where `mxlab run` asked for it, if this process runs under it."""
        if path := os.environ.get(INVENTORY_VARIABLE):
            Path(path).write_text(json.dumps(self.inventory(), indent=1), encoding="utf-8")


def apply(model: nn.Module, recipe: Recipe | str | Path) -> Conversion:
    """Convert ``model`` in place, as ``recipe`` says, and put the weights on the grid (of a model in evaluation mode).

    Args:
        model: a loaded Hugging Face model.
        recipe: a Recipe, the name of a shipped one (``"ex1"``), or a TOML file.

    Raises:
        SpecError: no such recipe.
        ConversionError: the model was converted before, a rule matches nothing, or a module cannot serve a role.
            The model is then as it was.
    """
    conversion = prepare(model, recipes.load(recipe))
    # Counted first: on the grid, a block whose scale was clamped may be all zeros.
    conversion = replace(conversion, weight_clamps=_weight_clamps(conversion.linears))
    for site in conversion.linears:
        assert isinstance(site.module, MxLinear)
        site.module.freeze()
    logger.info(conversion.summary())
    conversion.write_inventory()
    return conversion


def prepare(model: nn.Module, recipe: Recipe) -> Conversion:
    """Replace and hook what ``recipe`` names, on any device (meta too), without touching a weight.

    Raises:
        ConversionError: as :func:`apply`.
    """
    if any(isinstance(m, MxLinear) or _has_kv_quantizer(m) for m in model.modules()):
        raise ConversionError(
            "this model is quantized already: load it anew, and use either MX_SPECS_JSON with a patched transformers "
            "or mxlab.apply, not both"
        )
    found = list(_sites(model, recipe))
    shared: defaultdict[str, SharedInput] = defaultdict(SharedInput)  # by the name of the layers' parent
    for site in found:
        _install(site, recipe, shared[site.name.rpartition(".")[0]])
    for parent, inputs in shared.items():
        inputs.attach(model.get_submodule(parent))
    return Conversion(model, recipe, tuple(found))


def _sites(model: nn.Module, recipe: Recipe) -> Iterator[Site]:
    """The modules the rules match, each under its first matching rule; nothing is changed yet."""
    unused = set(range(len(recipe.rules)))
    for name, module in model.named_modules():
        for i, rule in enumerate(recipe.rules):
            if rule.matches(name):
                unused.discard(i)
                yield (
                    _attention_site(name, module, rule, recipe)
                    if rule.is_attention
                    else _linear_site(name, module, rule, model)
                )
                break
    if unused:
        rule = recipe.rules[min(unused)]
        raise ConversionError(
            f"recipe {recipe.name}: the rule for modules = {rule.modules!r} matches no module of "
            f"{type(model).__name__}, or only such as an earlier rule took; its linear layers are named like "
            f"{_examples(model)}"
        )


def _linear_site(name: str, module: nn.Module, rule: Rule, model: nn.Module) -> Site:
    if type(module) is not nn.Linear:
        raise ConversionError(
            f"{name} is a {type(module).__name__}: only torch.nn.Linear has a weight and an activation to quantize; "
            f"let the rule for modules = {rule.modules!r} match linear layers alone"
        )
    if not is_convertible(module):
        raise ConversionError(
            f"the forward of {name} was replaced by other code, which would bypass the quantization: convert the model "
            f"first, or leave {name} out of the rule for modules = {rule.modules!r}"
        )
    tied = [n for n, m in model.named_modules() if m is not module and getattr(m, "weight", None) is module.weight]
    if rule.weight and tied:
        raise ConversionError(
            f"the weight of {name} is shared with {tied[0]}, which would be quantized with it: untie it, or leave "
            f"{name} out of the rule for modules = {rule.modules!r}"
        )
    return Site(name, module, "linear", tuple(module.weight.shape), rule.formats)


def _attention_site(name: str, module: nn.Module, rule: Rule, recipe: Recipe) -> Site:
    if "past_key_values" not in inspect.signature(module.forward).parameters:
        raise ConversionError(
            f"{name} is a {type(module).__name__}, whose forward takes no past_key_values: it is not an attention "
            f"that k and v can be quantized in; change the rule for modules = {rule.modules!r}"
        )
    kv = KVQuantizer(rule.k, rule.v, recipe.numerics)
    return Site(name, module, "attention", _kv_shape(module), rule.formats, kv)


def _kv_shape(attention: Any) -> tuple[int, ...]:
    head_dim, k_proj = getattr(attention, "head_dim", None), getattr(attention, "k_proj", None)
    return (k_proj.out_features // head_dim, head_dim) if head_dim and isinstance(k_proj, nn.Linear) else ()


def _weight_clamps(linears: list[Site]) -> dict[str, int]:
    total: Counter[str] = Counter(blocks=0, clamped=0, overflowed=0)
    for site in linears:
        weight = site.module.weight
        assert isinstance(weight, Tensor)
        if "weight" in site.formats and not weight.is_meta:
            total.update(scale_clamps(weight, site.formats["weight"]))
    return dict(total)


def _install(site: Site, recipe: Recipe, shared: SharedInput) -> None:
    if site.kind == "attention":
        assert site.kv is not None
        site.kv.attach(site.module)
    else:
        assert isinstance(site.module, nn.Linear)
        formats = site.formats
        quantizer = LinearQuantizer(
            formats.get("weight"), formats.get("activation"), recipe.elementwise, recipe.numerics
        )
        MxLinear.convert(site.module, quantizer, shared)


def _has_kv_quantizer(module: nn.Module) -> bool:
    return any(isinstance(hook, KVQuantizer) for hook in module._forward_pre_hooks.values())


def _examples(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return ", ".join(names[:3]) or "(it has none)"


def _described(what: str, sites: list[Site]) -> str:
    """``210 linear layers (weight fp4_e2m1@32, activation fp6_e2m3@32)``, one bracket per combination of formats."""
    combinations = Counter(", ".join(f"{r} {f}" for r, f in s.formats.items()) for s in sites)
    return "; ".join(
        f"{count} {what}{'s' if count > 1 else ''} ({formats or 'rounded element-wise'})"
        for formats, count in combinations.items()
    )


def _storage_bits(shape: tuple[int, ...], fmt: MXFormat | None, element_size: int) -> int:
    return math.prod(shape) * element_size * 8 if fmt is None else fmt.storage_bits(shape)
