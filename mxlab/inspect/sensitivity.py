"""What each role, decoder layer and projection of a recipe costs: passes with it alone, and with all but it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mxlab.errors import MetricError
from mxlab.eval.metrics import Loss, kl_divergence, token_nll
from mxlab.inspect.parts import GROUPS, Cut, cut
from mxlab.model.apply import apply
from mxlab.recipe import Recipe


class Track(Protocol):
    """Passes the elements of a sequence on, one by one."""

    def __call__(self, sequence: Sequence[Any], *, description: str) -> Iterable[Any]: ...  # noqa: D102


def untracked(sequence: Sequence[Any], *, description: str) -> Iterable[Any]:
    """Shows nothing."""
    return sequence


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its standard error, tokens taken as independent."""

    value: float
    stderr: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """The mean of N values."""
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
    def of(cls, scores: _Tokens | None, base: _Tokens | None) -> Cost | None:
        """What ``scores`` cost beyond ``base``; None where one of the models gave no numbers."""
        if scores is None or base is None:
            return None
        return cls(Estimate.of(scores.nll - base.nll), Estimate.of(scores.kl - base.kl))


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
        """The parts of one kind, which make up the whole recipe."""
        return [part for part in self.parts if part.group == group]


def sensitivity(model: nn.Module, recipe: Recipe, rows: Tensor, track: Track = untracked) -> Sensitivity:
    """Score ``model`` under every part of ``recipe``, each time on a fresh copy; the model stays as it is.

    The cost of a part alone, summed over the parts of a group, need not be the cost of the whole: errors interact.

    Args:
        model: unquantized.
        recipe: what to take apart.
        rows: (windows, tokens) of token ids; each token but a window's first is predicted.
        track: wraps the list of passes, to show how far it is (such as rich's ``Progress.track``).

    Raises:
        ConversionError: the recipe does not fit the model.
        MetricError: the logits of the unquantized model are not numbers.
    """
    scorer = _Scorer(model, rows)
    whole, cuts = cut(model, recipe)
    wanted = {r.hash: r for r in (whole, *(r for c in cuts for r in (c.alone, c.without)))}
    scores = {key: scorer.score(r) for key, r in track(list(wanted.items()), description="sensitivity")}
    plain, full = scorer.unquantized, scores[whole.hash]

    def part(c: Cut) -> Part:
        alone, without = scores[c.alone.hash], scores[c.without.hash]
        return Part(c.group, c.name, Cost.of(alone, plain), Cost.of(full, without))

    def interaction(group: str) -> Cost | None:
        return Cost.of(full, _together([scores[c.alone.hash] for c in cuts if c.group == group], plain))

    loss = Loss.of(plain.nll)
    interactions = {group: interaction(group) for group in GROUPS}
    return Sensitivity(loss.cross_entropy, loss.tokens, Cost.of(full, plain), tuple(map(part, cuts)), interactions)


@dataclass(frozen=True)
class _Tokens:
    """The negative log-likelihood of each token, and the divergence of its prediction from the unquantized model's."""

    nll: Tensor
    kl: Tensor


def _together(alone: Sequence[_Tokens | None], plain: _Tokens) -> _Tokens | None:
    """What the scores would be if the parts' costs, each alone, added up."""
    parts = [scores for scores in alone if scores is not None]
    if len(parts) < len(alone):
        return None
    return _Tokens(plain.nll + sum(p.nll - plain.nll for p in parts), plain.kl + sum(p.kl - plain.kl for p in parts))


class _Scorer:
    """The scores of one model under many recipes, token by token, beside its unquantized logits."""

    def __init__(self, model: nn.Module, rows: Tensor) -> None:
        self._model, self._rows = model, rows.to(next(model.parameters()).device)
        self._reference = list(self._logits(model))
        self.unquantized = self._compared(self._reference)

    def score(self, recipe: Recipe) -> _Tokens | None:
        """The scores under ``recipe``; None where the logits are not numbers."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # dither draws the same noise for every part
            quantized = copy.deepcopy(self._model)
            apply(quantized, recipe)
            try:
                return self._compared(self._logits(quantized))
            except MetricError:
                return None

    @torch.no_grad()
    def _logits(self, model: Any) -> Iterator[Tensor]:
        """(tokens, vocabulary) of each row, one at a time."""
        for row in self._rows:
            yield model(input_ids=row[None], use_cache=False).logits[0]

    def _compared(self, logits: Iterable[Tensor]) -> _Tokens:
        """The scores in float64: differences of them are small."""
        nll, kl = [], []
        for x, row, base in zip(logits, self._rows, self._reference, strict=True):
            nll.append(token_nll(x[:-1], row[1:]))
            kl.append(kl_divergence(base[:-1], x[:-1]))
        return _Tokens(torch.cat(nll).double(), torch.cat(kl).double())
