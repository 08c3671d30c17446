"""What each role, decoder layer and projection of a recipe costs: passes with it alone, and with all but it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mxlab.errors import MetricError
from mxlab.eval.metrics import TokenScores
from mxlab.eval.scorer import Predictor, Scorer, remember
from mxlab.eval.windows import sliding_windows
from mxlab.inspect.parts import GROUPS, Cut, cut
from mxlab.progress import track
from mxlab.recipe import Recipe


@dataclass(frozen=True)
class _Losses:
    """Negative log-likelihood and KL divergence of each token (N,), in float64: differences of them are small."""

    nll: Tensor
    kl: Tensor

    @classmethod
    def of(cls, scores: TokenScores | _Losses) -> _Losses:
        """Return the losses of scores that were compared with a reference."""
        if isinstance(scores, _Losses):
            return scores
        assert scores.kl is not None
        return cls(scores.nll.double(), scores.kl.double())


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its standard error, tokens taken as independent."""

    value: float
    stderr: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """Return the mean of N values."""
        spread = values.std().item() if len(values) > 1 else 0.0
        return cls(values.mean().item(), spread / math.sqrt(len(values)))


@dataclass(frozen=True)
class Cost:
    """What one set of roundings costs beyond another, in nats per token, compared token by token.

    ``cross_entropy`` may be negative: roundings can help by chance. ``kl`` is the divergence from the unquantized
    model, which is far less noisy; it is negative only as a difference of two.
    """

    cross_entropy: Estimate
    kl: Estimate

    @classmethod
    def of(cls, scores: TokenScores | _Losses | None, base: TokenScores | _Losses | None) -> Cost | None:
        """Return what ``scores`` cost beyond ``base``; None where one of the models gave no numbers."""
        if scores is None or base is None:
            return None
        ours, theirs = (_Losses.of(x) for x in (scores, base))
        return cls(Estimate.of(ours.nll - theirs.nll), Estimate.of(ours.kl - theirs.kl))


@dataclass(frozen=True)
class Part:
    """A part of a recipe.

    Attributes:
        group: one of :data:`mxlab.inspect.parts.GROUPS`.
        name: ``weights``, ``activations``, ``KV`` or another role; a layer's number, or ``outside``; a projection.
        alone: what the part costs on its own, beyond the unquantized model (leave-one-in).
        saved: what the whole recipe costs beyond the recipe without the part (leave-one-out).
    """

    group: str
    name: str
    alone: Cost | None
    saved: Cost | None


@dataclass(frozen=True)
class Sensitivity:
    """What a recipe costs, and what its parts do. A cost is None where the logits were not numbers.

    Attributes:
        cross_entropy: of the unquantized model, in nats per token.
        tokens: how many were predicted.
        whole: what the recipe costs.
        interactions: by group, what it costs beyond the sum of what the group's parts cost alone.
    """

    cross_entropy: float
    tokens: int
    whole: Cost | None
    parts: tuple[Part, ...]
    interactions: Mapping[str, Cost | None]

    def of(self, group: str) -> list[Part]:
        """Return the parts of one kind, which make up the whole recipe."""
        return [part for part in self.parts if part.group == group]


def sensitivity(model: nn.Module, recipe: Recipe, rows: Tensor) -> Sensitivity:
    """Score ``model`` under every part of ``recipe``, each time on a fresh copy; the model is not changed.

    The cost of a part alone, summed over the parts of a group, need not be the cost of the whole: errors interact.

    Args:
        model: unquantized.
        recipe: what to take apart.
        rows: (windows, tokens) of token ids; each token but a window's first is predicted.

    Raises:
        ConversionError: the recipe does not fit the model.
        MetricError: the logits of the unquantized model are not numbers.
    """
    ids, windows = rows.flatten(), sliding_windows(rows.numel(), rows.shape[1])
    scorer = Scorer(lambda: copy.deepcopy(model), ids, windows, 1, remember(Predictor(model)))
    plain = scorer.score_reference()
    whole, cuts = cut(model, recipe)
    wanted = {r.hash: r for r in (whole, *(r for c in cuts for r in (c.alone, c.without)))}
    scores = {key: _score(scorer, r) for key, r in track(list(wanted.items()), "sensitivity")}
    full = scores[whole.hash]

    def part(c: Cut) -> Part:
        alone, without = scores[c.alone.hash], scores[c.without.hash]
        return Part(c.group, c.name, Cost.of(alone, plain), Cost.of(full, without))

    def interaction(group: str) -> Cost | None:
        return Cost.of(full, _sum_of_costs([scores[c.alone.hash] for c in cuts if c.group == group], plain))

    loss = plain.loss
    interactions = {group: interaction(group) for group in GROUPS}
    return Sensitivity(loss.cross_entropy, loss.tokens, Cost.of(full, plain), tuple(map(part, cuts)), interactions)


def _score(scorer: Scorer, recipe: Recipe) -> TokenScores | None:
    """Return the scores under ``recipe``; None where the logits are not numbers."""
    try:
        return scorer.score(recipe).tokens
    except MetricError:
        return None


def _sum_of_costs(alone: Sequence[TokenScores | None], plain: TokenScores) -> _Losses | None:
    """Return what the losses would be if the parts' costs, each alone, added up."""
    base, parts = _Losses.of(plain), [_Losses.of(scores) for scores in alone if scores is not None]
    if len(parts) < len(alone):
        return None
    return _Losses(base.nll + sum(p.nll - base.nll for p in parts), base.kl + sum(p.kl - base.kl for p in parts))
