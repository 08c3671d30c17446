"""Find the first rule of a recipe that selects a site, per phase of generation."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator

from torch import nn

from mxlab.errors import ConversionError, SpecError
from mxlab.model import sites
from mxlab.model.nn.attention import ROPE_ARGUMENT
from mxlab.model.nn.linear import is_convertible
from mxlab.model.sites import Site
from mxlab.model.structure import CACHE_ARGUMENTS, Structure, takes_argument, writes_cache
from mxlab.recipe import PHASES, Phase, Recipe, Rule


class RuleMatcher:
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
