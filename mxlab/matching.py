"""Which rule of a recipe each site of a model comes under, and the errors where a rule does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mxlab import sites
from mxlab.errors import ConversionError, SpecError
from mxlab.formats import MXFormat
from mxlab.nn.attention import ROPE_ARGUMENT
from mxlab.nn.linear import is_convertible
from mxlab.numerics import DTYPES
from mxlab.recipe import Recipe
from mxlab.rules import PHASES, Phase, Rule
from mxlab.sites import Kind, Site


@dataclass(frozen=True)
class Match:
    """A site that rules chose, and the formats of its roles in each phase of generation.

    ``tied_to`` names the module that the weight is shared with, where there is one.
    """

    site: Site
    by_phase: Mapping[Phase, Mapping[str, MXFormat]]
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
    def weight_formats(self) -> set[MXFormat]:
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
    def formats(self) -> Mapping[str, MXFormat]:
        """The formats, by role; those of prefill where decode has others."""
        return self.by_phase["prefill"]

    @property
    def all_formats(self) -> dict[str, MXFormat]:
        """The formats, by role, of decode with ``decode `` before the role where they are others than in prefill."""
        others = {f"decode {r}": f for r, f in self.by_phase["decode"].items() if self.formats.get(r) != f}
        return {**self.formats, **others}


def match(model: nn.Module, recipe: Recipe) -> list[Match]:
    """The sites that the rules choose, each under the first rule that matches it in a phase; nothing is changed.

    Raises:
        ConversionError: a rule that matches nothing, or what cannot serve its roles.
    """
    found = {site.name: site for site in sites.find(model)}
    names = {**{name: type(module).__name__ for name, module in model.named_modules()}, **dict.fromkeys(found, "")}
    chooser = _Chooser(model, recipe, found)
    chosen = {name: chooser.choose(name, kind) for name, kind in names.items()}
    chooser.check_all_used()
    matches = [_match(model, chooser.sites[n], rules, recipe) for n, rules in chosen.items() if any(rules.values())]
    _check_tied(matches)
    return matches


def spelled_out(recipe: Recipe, matches: Sequence[Match]) -> Recipe:
    """The recipe with a rule for each of its sites, by name, in place of its own: the same model is quantized alike.

    What is left when some of these rules are taken away, or some of their formats, means what it says: no later rule
    steps in (:mod:`mxlab.restrict`).
    """
    rules = tuple(
        Rule(name=m.name, phase=phase, **formats)  # pyright: ignore[reportArgumentType]
        for m in matches
        for phase, formats in _phases(m)
    )
    return replace(recipe, rules=rules)


def _phases(match: Match) -> list[tuple[Phase | None, Mapping[str, MXFormat]]]:
    """The formats of each phase that has some; those of both at once, under None, where they are the same."""
    if match.by_phase["prefill"] == match.by_phase["decode"]:
        return [(None, match.formats)]
    return [(phase, formats) for phase, formats in match.by_phase.items() if formats]


class _Chooser:
    """Finds the rules of one module after the other, and remembers which rules were of use."""

    def __init__(self, model: nn.Module, recipe: Recipe, found: dict[str, Site]) -> None:
        self.sites = dict(found)
        self._model, self._recipe = model, recipe
        self._unused = set(range(len(recipe.rules)))
        count = sites.layer_count(model)
        try:
            self._layers = [rule.layer_numbers(count) for rule in recipe.rules]
        except SpecError as e:
            raise ConversionError(f"recipe {recipe.name}: {e}") from None

    def choose(self, name: str, type: str) -> dict[Phase, Rule | None]:
        """The rule of a module in each phase; None where there is none, or one that skips."""
        return {phase: self._first(name, type, phase) for phase in PHASES}

    def check_all_used(self) -> None:
        if not self._unused:
            return
        recipe, rule = self._recipe, self._recipe.rules[min(self._unused)]
        raise ConversionError(
            f"recipe {recipe.name}: {rule} matches no module of {type(self._model).__name__}, or only such as an "
            f"earlier rule took; its linear layers are named like {_examples(self.sites)}"
        )

    def _first(self, name: str, type: str, phase: Phase) -> Rule | None:
        for i, rule in enumerate(self._recipe.rules):
            layers = self._layers[i]
            if not rule.is_for(phase) or (layers is not None and sites.layer_of(name) not in layers):
                continue
            site = self.sites.get(name)
            if not rule.matches(name, type, site.part if site and _is_meant(rule, site) else ""):
                continue
            self._unused.discard(i)
            if rule.skip:
                return None
            self.sites[name] = _serving(self._model, name, site, rule)
            return rule
        return None


def _is_meant(rule: Rule, site: Site) -> bool:
    """Whether a rule that names a part speaks of this kind of site."""
    return rule.skip or rule.is_attention == (site.kind == "attention")


def _serving(model: nn.Module, name: str, site: Site | None, rule: Rule) -> Site:
    """The site, once it is clear that it can serve the roles of the rule that names it."""
    if rule.is_attention:
        return _serving_attention(model, name, rule)
    if site is None or site.kind == "attention":
        kind = type(model.get_submodule(name)).__name__
        raise ConversionError(
            f"{name} is a {kind}: only torch.nn.Linear, Conv1D and experts have a weight and an activation to "
            f"quantize; let {rule} match those alone"
        )
    if site.kind == "experts" and (rule.bias or rule.output):
        raise ConversionError(f"{name}: bias and output of experts cannot be quantized; take them out of {rule}")
    if site.kind == "linear" and not is_convertible(site.module):
        raise ConversionError(
            f"the forward of {name} was replaced by other code, which would bypass the quantization: convert the model "
            f"first, or leave {name} out of {rule}"
        )
    if site.kind == "linear" and rule.bias and site.module.bias is None:
        raise ConversionError(f"{name} has no bias to quantize: take it out of {rule}")
    return site


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


def _match(model: nn.Module, site: Site, rules: Mapping[Phase, Rule | None], recipe: Recipe) -> Match:
    by_phase: dict[Phase, dict[str, MXFormat]] = {phase: rule.formats if rule else {} for phase, rule in rules.items()}
    if site.kind == "attention":
        return Match(site, by_phase)
    weight = getattr(site.module, site.weight)
    if type(weight.data) is not Tensor or weight.dtype not in DTYPES:
        raise ConversionError(
            f"the weight of {site.name} is a {type(weight.data).__name__} of {weight.dtype}: mxlab quantizes "
            "float32, bfloat16 and float16; load the unquantized checkpoint in one of them"
        )
    tied = next(_sharing(model, site, weight), None) if any("weight" in f for f in by_phase.values()) else None
    return Match(site, by_phase, tied)


def _sharing(model: nn.Module, site: Site, weight: Tensor) -> Iterator[str]:
    """The other modules that hold the same parameter."""
    for name, module in model.named_modules():
        if module is not site.module and any(p is weight for p in module.parameters(recurse=False)):
            yield name


def _check_tied(matches: list[Match]) -> None:
    if experts := [m for m in matches if m.kind == "experts" and m.tied_to]:
        raise ConversionError(f"the weight of {experts[0].name} is shared with {experts[0].tied_to}: untie it")


def check_finite(matches: list[Match]) -> None:
    """Raise ConversionError at the first weight, of those to be quantized, that holds NaN or infinities."""
    for m in matches:
        if m.kind == "attention" or m.weight.is_meta or not any("weight" in f for f in m.by_phase.values()):
            continue
        weight = m.weight.detach()
        if not torch.isfinite(weight.sum()) and (bad := int((~torch.isfinite(weight)).sum())):  # the sum may overflow
            raise ConversionError(
                f"the weight of {m.name} holds {bad} values that are NaN or infinite, which would take their whole "
                "blocks with them: repair the checkpoint, or skip the layer"
            )


def _examples(found: Mapping[str, Site]) -> str:
    names = [site.name for site in found.values() if site.kind != "attention"]
    return ", ".join(names[:3]) or "(it has none)"
