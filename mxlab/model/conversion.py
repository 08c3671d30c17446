"""What a conversion did: the sites, the bits they take, what stays in high precision."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from mxlab.model import sites
from mxlab.model.nn.forward import override_of
from mxlab.model.nn.injection import Injection
from mxlab.model.nn.operands import Observable
from mxlab.model.plan import QuantizedSite
from mxlab.numerics.fingerprints import fingerprint
from mxlab.recipe import Phase, Recipe, Rule
from mxlab.recipe.rule import KV_ROLES, PHASES

_FITTED_BITS = 16  # of an element of a fitted transform, or of an offset of keys
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_PLURALS = {"linear": "linears", "experts": "experts", "attention": "attentions"}


@dataclass(frozen=True)
class Conversion:
    """What :func:`mxlab.apply` did to ``model``.

    ``weight_clamps`` counts, over all quantized weights as they were before, the blocks whose shared scale was out of
    range (see :func:`mxlab.numerics.scale_clamps`). ``remarks`` are what else a user should know. ``injection`` is what
    computes the model where the recipe has operators injected.
    """

    model: nn.Module
    recipe: Recipe
    sites: tuple[QuantizedSite, ...]
    weight_clamps: dict[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    injection: Injection | None = None

    @property
    def linears(self) -> list[QuantizedSite]:
        """The linear layers that were replaced, and the experts."""
        return [site for site in self.sites if site.kind != "attention"]

    @property
    def attentions(self) -> list[QuantizedSite]:
        """The attentions that quantize something."""
        return [site for site in self.sites if site.kind == "attention"]

    @cached_property
    def bits_per_parameter(self) -> float:
        """Average storage of the parameters in bits: quantized weights with their scales, others in their dtype.

        A parameter that is used in several places (tied embeddings) counts once, and where a quantized copy of it is
        kept, that copy as well. Biases are rounded as they are used, and stored unchanged. Transforms that were fitted
        are stored in 16 bits an element, one for the layers that share an input, and so are the offsets of keys.
        """
        in_place = {id(p) for site in self.linears for p in site.stored_parameters()}
        parameters = list(self.model.parameters())
        bits = sum(p.numel() * p.element_size() * 8 for p in parameters if id(p) not in in_place)
        bits += sum(site.storage_bits() for site in self.linears) + self._fitted_bits()
        packed = sum(prod(site.shape) for site in self.linears if site.is_packed and site.tied_to is None)
        return bits / max(sum(p.numel() for p in parameters) + packed, 1)

    @property
    def bits_per_weight(self) -> float | None:
        """Average bits of the elements of quantized weights, scales and what was fitted counted; None without any."""
        quantized = [site for site in self.linears if "weight" in site.roles]
        elements = sum(prod(site.shape) for site in quantized)
        bits = sum(site.storage_bits() for site in quantized) + self._fitted_bits()
        return bits / elements if elements else None

    def _fitted_bits(self) -> int:
        fitted = {
            (
                site.name.rpartition(".")[0],
                id(matrices) if matrices.is_meta else fingerprint(matrices),
            ): matrices.numel()
            for site in self.linears
            if (matrices := getattr(site.module, "input_transform", None)) is not None
        }
        offsets = sum(prod(site.shape) for site in self.attentions if site.k_offset)
        return _FITTED_BITS * (sum(fitted.values()) + offsets)

    def bits_in(self, phase: Phase) -> float:
        """Average bits of the parameters as the passes of one phase read them; counted as :attr:`bits_per_parameter`.

        A weight with a format for each phase is kept in both, and read in one of them.
        """
        one_phase = tuple(replace(site, by_phase=dict.fromkeys(PHASES, site.by_phase[phase])) for site in self.sites)
        return replace(self, sites=one_phase).bits_per_parameter

    def kv_bits_in(self, phase: Phase) -> float | None:
        """Average bits of the elements of K and V that the passes of one phase cache; None without an attention."""
        unquantized = next(self.model.parameters()).element_size() * 8
        quantized = {site.name: site.by_phase[phase] for site in self.attentions}
        total = count = 0
        for site in sites.find_sites(self.model):
            if site.kind == "attention":
                formats, size = quantized.get(site.name, {}), max(prod(site.shape), 1)
                widths = [formats[role].bits_per_element if role in formats else unquantized for role in KV_ROLES]
                total, count = total + size * sum(widths), count + size * len(widths)
        return total / count if count else None

    @property
    def notes(self) -> list[str]:
        """What a user should know: axes that the block size does not divide, tied weights, a change of attention."""
        uneven = Counter(
            (site.kind, role, _axis_length(site), fmt.block_size)
            for site in self.sites
            for role, fmt in dict.fromkeys(item for phase in PHASES for item in site.by_phase[phase].items())
            if role in ("weight", "activation", "k", "v", "q")
            and (length := _axis_length(site))
            and fmt.block_size
            and length % fmt.block_size
        )
        partial = [
            f"{role} of {count} {_PLURALS[kind]}: the axis of {length} is not a multiple of the block size {block}; "
            f"its last block has {length % block} elements"
            for (kind, role, length, block), count in uneven.items()
        ]
        tied = [
            f"the weight of {site.name} is tied to {site.tied_to}, which stays unchanged: {site.name} computes with a "
            "quantized copy"
            for site in self.sites
            if site.tied_to
        ]
        return [*partial, *tied, *self.remarks]

    def summary(self) -> str:
        """Return one line: how many layers, which formats, KV or not."""
        if self.injection is not None:
            given = ", ".join(f"{name} {value}" for name, value in self.recipe.inject.items())
            injected = f"recipe {self.recipe.name}: torch's operators are replaced while the model computes ({given})"
            return "; ".join([injected, f"{self.recipe.numerics} numerics", *self.notes])
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
        """The names of the linear layers, and of the experts' weights, that no rule matched; none under injection."""
        if self.injection is not None:
            return []
        replaced = {site.name for site in self.linears}
        return [
            site.name for site in sites.find_sites(self.model) if site.kind != "attention" and site.name not in replaced
        ]

    def acted(self, site: QuantizedSite) -> list[Phase]:
        """Return the phases in which a site has computed since the conversion."""
        computer = computer_of(site)
        return [phase for phase in PHASES if computer is not None and (site.parameter, phase) in computer.acted]

    def idle_rules(self) -> list[Rule]:
        """Return the rules under which nothing has computed since the conversion."""
        busy = {site.rules[phase] for site in self.sites for phase in self._phases_acted(site) if phase in site.rules}
        return [self.recipe.rules[n] for n in sorted({n for s in self.sites for n in s.rules.values()} - busy)]

    def _phases_acted(self, site: QuantizedSite) -> list[Phase]:
        # Where no site differs between the phases, nothing tells them apart.
        is_told = any(s.by_phase["prefill"] != s.by_phase["decode"] for s in self.sites)
        acted = self.acted(site)
        return acted if is_told or not acted else list(PHASES)

    def inventory(self) -> dict[str, Any]:
        """Return what was replaced and what was left, as plain values for JSON."""
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
                    "formats": {role: str(fmt) for role, fmt in site.all_formats.items()},
                    "bits_per_element": {role: fmt.bits_per_element for role, fmt in site.all_formats.items()},
                    "acted": self._phases_acted(site),
                }
                for site in self.sites
            ],
            "linear_layers_in_high_precision": self.linears_in_high_precision,
            "idle_rules": [str(rule) for rule in self.idle_rules()],
            "notes": self.notes,
            **({} if self.injection is None else {"injected_calls": dict(self.injection.calls)}),
        }

    def write_inventory(self, file: Path | None) -> None:
        """Write the inventory as JSON; nothing where there is no file to write."""
        if file is not None:
            file.write_text(json.dumps(self.inventory(), indent=1), encoding="utf-8")


def computer_of(site: QuantizedSite) -> Observable:
    """Return what treats the operands of a site: a quantized layer, or what took the place of its module's forward."""
    return site.module if isinstance(site.module, Observable) else override_of(site.module)


def _axis_length(site: QuantizedSite) -> int:
    """Return how long the axis is along which a site's operands are cut into blocks; 0 where that is not known."""
    return site.shape[site.input_axis] if site.shape else 0


def _described(what: str, found: list[QuantizedSite]) -> str:
    """``210 linear layers (weight fp4_e2m1@32, activation fp6_e2m3@32)``, one bracket per combination of formats."""
    combinations = Counter(", ".join(f"{r} {f}" for r, f in s.all_formats.items()) for s in found)
    return "; ".join(
        f"{count} {what}{'s' if count > 1 else ''} ({formats or 'rounded element-wise'})"
        for formats, count in combinations.items()
    )


@dataclass(frozen=True)
class InventoryRow:
    """Modules, or parameters, that differ in the number of their layer only, and one of their roles.

    ``name`` has ``*`` for that number and ``layers`` lists it; ``bits`` are those of one element, its share of the
    scale included.
    """

    name: str
    layers: str
    count: int
    shape: tuple[int, ...]
    role: str
    format: str
    bits: float


def quantized_rows(conversion: Conversion) -> list[InventoryRow]:
    """Return a row for each role of each kind of site."""
    found = (
        (site.name, site.shape, role, str(fmt), fmt.bits_per_element)
        for site in conversion.sites
        for role, fmt in site.all_formats.items()
    )
    return _grouped(found)


def high_precision_rows(conversion: Conversion) -> list[InventoryRow]:
    """Return a row for each kind of parameter that stays unquantized; one that is used in two places is named once."""
    stored = {id(p) for site in conversion.sites for p in site.stored_parameters()}
    found = (
        (name, tuple(p.shape), "parameter", str(p.dtype).removeprefix("torch."), p.element_size() * 8)
        for name, p in conversion.model.named_parameters()
        if id(p) not in stored
    )
    return _grouped(found)


def left_names(conversion: Conversion) -> list[str]:
    """Return the linear layers that stay unquantized, those that are alike as one: ``model.layers.*.fc1 (0-3, 5)``."""
    groups = _grouped((name, (), "", "", 0) for name in conversion.linears_in_high_precision)
    return [f"{row.name} ({row.layers})" if row.layers else row.name for row in groups]


def totals(conversion: Conversion) -> list[str]:
    """Return in words, a line each: element-wise rounding, the width of K and V, and of the parameters."""
    kv: dict[Phase, float | None] = {phase: conversion.kv_bits_in(phase) for phase in PHASES}
    parameters: dict[Phase, float | None] = {phase: conversion.bits_in(phase) for phase in PHASES}
    stored = conversion.bits_per_parameter
    kept = "" if stored in parameters.values() else f"; {stored:.4f} in memory, which holds a copy for each format"
    return [
        f"element-wise rounding: {_described_rounding(conversion)}",
        f"average bits per element of K and V: {_described_phases(kv)}",
        f"average bits per parameter: {_described_phases(parameters)}{kept}",
    ]


def _described_rounding(conversion: Conversion) -> str:
    used, count = conversion.recipe.elementwise, len(conversion.linears)
    if not used.is_used or not count:
        return "none"
    flushed = "" if used.subnormals else ", subnormals flushed to zero"
    width = f"bfloat, {used.bfloat}" if used.bfloat else f"fp, {used.fp}"
    return (
        f"to {width} bits, around the products of {count} linear layers (weights {used.weight_rounding}, inputs and "
        f"results {used.output_rounding}{flushed})"
    )


def _described_phases(widths: Mapping[Phase, float | None]) -> str:
    if None in widths.values():
        return "there is no attention that caches them"
    if len(set(widths.values())) == 1:
        return f"{widths['prefill']:.4f} in every phase"
    return ", ".join(f"{width:.4f} in {phase}" for phase, width in widths.items())


def _grouped(found: Iterable[tuple[str, tuple[int, ...], str, str, float]]) -> list[InventoryRow]:
    groups: dict[tuple, list[str]] = {}
    for name, *rest in found:
        groups.setdefault((_NUMBER.sub("*", name, count=1), *rest), []).append(name)
    return [InventoryRow(key[0], _layers(names), len(names), *key[1:]) for key, names in groups.items()]


def _layers(names: list[str]) -> str:
    """Return the layers of these names, as ranges; nothing outside of them."""
    numbers = sorted({int(match[0]) for name in names if (match := _NUMBER.search(name))})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
