"""Match each site of a model to the first rule of a recipe that selects it, per phase of generation.

:func:`make_plan` changes nothing: it raises where a rule does not fit the model, so that a model is converted whole or
not at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mxlab.errors import ConversionError
from mxlab.formats import NumberFormat
from mxlab.model.matching import RuleMatcher
from mxlab.model.nn.packed import PackedLayer
from mxlab.model.sites import Site
from mxlab.model.transforms import transform_of
from mxlab.numerics import DTYPES
from mxlab.recipe import PHASES, Phase, Recipe, Rule
from mxlab.recipe.transform import Hadamard, Transform, Wush

Rules = Mapping[Phase, Rule | None]


@dataclass(frozen=True)
class QuantizedSite(Site):
    """A site that rules select, and the format of each of its roles.

    Attributes:
        by_phase: the formats by role, for each phase of generation.
        rules: the number of the rule that gave them, for each phase that has one.
        transform: of the operands before they are quantized; None where there is none.
        k_offset: whether K is quantized without its mean, which a calibration text gives.
        tied_to: name of a module that shares the weight; None where there is none.
    """

    by_phase: Mapping[Phase, Mapping[str, NumberFormat]] = field(default_factory=dict)
    rules: Mapping[Phase, int] = field(default_factory=dict)
    transform: Transform | None = None
    k_offset: bool = False
    tied_to: str | None = None

    @property
    def weight(self) -> Tensor:
        """The weight of a linear layer or of experts; :attr:`input_axis` is the axis of its blocks."""
        return getattr(self.module, self.parameter)

    @property
    def bias(self) -> Tensor:
        """The bias [out] of a linear layer that has one."""
        return self.module.get_parameter("bias")

    @property
    def formats(self) -> Mapping[str, NumberFormat]:
        """The formats by role, in prefill."""
        return self.by_phase["prefill"]

    @property
    def all_formats(self) -> dict[str, NumberFormat]:
        """The formats by role; where the phases differ, with the phase before the role: ``decode weight``."""
        of = self.by_phase
        common = {role: fmt for role, fmt in of["prefill"].items() if of["decode"].get(role) == fmt}
        apart = {f"{phase} {r}": f for phase in PHASES for r, f in of[phase].items() if r not in common}
        return {**common, **apart}

    @property
    def roles(self) -> set[str]:
        """The roles that have a format in some phase."""
        return {role for formats in self.by_phase.values() for role in formats}

    @property
    def weight_formats(self) -> set[NumberFormat]:
        """The formats of the weight: one, or one for each phase."""
        return {formats["weight"] for formats in self.by_phase.values() if "weight" in formats}

    @property
    def is_in_place(self) -> bool:
        """Whether the weight itself is quantized, rather than a copy of it for each format."""
        in_every_phase = all("weight" in formats for formats in self.by_phase.values())
        return self.tied_to is None and in_every_phase and len(self.weight_formats) == 1

    def stored_parameters(self) -> list[Tensor]:
        """Return the parameters whose storage is counted in the bits of a format instead of those of their dtype."""
        return [self.weight] if self.is_in_place and not self.is_packed else []

    @property
    def is_packed(self) -> bool:
        """Whether the weight is stored in the bits of its format, and no parameter any more."""
        return isinstance(self.module, PackedLayer)

    def storage_bits(self) -> int:
        """Return what the quantized weight takes, in each of its formats."""
        shape = list(self.shape)
        shape.append(shape.pop(self.input_axis))
        matrices, matrix = (shape[0], shape[1:]) if len(shape) == 3 else (1, shape)
        return sum(matrices * fmt.storage_bits(tuple(matrix)) for fmt in self.weight_formats)

    def quantized_parameters(self) -> Iterator[tuple[str, Tensor, int]]:
        """Yield role, tensor and axis of the blocks of the weight and the bias, as far as they are quantized.

        The weights of experts come one by one where each has a scale of its own.
        """
        if "weight" in self.roles:
            is_stack = self.weight.ndim == 3 and any(fmt.tensor_bits for fmt in self.weight_formats)
            for matrix in self.weight if is_stack else (self.weight,):
                yield "weight", matrix, self.input_axis
        if "bias" in self.roles:
            yield "bias", self.bias, -1


@dataclass(frozen=True)
class Plan:
    """What a recipe quantizes in a model, before anything is changed."""

    model: nn.Module
    recipe: Recipe
    sites: tuple[QuantizedSite, ...]

    def spelled_out(self) -> Recipe:
        """Return the recipe with a rule for each site, by name, in place of its own: it quantizes the model alike.

        When some of these rules are taken away, or some of their formats, the rest keeps its meaning: no later rule
        steps in (:mod:`mxlab.recipe.subset`).
        """
        rules = tuple(
            Rule(
                name=site.name,
                phase=phase,
                transform=site.transform,
                k_offset=site.k_offset and "k" in formats,
                **formats,  # pyright: ignore[reportArgumentType]
            )
            for site in self.sites
            for phase, formats in _distinct_phases(site)
        )
        return replace(self.recipe, rules=rules)

    def check_finite(self) -> None:
        """Raise ConversionError at the first weight or bias to be quantized that holds NaN or infinities."""
        for site in self.sites:
            for role, tensor, _ in site.quantized_parameters():
                values = tensor.detach()
                if values.is_meta or torch.isfinite(values.sum()):
                    continue
                if bad := int((~torch.isfinite(values)).sum()):  # the sum may have overflowed
                    raise ConversionError(
                        f"the {role} of {site.name} holds {bad} values that are NaN or infinite, which would take "
                        "their whole blocks with them: repair the checkpoint, or skip the layer"
                    )


def make_plan(model: nn.Module, recipe: Recipe) -> Plan:
    """Match the sites of ``model`` to the rules of ``recipe``; the first rule that selects a site wins in a phase.

    Raises:
        ConversionError: a rule that matches nothing, or a module that cannot serve the roles of its rule.
    """
    matcher = RuleMatcher(model, recipe)
    matched = {name: matcher.match(name) for name in matcher.names}
    matcher.check_every_rule_used()
    chosen = [(matcher.sites[name], rules) for name, rules in matched.items() if any(rules.values())]
    _check_biases(recipe, chosen)
    holders = _holders(model)
    numbers = {id(rule): number for number, rule in enumerate(recipe.rules)}
    found = tuple(_quantized_site(site, rules, holders, numbers) for site, rules in chosen)
    for site in found:
        if site.kind == "experts" and site.tied_to:
            raise ConversionError(f"the weight of {site.name} is shared with {site.tied_to}: untie it")
    return Plan(model, recipe, found)


def _check_biases(recipe: Recipe, chosen: Sequence[tuple[Site, Rules]]) -> None:
    """Raise ConversionError at a rule for biases none of whose layers has one; some may lack it."""
    for rule in (r for r in recipe.rules if r.bias and not r.bias_optional):
        if not any(rule in rules.values() and _has_bias(site) for site, rules in chosen):
            raise ConversionError(
                f"no layer that {rule} matches has a bias to quantize: take that role out, or add bias_optional = true"
            )


def _has_bias(site: Site) -> bool:
    return getattr(site.module, "bias", None) is not None


def _quantized_site(
    site: Site, rules: Rules, holders: Mapping[int, list[str]], numbers: Mapping[int, int]
) -> QuantizedSite:
    by_phase: dict[Phase, dict[str, NumberFormat]] = {
        phase: {role: fmt for role, fmt in rule.formats.items() if role != "bias" or _has_bias(site)} if rule else {}
        for phase, rule in rules.items()
    }
    by_number: dict[Phase, int] = {phase: numbers[id(rule)] for phase, rule in rules.items() if rule}
    found = QuantizedSite(
        **vars(site),
        by_phase=by_phase,
        rules=by_number,
        transform=transform_of(site, rules.values()),
        k_offset=any(rule.k_offset for rule in rules.values() if rule),
    )
    if site.kind == "attention":
        return found
    weight = found.weight
    if type(weight.data) is not Tensor or weight.dtype not in DTYPES:
        raise ConversionError(
            f"the weight of {site.name} is a {type(weight.data).__name__} of {weight.dtype}: mxlab quantizes "
            "float32, bfloat16 and float16; load the unquantized checkpoint in one of them"
        )
    others = (name for name in holders[id(found.weight)] if name != found.module_name)
    is_changed = "weight" in found.roles or isinstance(found.transform, Hadamard | Wush)
    return replace(found, tied_to=next(others, None)) if is_changed else found


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of the modules that hold each parameter, by the parameter's id."""
    found: defaultdict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            found[id(parameter)].append(name)
    return found


def _distinct_phases(site: QuantizedSite) -> list[tuple[Phase | None, Mapping[str, NumberFormat]]]:
    """Return the formats of each phase that has some; once, under None, where both phases have the same."""
    if site.by_phase["prefill"] == site.by_phase["decode"]:
        return [(None, site.formats)]
    return [(phase, formats) for phase, formats in site.by_phase.items() if formats]
