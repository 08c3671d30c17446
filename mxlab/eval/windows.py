"""Windows over a long text, and a model's scores on them: perplexity with a sliding window.

The standard definition (Hugging Face, "Perplexity of fixed-length models"): the text is tokenized once, as a whole. A
window of ``window`` tokens moves on by ``stride``; in each, the tokens that no earlier window scored are predicted from
all before them in the window. With a stride below the window every token but the first is scored once, with at least
``window - stride`` tokens of context from the second window on. With ``stride == window`` the windows are disjoint, and
the first token of each is scored by none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxlab.checks import check_int
from mxlab.errors import MetricError
from mxlab.eval.metrics import TokenScores, score_tokens
from mxlab.progress import Steps

# (windows, tokens) of token ids -> logits (windows, tokens, vocabulary)
Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Window:
    """The model sees tokens ``start`` to ``stop`` (exclusive) of the text; those from ``first`` on are scored."""

    start: int
    first: int
    stop: int


def sliding_windows(length: int, window: int, stride: int | None = None, limit: int | None = None) -> list[Window]:
    """Return the windows over a text of ``length`` tokens; the last one may be shorter.

    Args:
        length: tokens of the text.
        window: tokens of a window.
        stride: tokens from one window to the next; None for disjoint windows.
        limit: the first so many windows; None for all.

    Raises:
        MetricError: the text is shorter than one window, or holds fewer windows than ``limit``.
        FormatError: a stride that is not between 1 and ``window``.
    """
    if length < window:
        raise MetricError(
            f"the text has {length} tokens, fewer than one window of {window}: give a longer text or a shorter window"
        )
    stride = window if stride is None else stride
    check_int("stride", stride, 1, window, f"a whole number of tokens up to {window}, the window")
    windows = list(_windows(length, window, stride))
    if limit is not None and limit > len(windows):
        raise MetricError(
            f"the text of {length} tokens holds {len(windows)} windows of {window}, fewer than the {limit} asked for: "
            "give a longer text, or ask for fewer"
        )
    return windows[:limit]


def _windows(length: int, window: int, stride: int) -> Iterator[Window]:
    scored = 0
    for start in range(0, length, stride):
        stop = min(start + window, length)
        first = max(scored, start + 1)  # the first token of a window has nothing to be predicted from
        if first < stop:
            yield Window(start, first, stop)
        scored = stop
        if stop == length:
            break


def score_windows(
    predict: Predict, ids: Tensor, windows: Sequence[Window], batch_size: int, reference: Predict | None = None
) -> TokenScores:
    """Score all tokens that ``windows`` score, in their order.

    Args:
        predict: the model's logits.
        ids: (tokens,), the whole text.
        windows: what :func:`sliding_windows` gave.
        batch_size: windows that go through the model at once; one of another length goes alone, so nothing is padded.
        reference: the logits of another model, to compare with.

    Raises:
        MetricError: the logits are not numbers.
    """
    parts: list[TokenScores] = []
    with Steps("windows", len(windows)) as steps:
        for batch in _batches(windows, batch_size):
            parts += _score_batch(predict, ids, batch, reference)
            steps.advance(len(batch))
    return TokenScores.joined(parts)


def _score_batch(
    predict: Predict, ids: Tensor, batch: Sequence[Window], reference: Predict | None
) -> list[TokenScores]:
    inputs = torch.stack([ids[w.start : w.stop] for w in batch])
    logits = predict(inputs)
    expected = reference(inputs) if reference else None
    scores = []
    for i, w in enumerate(batch):
        rows = slice(w.first - w.start - 1, w.stop - w.start - 1)
        wanted = None if expected is None else expected[i, rows]
        scores.append(score_tokens(logits[i, rows], ids[w.first : w.stop], wanted))
    return scores


def _batches(windows: Sequence[Window], size: int) -> Iterator[list[Window]]:
    batch: list[Window] = []
    for w in windows:
        if batch and (len(batch) == size or w.stop - w.start != batch[0].stop - batch[0].start):
            yield batch
            batch = []
        batch.append(w)
    yield batch
