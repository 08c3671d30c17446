"""Which rule of a recipe each site of a model comes under, and the errors where a rule does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mxlab.errors import ConversionError, SpecError
from mxlab.formats import NumberFormat
from mxlab.model import sites
from mxlab.model.nn.attention import ROPE_ARGUMENT
from mxlab.model.nn.linear import is_convertible
from mxlab.model.sites import Kind, Site
from mxlab.numerics import DTYPES
from mxlab.recipe import Recipe
from mxlab.recipe.rule import PHASES, Phase, Rule


@dataclass(frozen=True)
class Match:
    """A site that rules chose, and the formats of its roles in each phase of generation.

    ``tied_to`` names the module that the weight is shared with, where there is one.
    """

    site: Site
    by_phase: Mapping[Phase, Mapping[str, NumberFormat]]
    tied_to: str | None = None

    @property
    def name(self) -> str:
        """The site's qualified name."""
        return self.site.name

    @property
    def module(self) -> nn.Module:
        """What is replaced or hooked."""
        return self.site.module

    @property
    def kind(self) -> Kind:
        """``linear``, ``experts`` or ``attention``."""
        return self.site.kind

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, or of an attention (K/V heads, head_dim)."""
        return self.site.shape

    @property
    def weight(self) -> Tensor:
        """The weight of a linear layer or of experts."""
        return getattr(self.module, self.site.weight)

    @property
    def weight_formats(self) -> set[NumberFormat]:
        """What the weight is quantized to: one format, or one for each phase."""
        return {formats["weight"] for formats in self.by_phase.values() if "weight" in formats}

    @property
    def is_in_place(self) -> bool:
        """Whether the weight itself is put on the grid, rather than a copy of it for each format."""
        return (
            self.tied_to is None
            and all("weight" in f for f in self.by_phase.values())
            and (len(self.weight_formats) == 1)
        )

    def stored(self) -> list[Tensor]:
        """The parameters that take the bits of a format instead of those of their dtype."""
        return [self.weight] if self.is_in_place else []

    @property
    def bias(self) -> Tensor:
        """The bias of a linear layer that has one."""
        return getattr(self.module, "bias")  # noqa: B009 (its type is not known)

    @property
    def roles(self) -> set[str]:
        """The roles that have a format in some phase."""
        return {role for formats in self.by_phase.values() for role in formats}

    @property
    def formats(self) -> Mapping[str, NumberFormat]:
        """The formats, by role; those of prefill where decode has others."""
        return self.by_phase["prefill"]

    @property
    def all_formats(self) -> dict[str, NumberFormat]:
        """The formats by role; where the phases differ, with the phase before the role: ``decode weight``."""
        of = self.by_phase
        common = {role: fmt for role, fmt in of["prefill"].items() if of["decode"].get(role) == fmt}
        apart = {f"{phase} {r}": f for phase in PHASES for r, f in of[phase].items() if r not in common}
        return {**common, **apart}


def match(model: nn.Module, recipe: Recipe) -> list[Match]:
    """The sites that the rules choose, each under the first rule that matches it in a phase; nothing is changed.

    Raises:
        ConversionError: a rule that matches nothing, or what cannot serve its roles.
    """
    chooser = _Chooser(model, recipe)
    chosen = {name: chooser.choose(name) for name in chooser.names}
    chooser.check_all_used()
    chosen = {name: rules for name, rules in chosen.items() if any(rules.values())}
    _check_biases(recipe, [(chooser.sites[name], rules) for name, rules in chosen.items()])
    matches = [_match(model, chooser.sites[name], rules) for name, rules in chosen.items()]
    _check_tied(matches)
    return matches


def spelled_out(recipe: Recipe, matches: Sequence[Match]) -> Recipe:
    """The recipe with a rule for each of its sites, by name, in place of its own: the same model is quantized alike.

    What is left when some of these rules are taken away, or some of their formats, means what it says: no later rule
    steps in (:mod:`mxlab.recipe.subset`).
    """
    rules = tuple(
        Rule(name=m.name, phase=phase, **formats)  # pyright: ignore[reportArgumentType]
        for m in matches
        for phase, formats in _phases(m)
    )
    return replace(recipe, rules=rules)


def _phases(match: Match) -> list[tuple[Phase | None, Mapping[str, NumberFormat]]]:
    """The formats of each phase that has some; those of both at once, under None, where they are the same."""
    if match.by_phase["prefill"] == match.by_phase["decode"]:
        return [(None, match.formats)]
    return [(phase, formats) for phase, formats in match.by_phase.items() if formats]


class _Chooser:
    """Finds the rules of one site after the other, and remembers which rules were of use."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.sites = {site.name: site for site in sites.find(model)}
        self._model, self._recipe = model, recipe
        self._unused = set(range(len(recipe.rules)))
        count = sites.layer_count(model)
        try:
            self._layers = [rule.layer_numbers(count) for rule in recipe.rules]
        except SpecError as e:
            raise ConversionError(f"recipe {recipe.name}: {e}") from None

    @property
    def names(self) -> list[str]:
        """Of all sites, and of the modules that are none, in the order of the modules."""
        by_module: dict[str, list[str]] = {name: [] for name, _ in self._model.named_modules()}
        for site in self.sites.values():
            by_module[site.module_name].append(site.name)
        return [name for module, found in by_module.items() for name in found or [module]]

    def choose(self, name: str) -> dict[Phase, Rule | None]:
        """The rule of a site in each phase; None where there is none, or one that skips."""
        return {phase: self._first(name, phase) for phase in PHASES}

    def check_all_used(self) -> None:
        if not self._unused:
            return
        recipe, rule = self._recipe, self._recipe.rules[min(self._unused)]
        raise ConversionError(
            f"recipe {recipe.name}: {rule} matches no module of {type(self._model).__name__}"
            f"{' that could be quantized' if rule.skip else ''}, or only such as an "
            f"earlier rule took; its linear layers are named like {_examples(self.sites)}"
        )

    def _first(self, name: str, phase: Phase) -> Rule | None:
        site = self.sites.get(name)
        for i, rule in enumerate(self._recipe.rules):
            if not rule.is_for(phase) or not self._matches(i, rule, name, site):
                continue
            self._unused.discard(i)
            if rule.skip:
                return None
            self.sites[name] = _serving(self._model, name, site, rule)
            return rule
        return None

    def _matches(self, number: int, rule: Rule, name: str, site: Site | None) -> bool:
        layers = self._layers[number]
        if (layers is not None and sites.layer_of(name) not in layers) or (rule.skip and site is None):
            return False
        if site is None:
            return rule.matches(name, type(self._model.get_submodule(name)).__name__)
        kind, part = type(site.module).__name__, site.part if _is_meant(rule, site) else ""
        return rule.matches(name, kind, part) or rule.matches(site.module_name, kind)


def _is_meant(rule: Rule, site: Site) -> bool:
    """Whether a rule that names a part speaks of this kind of site."""
    return rule.skip or rule.is_attention == (site.kind == "attention")


def _serving(model: nn.Module, name: str, site: Site | None, rule: Rule) -> Site:
    """The site, once it is clear that it can serve the roles of the rule that names it."""
    if rule.is_attention:
        return _serving_attention(model, site.module_name if site else name, rule)
    if site is None or site.kind == "attention":
        kind = type(model.get_submodule(name)).__name__
        raise ConversionError(
            f"{name} is a {kind}: only torch.nn.Linear, Conv1D and experts have a weight and an activation to "
            f"quantize; let {rule} match those alone"
        )
    if problem := _problem(site, rule):
        raise ConversionError(problem)
    return site


def _problem(site: Site, rule: Rule) -> str:
    """Why a layer cannot serve a rule that names it, and the remedy; empty where it can."""
    name = site.module_name
    if site.obstacle:
        return (
            f"{name} is a {type(site.module).__name__} ({site.obstacle}), which mxlab cannot convert: put a rule with "
            f"name = '{name}' and skip = true before {rule}"
        )
    if site.kind == "experts" and (rule.bias or rule.output):
        return f"{name}: bias and output of experts and routers cannot be quantized; take them out of {rule}"
    if not is_convertible(site.module):
        return (
            f"the forward of {name} was replaced by other code, which would bypass the quantization: convert the model "
            f"first, or leave {name} out of {rule}"
        )
    return ""


def _check_biases(recipe: Recipe, chosen: list[tuple[Site, Mapping[Phase, Rule | None]]]) -> None:
    """A rule may cover layers with a bias and without: those without have none to quantize. Some must have one."""
    for rule in (r for r in recipe.rules if r.bias and not r.bias_optional):
        if not any(rule in rules.values() and _has_bias(site) for site, rules in chosen):
            raise ConversionError(
                f"no layer that {rule} matches has a bias to quantize: take that role out, or add bias_optional = true"
            )


def _has_bias(site: Site) -> bool:
    return getattr(site.module, "bias", None) is not None


def _formats(site: Site, rule: Rule | None) -> dict[str, NumberFormat]:
    formats = rule.formats if rule else {}
    return {role: fmt for role, fmt in formats.items() if role != "bias" or _has_bias(site)}


def _serving_attention(model: nn.Module, name: str, rule: Rule) -> Site:
    module = model.get_submodule(name)
    if sites.cache_argument(module) is None:
        raise ConversionError(
            f"{name} is a {type(module).__name__}, whose forward takes no {sites.CACHE_ARGUMENTS[0]}: it is not an "
            f"attention that {', '.join(rule.formats)} can be quantized in; change {rule}"
        )
    if rule.rope and not sites.takes(module, ROPE_ARGUMENT):
        raise ConversionError(
            f"{name} is a {type(module).__name__}, whose forward takes no {ROPE_ARGUMENT}: it has no rope to quantize; "
            f"take that role out of {rule}"
        )
    return sites.attention(name, module)


def _match(model: nn.Module, site: Site, rules: Mapping[Phase, Rule | None]) -> Match:
    by_phase: dict[Phase, dict[str, NumberFormat]] = {phase: _formats(site, rule) for phase, rule in rules.items()}
    if site.kind == "attention":
        return Match(site, by_phase)
    weight = getattr(site.module, site.weight)
    if type(weight.data) is not Tensor or weight.dtype not in DTYPES:
        raise ConversionError(
            f"the weight of {site.name} is a {type(weight.data).__name__} of {weight.dtype}: mxlab quantizes "
            "float32, bfloat16 and float16; load the unquantized checkpoint in one of them"
        )
    found = Match(site, by_phase)
    return replace(found, tied_to=next(_sharing(model, site, weight), None)) if "weight" in found.roles else found


def _sharing(model: nn.Module, site: Site, weight: Tensor) -> Iterator[str]:
    """The other modules that hold the same parameter."""
    for name, module in model.named_modules():
        if module is not site.module and any(p is weight for p in module.parameters(recurse=False)):
            yield name


def _check_tied(matches: list[Match]) -> None:
    if experts := [m for m in matches if m.kind == "experts" and m.tied_to]:
        raise ConversionError(f"the weight of {experts[0].name} is shared with {experts[0].tied_to}: untie it")


def check_finite(matches: list[Match]) -> None:
    """Raise ConversionError at the first weight or bias, of those to be quantized, that holds NaN or infinities."""
    for m in matches:
        for role in m.roles.intersection(("weight", "bias")):
            values = (m.weight if role == "weight" else m.bias).detach()
            if values.is_meta or torch.isfinite(values.sum()):
                continue
            if bad := int((~torch.isfinite(values)).sum()):  # the sum may have overflowed
                raise ConversionError(
                    f"the {role} of {m.name} holds {bad} values that are NaN or infinite, which would take their whole "
                    "blocks with them: repair the checkpoint, or skip the layer"
                )


def _examples(found: Mapping[str, Site]) -> str:
    names = [site.name for site in found.values() if site.kind != "attention"]
    return ", ".join(names[:3]) or "(it has none)"
