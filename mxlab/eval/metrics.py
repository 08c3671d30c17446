"""How well a model predicts, from its logits: cross-entropy, perplexity, divergence from another model, entropy.

Logarithms are natural and results float32. Logits of any floating dtype are taken to float32 a few rows at a time: a
whole [tokens, vocabulary] matrix of float32 never exists. Logits of minus infinity (a masked vocabulary) are fine;
NaN and plus infinity are errors, never counted as a score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from mxlab.errors import MetricError

TOP_K = 10  # tokens of topk_entropy, unless told otherwise
_CHUNK_ELEMENTS = 1 << 20  # float32 elements at a time: 4 MiB, which a processor's cache holds


@dataclass(frozen=True)
class Loss:
    """A sum of negative log-likelihoods (nats) over that many tokens; losses of two batches add up."""

    nll: float
    tokens: int

    @classmethod
    def of(cls, nll: Tensor) -> Loss:
        """Return the loss of those negative log-likelihoods, added up in float64."""
        return cls(nll.double().sum().item(), nll.numel())

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.nll + other.nll, self.tokens + other.tokens)

    @property
    def cross_entropy(self) -> float:
        """Nats per token, every token weighing the same."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(cross-entropy); infinite where that leaves the range of a float."""
        return perplexity(self.cross_entropy)


@dataclass(frozen=True)
class TokenScores:
    """Measures of N predictions, each (N,): float32 in nats, and bool. The last two need a reference model."""

    nll: Tensor
    entropy: Tensor
    kl: Tensor | None = None
    agrees: Tensor | None = None

    @property
    def loss(self) -> Loss:
        """The loss of all predictions."""
        return Loss.of(self.nll)

    def means(self) -> dict[str, float]:
        """Return the measures over all predictions by name: perplexity, the rest as means, in float64."""
        loss = self.loss
        columns = {"topk_entropy": self.entropy, "kl_divergence": self.kl, "top1_agreement": self.agrees}
        means = {name: x.double().mean().item() for name, x in columns.items() if x is not None}
        return {"perplexity": loss.perplexity, "cross_entropy": loss.cross_entropy, **means}

    @classmethod
    def joined(cls, parts: Sequence[TokenScores]) -> TokenScores:
        """Return the scores of all parts, one after the other."""

        def column(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else torch.cat(values)

        return cls(*(column(field.name) for field in fields(cls)))


def perplexity(cross_entropy: float) -> float:
    """Return exp(``cross_entropy`` in nats per token); infinite where that leaves the range of a float."""
    try:
        return math.exp(cross_entropy)
    except OverflowError:
        return math.inf


def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor | None = None) -> Loss:
    """Return the loss of predicting each token from those before it.

    The logits at position t are scored against the token at t + 1. Where a ``mask`` is given, a prediction counts only
    if both tokens are real, so that padding on either side is left out; a row that is all padding counts nothing.

    Args:
        logits: (batch, length, vocabulary).
        ids: (batch, length), the model's input.
        mask: (batch, length), the attention mask: 1 for a token, 0 for padding; None for no padding.

    Raises:
        MetricError: nothing is left to score, or the logits are not numbers.
    """
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    scored = real[:, :-1] & real[:, 1:]  # (B, T - 1)
    if not scored.any():
        raise MetricError(f"no token of a batch of shape {tuple(ids.shape)} can be scored: no two real ones in a row")
    rows = zip(logits[:, :-1], ids[:, 1:], scored, strict=True)
    return Loss.of(torch.cat([token_nll(row[which], targets[which]) for row, targets, which in rows]))


def score_tokens(logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> TokenScores:
    """Compute every measure of each row in one pass over the logits: (N, vocabulary), (N,) -> N of each.

    Raises:
        MetricError: a row of logits holds NaN or plus infinity.
    """
    scores = TokenScores(*_by_chunks(_nll_and_entropy, logits, targets.to(logits.device)))
    if reference is None:
        return scores
    return replace(scores, kl=kl_divergence(reference, logits), agrees=top1_agreement(reference, logits))


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log p(target) of each row in nats: logits (N, vocabulary), targets (N,) -> (N,).

    Raises:
        MetricError: a row of logits holds NaN or plus infinity.
    """
    return _by_chunks(lambda x, t: [_nll(x, t, _log_normalizer(x))], logits, targets.to(logits.device))[0]


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Return KL(reference || model) of each row's distributions in nats: two (N, vocabulary) -> (N,).

    Raises:
        MetricError: a row of logits holds NaN or plus infinity.
    """
    return _by_chunks(lambda x, r: [_kl(r, x)], logits, reference.to(logits.device))[0]


def top1_agreement(reference: Tensor, logits: Tensor) -> Tensor:
    """Return whether both rank the same token first, row by row: two (N, vocabulary) -> (N,) of bool."""
    return _by_chunks(lambda x, r: [r.argmax(-1) == x.argmax(-1)], logits, reference.to(logits.device))[0]


def topk_entropy(logits: Tensor, k: int = TOP_K) -> Tensor:
    """-sum of p log p over the ``k`` likeliest tokens of each row in nats: (N, vocabulary) -> (N,).

    The probabilities are those of the whole vocabulary, not scaled to sum to one over the k: a lower bound of the
    entropy, which it reaches at k = vocabulary.

    Raises:
        MetricError: a row of logits holds NaN or plus infinity.
    """
    return _by_chunks(lambda x: [_topk_entropy(x, _log_normalizer(x), k)], logits)[0]


def sqnr_db(reference: Tensor, quantized: Tensor) -> float:
    """Signal to quantization noise in decibels, 10 log10(sum x^2 / sum (x - q)^2); infinite where nothing differs."""
    x = reference.double()
    signal, noise = (y.square().sum().item() for y in (x, x - quantized.double()))
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _by_chunks(measure: Callable[..., list[Tensor]], logits: Tensor, *others: Tensor) -> list[Tensor]:
    """``measure`` of a few rows at a time, floats as float32: (N, vocabulary), (N, ...) -> (N,) for each result."""
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    chunks = zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True)
    results = (measure(*(x.float() if x.is_floating_point() else x for x in chunk)) for chunk in chunks)
    return [torch.cat(parts) for parts in zip(*results, strict=True)]


def _nll_and_entropy(logits: Tensor, targets: Tensor) -> list[Tensor]:
    log_z = _log_normalizer(logits)
    return [_nll(logits, targets, log_z), _topk_entropy(logits, log_z, TOP_K)]


def _nll(logits: Tensor, targets: Tensor, log_z: Tensor) -> Tensor:
    return log_z - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _topk_entropy(logits: Tensor, log_z: Tensor, k: int) -> Tensor:
    log_p = logits.topk(min(k, logits.shape[-1])).values - log_z.unsqueeze(-1)
    return torch.special.entr(log_p.exp()).sum(-1)


def _kl(reference: Tensor, logits: Tensor) -> Tensor:
    log_p, log_q = (x - _log_normalizer(x).unsqueeze(-1) for x in (reference, logits))
    # A token of probability zero adds nothing: zero times an infinite difference is NaN, which nansum leaves out.
    return (log_p.exp() * (log_p - log_q)).nansum(-1)


def _log_normalizer(logits: Tensor) -> Tensor:
    """Return log sum exp of each row, which tells whether the row holds probabilities at all."""
    log_z = logits.logsumexp(-1)
    if bad := int((~log_z.isfinite()).sum()):
        raise MetricError(
            f"the logits of {bad} positions of {log_z.numel()} are NaN, infinite, or all minus infinity: the model "
            "gives no probabilities there"
        )
    return log_z
