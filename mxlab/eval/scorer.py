"""Score one model under many recipes on the same tokens: the only place that copies, converts, seeds and scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from mxlab.errors import SpecError
from mxlab.eval.metrics import TokenScores
from mxlab.eval.windows import Predict, Window, score_windows
from mxlab.model.apply import Storage, apply
from mxlab.model.conversion import Conversion
from mxlab.recipe import Recipe

_SEED = 0  # dither draws the same noise under every recipe


@dataclass(frozen=True)
class Score:
    """What one recipe gave: the scores of all tokens, what was converted, and the seconds in the forward passes."""

    tokens: TokenScores
    conversion: Conversion
    forward_seconds: float


class Scorer:
    """Scores a model under one recipe after the other, on the same windows of the same text.

    Args:
        lend_model: gives an unquantized model that may be changed: a copy, or one that is loaded anew.
        ids: (tokens,), the whole text.
        windows: what :func:`mxlab.eval.windows.sliding_windows` gave.
        batch_size: windows that go through the model at once.
        reference: logits of the unquantized model, to compare with; None for no comparison.
        bos: a token to put before each window, which is not scored; None for none.
        storage: how quantized weights are kept; see :func:`mxlab.apply`.
    """

    def __init__(
        self,
        lend_model: Callable[[], Any],
        ids: Tensor,
        windows: Sequence[Window],
        batch_size: int,
        reference: Predict | None = None,
        bos: int | None = None,
        storage: Storage = "grid",
    ) -> None:
        self._lend_model, self._ids, self._windows = lend_model, ids, windows
        self._storage: Storage = storage
        self._batch_size, self._reference, self._bos = batch_size, reference, bos

    def score(self, recipe: Recipe, on_conversion: Callable[[Conversion], Any] | None = None) -> Score:
        """Convert a model as ``recipe`` says, and score every token.

        Args:
            recipe: what to quantize.
            on_conversion: called with the conversion before the first forward pass, such as to observe operands.

        Raises:
            ConversionError: the recipe does not fit the model.
            MetricError: the logits are not numbers.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            model = self._lend_model()
            conversion = apply(model, recipe, self._storage)
            if on_conversion is not None:
                on_conversion(conversion)
            predict = Predictor(model, self._bos)
            return Score(self._score(predict), conversion, predict.seconds)

    def score_reference(self) -> TokenScores:
        """Score the unquantized model against itself. Raises MetricError where its logits are not numbers."""
        assert self._reference is not None
        return self._score(self._reference)

    def _score(self, predict: Predict) -> TokenScores:
        return score_windows(predict, self._ids, self._windows, self._batch_size, self._reference)


class Predictor:
    """Computes a model's logits [windows, tokens, vocabulary], and counts the seconds that takes.

    Where ``bos`` is given, the model sees that token before each window.
    """

    def __init__(self, model: Any, bos: int | None = None) -> None:
        self._model, self._bos = model, bos
        self.seconds = 0.0

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Return the logits of token ids [windows, tokens]."""
        start = time.perf_counter()
        seen = ids if self._bos is None else torch.nn.functional.pad(ids, (1, 0), value=self._bos)
        logits = self._model(input_ids=seen.to(self._model.device), use_cache=False).logits[:, -ids.shape[1] :]
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        self.seconds += time.perf_counter() - start
        return logits


def remember(predict: Predict) -> Predict:
    """Return ``predict`` computed once for each batch, as long as a quarter of free main memory holds the logits."""
    kept: dict[bytes, Tensor] = {}
    room = psutil.virtual_memory().available // 4

    def remembering(ids: Tensor) -> Tensor:
        key = ids.cpu().numpy().tobytes()
        if key in kept:
            return kept[key]
        logits = predict(ids)
        if sum(x.nbytes for x in kept.values()) + logits.nbytes < room:
            kept[key] = logits
        return logits

    return remembering


def check_context(model: Any, window: int) -> None:
    """Raise SpecError where a window of that many tokens is longer than the model's context."""
    context = getattr(model.config, "max_position_embeddings", None) or window
    if window > context:
        raise SpecError(f"window is {window} tokens, and the model's context {context}: give a shorter window")
