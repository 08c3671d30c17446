"""Choose the transform of every layer, and the scale rules of what it multiplies by its weight.

By what they leave of the layer's output first, then by what the model predicts.

First every candidate is tried on each group of layers that share an input, by itself: which leaves the smallest error
in what they compute. Then kinds of layers are taken one after the other (those with the same name in every decoder
layer): each candidate for all of a kind, and the best of each layer, are compared by the KL divergence of the model's
next tokens, everything being rounded to nearest. In the end the scale rules of activations, of K and of V are compared
in the same way, kind by kind, as which is best depends on the transform. The size that suits one model does not suit
another, and a rotation can be worse than none (PTQ with MXFP4: Egiazarian et al., "Bridging the Gap Between Promise and
Performance for Microscaling FP4 Quantization", 2025).
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mxlab.errors import ConversionError, FormatError
from mxlab.formats import MXFormat
from mxlab.model.apply import freeze, linear_operands, prepare, prepare_to_observe
from mxlab.model.observe import observe_inputs
from mxlab.model.plan import QuantizedSite, make_plan
from mxlab.model.transforms import check_fit
from mxlab.progress import Steps
from mxlab.ptq import wush
from mxlab.ptq.divergence import logits_of, mean_divergence
from mxlab.ptq.sites import by_outputs, layer_at, round_to_nearest, weight_in_basis
from mxlab.ptq.streams import forward, layers_by_input
from mxlab.recipe import Recipe
from mxlab.recipe.algorithms import Search
from mxlab.recipe.rule import KV_ROLES, Rule
from mxlab.recipe.transform import Transform, Wush

_ROWS = 512  # of an input, by which candidates are tried on a layer
_FINALISTS = 2  # candidates for all layers of a kind that are compared in the model, beside the best of each layer

# By the site's name: what its rules have in place of what the recipe gives, a transform, and by role a scale rule.
Assignment = dict[str, dict[str, Any]]
# What sites of a kind may have in common: by the name of each candidate, what it changes.
Contest = dict[str, Assignment]

logger = logging.getLogger("mxlab")


def searched(original: Any, recipe: Recipe, options: Search, ids: Tensor) -> Recipe:
    """Return the recipe with a rule for each layer, and in it the transform and the scale rules that serve it best.

    Args:
        original: the unquantized model, which is left alone.
        recipe: what is quantized.
        options: the candidates.
        ids: token ids [windows, tokens] of the calibration text.

    Raises:
        ConversionError: the recipe does not fit the model, or none of the candidates fits a layer.
    """
    plan = make_plan(original, recipe)
    spelled = plan.spelled_out()
    groups = _groups(original, spelled, options, ids)
    kinds = _kinds(groups)
    contests = [
        *_linear_contests(kinds),
        *_attention_contests(plan.sites, options),
        *_rule_contests(plan.sites, kinds, options),
    ]
    start: Assignment = {name: {"transform": group.best} for group in groups for name in group.names}
    trial = _Trial(original, spelled, ids[: max(1, options.tokens // ids.shape[1])], groups)
    return with_changes(spelled, trial.winners(start, contests))


def with_changes(recipe: Recipe, assignment: Assignment) -> Recipe:
    """Return a recipe whose rules name one site each, with what is assigned to these."""
    rules = (_changed(r, assignment[r.name]) if r.name in assignment else r for r in recipe.rules)
    return replace(recipe, rules=tuple(rules))


def _changed(rule: Rule, changes: Mapping[str, Any]) -> Rule:
    """Return a rule with another transform, and other scale rules in its own formats of the roles."""
    formats = {role: _under(getattr(rule, role), value) for role, value in changes.items() if role != "transform"}
    return replace(rule, **{**changes, **formats})


def _under(fmt: Any, scale_rule: str) -> Any:
    """Return a format with another scale rule, or as it is where it does not know that."""
    if isinstance(fmt, MXFormat):
        with suppress(FormatError):
            return replace(fmt, scale_rule=scale_rule)
    return fmt


@dataclass(frozen=True)
class _Group:
    """Layers that share an input.

    Attributes:
        place: what the layers of other decoder layers have in common with these.
        names: of the layers.
        losses: by candidate, the squared error of what they compute, relative to its square.
        matrices: of the transforms that were fitted.
    """

    place: tuple[int, ...]
    names: tuple[str, ...]
    losses: dict[Transform | None, float]
    matrices: dict[Transform, Tensor]

    @property
    def best(self) -> Transform | None:
        """The candidate that loses least."""
        return min(self.losses, key=lambda candidate: self.losses[candidate])


def _kinds(groups: Sequence[_Group]) -> list[list[_Group]]:
    """Return the groups that have the same place in their decoder layers together."""
    kinds: defaultdict[tuple[int, ...], list[_Group]] = defaultdict(list)
    for group in groups:
        kinds[group.place].append(group)
    return list(kinds.values())


def _linear_contests(kinds: Sequence[Sequence[_Group]]) -> list[Contest]:
    """Return for each kind of layers the transforms that lose least over all of them."""
    contests = []
    for alike in kinds:
        totals = {c: sum(g.losses[c] for g in alike) for c in alike[0].losses if all(c in g.losses for g in alike)}
        finalists = sorted(totals, key=lambda c: totals[c])[:_FINALISTS]
        contests.append(_transforms([name for group in alike for name in group.names], finalists))
    return contests


def _attention_contests(sites: Sequence[QuantizedSite], options: Search) -> list[Contest]:
    """Return what all attentions can have in common, which is told apart by the model alone."""
    attentions = [site for site in sites if site.kind == "attention"]
    fitting: dict[tuple[object, ...], Transform | None] = {}
    for candidate in options.candidates:
        if all(_fits(site, candidate) for site in attentions):
            fitting.setdefault(_sizes(attentions, candidate), candidate)
    return [_transforms([site.name for site in attentions], [*fitting.values()])] if attentions else []


def _sizes(sites: Sequence[QuantizedSite], candidate: Transform | None) -> tuple[object, ...]:
    """Return what tells a transform from others at these sites: the whole width may be a size as well."""
    sizes = {candidate.size or site.shape[-1] if candidate is not None and site.shape else 0 for site in sites}
    return type(candidate), *sorted(sizes)


def _transforms(names: Sequence[str], candidates: Sequence[Transform | None]) -> Contest:
    return {f"{c or 'none'} for {names[0]}": {n: {"transform": c} for n in names} for c in candidates}


def _rule_contests(sites: Sequence[QuantizedSite], kinds: Sequence[Sequence[_Group]], options: Search) -> list[Contest]:
    """Return for the activations of each kind of layers, and for K and V of all attentions, the scale rules."""
    by_name = {site.name: site for site in sites}
    alike = [("activation", [by_name[name] for group in kind for name in group.names]) for kind in kinds]
    alike += [(role, [site for site in sites if role in site.formats]) for role in KV_ROLES]
    return [
        {f"{rule} for {role} of {of[0].name}": _with_rule(of, role, rule) for rule in options.rules}
        for role, of in alike
        if of
    ]


def _with_rule(sites: Sequence[QuantizedSite], role: str, rule: str) -> Assignment:
    """Return another scale rule of a role, for the sites that have a format which it changes."""
    formats = {site.name: site.formats.get(role) for site in sites}
    return {name: {role: rule} for name, fmt in formats.items() if _under(fmt, rule) != fmt}


def _fits(site: QuantizedSite, candidate: Transform | None) -> bool:
    try:
        if candidate is not None:
            check_fit(site, candidate)
    except ConversionError:
        return False
    return True


class _Trial:
    """Compares assignments by how far the rounded model's predictions are from the unquantized model's."""

    def __init__(self, original: Any, recipe: Recipe, ids: Tensor, groups: Sequence[_Group]) -> None:
        self._original, self._recipe = original, replace(recipe, algorithms={})
        self._matrices = {name: group.matrices for group in groups for name in group.names}
        self._windows = ids.to(original.device).split(1)
        with torch.no_grad():
            self._wanted = [logits_of(original, window) for window in self._windows]

    def winners(self, start: Assignment, contests: Sequence[Contest]) -> Assignment:
        """Try each candidate in place of what is assigned, one kind of layers after the other; keep what is nearer."""
        with Steps("comparing transforms", 1 + sum(map(len, contests))) as steps:
            present, recipe = start, with_changes(self._recipe, start)
            least = self._divergence(recipe)
            logger.info("transforms that serve each layer best: KL divergence %.4f", least)
            steps.advance()
            for name, changes in (candidate for contest in contests for candidate in contest.items()):
                tried = present | {of: {**present.get(of, {}), **change} for of, change in changes.items()}
                if (changed := with_changes(self._recipe, tried)) != recipe:
                    found = self._divergence(changed)
                    logger.info("%s and all like it: KL divergence %.4f", name, found)
                    if found < least:
                        present, recipe, least = tried, changed, found
                steps.advance()
        return present

    @torch.no_grad()
    def _divergence(self, recipe: Recipe) -> float:
        model = copy.deepcopy(self._original)
        conversion = prepare(model, recipe)
        for site in conversion.sites:
            if isinstance(site.transform, Wush):
                with_matrices(site, self._matrices[site.name][site.transform])
        freeze(conversion.sites)
        found = (logits_of(model, window) for window in self._windows)
        return sum(map(mean_divergence, self._wanted, found)) / len(self._windows)


def with_matrices(site: QuantizedSite, matrices: Tensor) -> None:
    """Give a linear layer the matrices of its transform, and round its weight to nearest in that basis."""
    room = layer_at(site).input_transform
    assert room is not None
    room.copy_(matrices)
    round_to_nearest(site)


def _groups(original: Any, recipe: Recipe, options: Search, ids: Tensor) -> list[_Group]:
    """Try every candidate on the layers of the unquantized model, one group of layers after the other."""
    observed = prepare_to_observe(copy.deepcopy(original), replace(recipe, algorithms={}))
    firsts = {group[0].name: group for group in layers_by_input(observed, ids)}
    counts: defaultdict[int | None, int] = defaultdict(int)  # of the groups met in each decoder layer
    groups: list[_Group] = []

    def meet(site: QuantizedSite, x: Tensor) -> None:
        if site.name in firsts:
            place = counts[site.layer], x.shape[-1], *((-1,) if site.layer is None else ())
            counts[site.layer] += 1
            groups.append(_tried(firsts[site.name], place, x.flatten(0, -2)[:_ROWS].float(), options, recipe))

    with observe_inputs(observed, meet), torch.no_grad():
        forward(observed.model, ids[: -(-_ROWS // ids.shape[1])])
    return groups


def _tried(
    group: Sequence[QuantizedSite], place: tuple[int, ...], x: Tensor, options: Search, recipe: Recipe
) -> _Group:
    """Try every candidate that fits on the layers that read ``x`` [rows, in]."""
    losses: dict[Transform | None, float] = {}
    matrices: dict[Transform, Tensor] = {}
    for candidate in options.candidates:
        if all(_fits(site, candidate) for site in group):
            if isinstance(candidate, Wush):
                matrices[candidate] = wush.fit([by_outputs(site) for site in group], x, candidate.size)
            losses[candidate] = sum(_loss(site, x, candidate, matrices, recipe) for site in group)
    if not losses:
        raise ConversionError(f"{group[0].name}: none of the transforms {', '.join(options.transforms)} fits it")
    return _Group(place, tuple(site.name for site in group), losses, matrices)


def _loss(
    site: QuantizedSite, x: Tensor, candidate: Transform | None, matrices: Mapping[Transform, Tensor], recipe: Recipe
) -> float:
    """Return the squared error of a layer's product under a candidate, relative to the product's square."""
    operands, weight = linear_operands(recipe, site.formats, candidate), by_outputs(site)
    of_x = matrices.get(candidate) if candidate is not None else None
    quantized = operands.on_transformed_weight(weight_in_basis(weight, operands, of_x))
    product = operands.on_activation(x, matrices=of_x) @ quantized.t()
    wanted = x @ weight.t()
    return float((product - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30))
