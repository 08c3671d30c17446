"""Windows over a text, against a naive loop over its tokens."""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mxlab.errors import FormatError, MetricError
from mxlab.eval.windows import score_windows, sliding_windows

from support.llama import tiny


@cache
def model(seed: int = 0):
    return tiny(seed=seed)


def predict(ids: Tensor, seed: int = 0) -> Tensor:
    with torch.no_grad():
        return model(seed)(input_ids=ids).logits


def text(length: int) -> Tensor:
    return torch.randint(1, 97, (length,), generator=torch.Generator().manual_seed(2))


@given(st.integers(2, 60), st.integers(2, 20), st.data())
def test_what_is_scored(length, window, data):
    window = min(window, length)
    stride = data.draw(st.integers(1, window))
    windows = sliding_windows(length, window, stride)
    scored = [token for w in windows for token in range(w.first, w.stop)]
    assert scored == sorted(set(scored))
    starts = set() if stride < window else set(range(0, length, window))
    assert set(range(1, length)) - set(scored) == starts - {0}
    for i, w in enumerate(windows):
        assert w.start == i * stride
        assert w.stop - w.start <= window
        assert w.start < w.first < w.stop
        if i and stride < window:
            assert w.first - w.start >= window - stride
    assert all(w.stop - w.start == window for w in windows[:-1])


def test_disjoint_windows_are_the_default():
    assert sliding_windows(10, 4) == sliding_windows(10, 4, 4)
    assert [(w.start, w.first, w.stop) for w in sliding_windows(10, 4)] == [(0, 1, 4), (4, 5, 8), (8, 9, 10)]
    assert [w.start for w in sliding_windows(9, 4)] == [0, 4]  # one token alone cannot be predicted
    assert sliding_windows(10, 4, limit=2) == sliding_windows(10, 4)[:2]


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 8), (16, 5), (16, 1), (40, 40), (7, 3)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_against_a_naive_loop(window, stride, batch_size):
    ids = text(40)
    expected, end = [], 0
    for start in range(0, 40, stride):
        for token in range(max(end, start + 1), min(start + window, 40)):
            logits = predict(ids[None, start:token])[0, -1]  # nothing of what comes after
            expected.append(-logits.double().log_softmax(-1)[ids[token]].item())
        end = min(start + window, 40)
        if end == 40:
            break
    scores = score_windows(predict, ids, sliding_windows(40, window, stride), batch_size)
    assert scores.nll.tolist() == pytest.approx(expected, rel=1e-4)
    assert scores.kl is scores.agrees is None


def test_a_batch_of_sliding_windows_mixes_offsets():
    ids = text(50)
    windows = sliding_windows(50, 16, 4)
    one, many = (score_windows(predict, ids, windows, n) for n in (1, 8))
    assert torch.allclose(one.nll, many.nll, rtol=1e-4)


def test_more_context_is_scored_otherwise():
    ids = text(48)
    disjoint, sliding = (score_windows(predict, ids, sliding_windows(48, 16, stride), 4) for stride in (16, 4))
    assert (disjoint.loss.tokens, sliding.loss.tokens) == (45, 47)
    assert disjoint.loss.cross_entropy != sliding.loss.cross_entropy


def test_beside_another_model():
    ids, windows = text(40), sliding_windows(40, 16)
    same = score_windows(predict, ids, windows, 2, predict)
    other = score_windows(predict, ids, windows, 2, lambda x: predict(x, seed=1))
    assert same.kl is not None
    assert same.agrees is not None
    assert (same.kl.abs().max(), same.agrees.all()) == (0, True)
    assert other.kl is not None
    assert other.agrees is not None
    assert len(other.kl) == len(other.nll) == 37
    assert (other.kl > 0).all()
    assert not other.agrees.all()


def test_a_text_that_is_too_short():
    with pytest.raises(MetricError, match=r"has 5 tokens, fewer than one window of 8: give a longer text or a shorter"):
        sliding_windows(5, 8)
    with pytest.raises(MetricError, match=r"of 20 tokens holds 3 windows of 8, fewer than the 4 asked for"):
        sliding_windows(20, 8, limit=4)


@pytest.mark.parametrize("stride", [0, -1, 9, 2.0])
def test_a_bad_stride(stride):
    with pytest.raises(FormatError, match=f"stride is {stride}"):
        sliding_windows(20, 8, stride)
