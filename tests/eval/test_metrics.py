"""Metrics against plain formulas on whole float64 logits."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mxlab.errors import MetricError
from mxlab.eval import metrics
from mxlab.eval.metrics import Loss, next_token_loss

VOCABULARY = 53


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(*shape, VOCABULARY, generator=generator)).to(dtype)


def ids(*shape: int) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(9))


@pytest.fixture(params=[1, 3 * VOCABULARY, 1 << 20])
def _chunks(request, monkeypatch):
    """One row at a time, three, all of them."""
    monkeypatch.setattr(metrics, "_CHUNK_ELEMENTS", request.param)


# ---- cross-entropy and perplexity


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy(dtype):
    x, tokens = logits(3, 8, dtype=dtype), ids(3, 8)
    loss = next_token_loss(x, tokens)
    expected = F.cross_entropy(x[:, :-1].double().flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.tokens == 3 * 7
    assert loss.cross_entropy == pytest.approx(expected.item(), rel=1e-6)
    assert loss.perplexity == pytest.approx(expected.exp().item(), rel=1e-5)


def test_an_unshifted_loss_is_another_one():
    x, tokens = logits(2, 9), ids(2, 9)
    unshifted = F.cross_entropy(x.flatten(0, 1), tokens.flatten()).item()
    assert abs(next_token_loss(x, tokens).cross_entropy - unshifted) > 0.01
    # What a model says of its own favourites is no perplexity either.
    own = F.cross_entropy(x.flatten(0, 1), x.argmax(-1).flatten()).item()
    assert next_token_loss(x, tokens).cross_entropy > own + 1


def test_a_model_that_knows_the_next_token():
    tokens = ids(2, 9)
    sure = 50.0 * F.one_hot(tokens.roll(-1, dims=1), VOCABULARY).float()
    assert next_token_loss(sure, tokens).perplexity == pytest.approx(1, abs=1e-6)
    assert next_token_loss(torch.zeros(2, 9, VOCABULARY), tokens).perplexity == pytest.approx(VOCABULARY, rel=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    long, short = ids(9), ids(4)
    x_long, x_short = logits(9, seed=1), logits(4, seed=2)
    padding = slice(0, 5) if side == "left" else slice(4, 9)
    text = slice(5, 9) if side == "left" else slice(0, 4)
    tokens, x, mask = torch.zeros(2, 9, dtype=torch.long), logits(2, 9, seed=3), torch.ones(2, 9, dtype=torch.long)
    tokens[0], x[0] = long, x_long
    tokens[1, text], x[1, text], mask[1, padding] = short, x_short, 0
    together = next_token_loss(x, tokens, mask)
    alone = next_token_loss(x_long[None], long[None]) + next_token_loss(x_short[None], short[None])
    assert together.tokens == alone.tokens == 8 + 3
    assert together.nll == pytest.approx(alone.nll, rel=1e-6)
    assert next_token_loss(x, tokens).tokens == 16


def test_a_row_of_padding_counts_nothing():
    tokens, x = ids(2, 6), logits(2, 6)
    mask = torch.tensor([[1] * 6, [0] * 6])
    assert next_token_loss(x, tokens, mask) == next_token_loss(x[:1], tokens[:1])


@pytest.mark.parametrize("mask", [torch.zeros(2, 4), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]])])
def test_nothing_to_score(mask):
    with pytest.raises(MetricError, match=r"no token of a batch of shape \(2, 4\) can be scored"):
        next_token_loss(logits(2, 4), ids(2, 4), mask)
    with pytest.raises(MetricError, match=r"shape \(2, 1\)"):
        next_token_loss(logits(2, 1), ids(2, 1))


def test_losses_add_up_by_tokens_and_not_by_batches():
    total = Loss(10.0, 2) + Loss(2.0, 4)
    assert (total.nll, total.tokens, total.cross_entropy) == (12.0, 6, 2.0)
    assert total.perplexity == pytest.approx(math.exp(2))


def test_a_perplexity_beyond_floats():
    assert Loss(1e6, 1).perplexity == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("measure", ["nll", "kl", "kl of the reference", "entropy"])
def test_logits_that_are_no_numbers(bad, measure):
    x, fine = logits(7), logits(7, seed=1)
    x[2, 5] = x[4, 0] = bad
    measures = {
        "nll": lambda: metrics.token_nll(x, ids(7)),
        "kl": lambda: metrics.kl_divergence(fine, x),
        "kl of the reference": lambda: metrics.kl_divergence(x, fine),
        "entropy": lambda: metrics.topk_entropy(x),
    }
    with pytest.raises(MetricError, match=r"the logits of 2 positions of 7 are NaN, infinite"):
        measures[measure]()


def test_a_masked_vocabulary():
    x, tokens = logits(5), ids(5)
    tokens[tokens == 3] = 4
    x[:, 3] = -math.inf
    without = torch.cat([x[:, :3], x[:, 4:]], -1)
    assert torch.allclose(metrics.token_nll(x, tokens), metrics.token_nll(without, tokens - (tokens > 3).long()))
    assert torch.allclose(metrics.topk_entropy(x, VOCABULARY), metrics.topk_entropy(without, VOCABULARY))
    y = logits(5, seed=1)
    assert torch.isinf(metrics.kl_divergence(y, x)).all()
    assert torch.isfinite(metrics.kl_divergence(x, y)).all()
    assert torch.equal(metrics.kl_divergence(x, x), torch.zeros(5))


# ---- against another model


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_divergence(dtype):
    p_logits, q_logits = logits(11, dtype=dtype), logits(11, seed=1, dtype=dtype)
    p, q = p_logits.double().softmax(-1), q_logits.double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1).float()
    found = metrics.kl_divergence(p_logits, q_logits)
    assert (found.shape, found.dtype) == ((11,), torch.float32)
    assert torch.allclose(found, expected, rtol=1e-5)
    assert not torch.allclose(found, metrics.kl_divergence(q_logits, p_logits), rtol=0.01)
    assert torch.allclose(metrics.kl_divergence(p_logits, p_logits + 1), torch.zeros(11), atol=0.05)


@pytest.mark.usefixtures("_chunks")
def test_top1_agreement():
    x = logits(40)
    y = torch.where(torch.arange(40)[:, None] < 30, x + 0.1, -x)
    assert metrics.top1_agreement(x, y).tolist() == [True] * 30 + [False] * 10


# ---- entropy and noise


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("k", [1, 4, VOCABULARY, 1000])
def test_topk_entropy(k):
    x = logits(9)
    p = x.double().softmax(-1).sort(-1, descending=True).values[:, :k]
    assert torch.allclose(metrics.topk_entropy(x, k), -(p * p.log()).sum(-1).float(), rtol=1e-5, atol=1e-5)


def test_all_measures_in_one_pass():
    x, y, tokens = logits(13), logits(13, seed=1), ids(13)
    scores = metrics.score_tokens(x, tokens, y)
    assert torch.equal(scores.nll, metrics.token_nll(x, tokens))
    assert torch.equal(scores.entropy, metrics.topk_entropy(x, metrics.TOP_K))
    assert scores.kl is not None
    assert torch.equal(scores.kl, metrics.kl_divergence(y, x))
    assert scores.agrees is not None
    assert torch.equal(scores.agrees, metrics.top1_agreement(y, x))
    assert metrics.score_tokens(x, tokens).kl is None


@pytest.mark.parametrize(("noise", "decibels"), [(1.0, 0), (0.1, 20), (0.001, 60)])
def test_sqnr(noise, decibels):
    x = torch.tensor([3.0, -4.0, 12.0])
    assert metrics.sqnr_db(x, x * (1 - noise)) == pytest.approx(decibels, abs=1e-3)
    assert metrics.sqnr_db(x.bfloat16(), x.bfloat16()) == math.inf
    assert metrics.sqnr_db(torch.zeros(3), x) == -math.inf
