"""Match each site of a model to the first rule of a recipe that selects it, per phase of generation.

:func:`make_plan` changes nothing: it raises where a rule does not fit the model, so that a model is converted whole or
not at all.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mxlab.errors import ConversionError, SpecError
from mxlab.formats import NumberFormat
from mxlab.model import sites
from mxlab.model.nn.attention import ROPE_ARGUMENT
from mxlab.model.nn.linear import is_convertible
from mxlab.model.sites import Site
from mxlab.model.structure import CACHE_ARGUMENTS, Structure, takes_argument, writes_cache
from mxlab.model.transforms import transform_of
from mxlab.numerics import DTYPES
from mxlab.recipe import PHASES, Phase, Recipe, Rule
from mxlab.recipe.transform import Transform

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
        return [self.weight] if self.is_in_place else []

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
    matcher = _Matcher(model, recipe)
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


class _Matcher:
    """Finds the rules of one site after the other, and remembers which rules were of use."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self._structure = Structure(model)
        self.sites = {site.name: site for site in sites.find_sites(model, self._structure)}
        self._model, self._recipe = model, recipe
        self._unused = set(range(len(recipe.rules)))
        rules = list(enumerate(recipe.rules))
        self._unnamed = [number for number, rule in rules if rule.name is None]
        self._by_name: defaultdict[str, list[int]] = defaultdict(list)
        for number, rule in rules:
            if rule.name is not None:
                self._by_name[rule.name].append(number)
        count = self._structure.layer_count
        try:
            self._layers = [rule.layer_numbers(count) for rule in recipe.rules]
        except SpecError as e:
            raise ConversionError(f"recipe {recipe.name}: {e}") from None

    @property
    def names(self) -> list[str]:
        """Names of all sites, and of modules without one, in module order: a rule may name any module."""
        wrapped = {name for name, module in self._model.named_modules() if sites.adapter_names(module)}
        by_module: dict[str, list[str]] = {name: [] for name, _ in self._model.named_modules() if name not in wrapped}
        for site in self.sites.values():
            by_module[site.module_name].append(site.name)
        return [name for module, found in by_module.items() for name in found or [module]]

    def match(self, name: str) -> dict[Phase, Rule | None]:
        """Return the rule of a site in each phase; None where there is none, or one that skips."""
        return {phase: self._first_rule(name, phase) for phase in PHASES}

    def check_every_rule_used(self) -> None:
        """Raise ConversionError at the first rule that no site came under."""
        if not self._unused:
            return
        recipe, rule = self._recipe, self._recipe.rules[min(self._unused)]
        layers = [site.name for site in self.sites.values() if site.kind != "attention"][:3]
        raise ConversionError(
            f"recipe {recipe.name}: {rule} matches no module of {type(self._model).__name__}"
            f"{' that could be quantized' if rule.skip else ''}, or only such as an "
            f"earlier rule took; its linear layers are named like {', '.join(layers) or '(it has none)'}"
        )

    def _first_rule(self, name: str, phase: Phase) -> Rule | None:
        site = self.sites.get(name)
        for number in self._candidates(name, site):
            rule = self._recipe.rules[number]
            if rule.phase not in (None, phase) or not self._selects(number, rule, name, site):
                continue
            self._unused.discard(number)
            if rule.skip:
                return None
            self.sites[name] = _serving_site(self._model, name, site, rule, self._structure)
            return rule
        return None

    def _candidates(self, name: str, site: Site | None) -> Iterator[int]:
        """Yield the numbers of the rules that may select a module: those for one other name are left out."""
        names = {name} if site is None else {name, site.module_name, self._adapted(site)}
        named = [numbers for name in names if (numbers := self._by_name.get(name))]
        return heapq.merge(self._unnamed, *named)

    def _selects(self, number: int, rule: Rule, name: str, site: Site | None) -> bool:
        layers = self._layers[number]
        if layers is not None and self._structure.layer_of(name) not in layers:
            return False
        if site is None:  # no site yet: the rule may still name the module, and learn that it cannot serve
            return not rule.skip and rule.matches(name, type(self._model.get_submodule(name)).__name__)
        # A rule that names a part speaks of linear layers or of attentions, by the roles it gives.
        speaks_of_it = rule.skip or rule.is_attention == (site.kind == "attention")
        class_name = type(site.module).__name__
        return rule.matches(name, class_name, site.part if speaks_of_it else "") or any(
            rule.matches(other, class_name) for other in (site.module_name, self._adapted(site))
        )

    def _adapted(self, site: Site) -> str:
        """Return the name that a layer had before PEFT wrapped it, which is the wrapper's; else its own."""
        outer = site.module_name.rpartition(".")[0]
        is_wrapped = sites.adapter_names(self._model.get_submodule(outer)) and site.part
        return outer if is_wrapped else site.module_name


def _serving_site(model: nn.Module, name: str, site: Site | None, rule: Rule, structure: Structure) -> Site:
    """Return the site that serves the roles of the rule which names it; raises ConversionError where it cannot."""
    if rule.is_attention:
        return _serving_attention(model, site.module_name if site else name, rule, structure)
    if site is None or site.kind == "attention":
        class_name = type(model.get_submodule(name)).__name__
        raise ConversionError(
            f"{name} is a {class_name}: only torch.nn.Linear, Conv1D and experts have a weight and an activation to "
            f"quantize; let {rule} match those alone"
        )
    module_name = site.module_name
    if site.obstacle:
        raise ConversionError(
            f"{module_name} is a {type(site.module).__name__} ({site.obstacle}), which mxlab cannot convert: put one "
            f"rule with type = '{type(site.module).__name__}' and skip = true before {rule}, for all of its kind"
        )
    if site.kind == "experts" and (rule.bias or rule.output):
        raise ConversionError(
            f"{module_name}: bias and output of experts and routers cannot be quantized; take them out of {rule}"
        )
    if not is_convertible(site.module):
        raise ConversionError(
            f"the forward of {module_name} was replaced by other code, which would bypass the quantization: convert "
            f"the model first, or leave {module_name} out of {rule}"
        )
    return site


def _serving_attention(model: nn.Module, name: str, rule: Rule, structure: Structure) -> Site:
    module = model.get_submodule(name)
    if not writes_cache(module):
        raise ConversionError(
            f"{name} is a {type(module).__name__}, whose forward hands no K and V to a {CACHE_ARGUMENTS[0]}: it is not "
            f"an attention that {', '.join(rule.formats)} can be quantized in; change {rule}"
        )
    if rule.rope and not takes_argument(module, ROPE_ARGUMENT):
        raise ConversionError(
            f"{name} is a {type(module).__name__}, whose forward takes no {ROPE_ARGUMENT}: it has no rope to quantize; "
            f"take that role out of {rule}"
        )
    return sites.attention_site(name, module, structure)


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
    return replace(found, tied_to=next(others, None)) if "weight" in found.roles else found


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
