"""One evaluation on a text: perplexity over windows of it, and how far the model is from the unquantized one."""

from __future__ import annotations

import copy
import datetime
import json
import time
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxlab.checks import check_choice, check_int
from mxlab.errors import RunError, SpecError
from mxlab.eval.metrics import TOP_K, TokenScores
from mxlab.eval.request import LoadModel, Outcome
from mxlab.eval.windows import score_windows, sliding_windows
from mxlab.model.apply import apply
from mxlab.model.observe import count_scale_clamps
from mxlab.recipe import Recipe
from mxlab.sources import devices, models, texts
from mxlab.sources.texts import CorpusText


@dataclass(frozen=True)
class TextRequest:
    """Which text to score under which recipe, and how.

    Attributes:
        recipe: what to quantize.
        model: a hub name, a folder, or ``smollm2``.
        text: a name or a path, as :func:`mxlab.sources.texts.load_text` takes it.
        window: tokens of a window.
        stride: tokens from one window to the next; None for disjoint windows.
        windows: the first so many windows; None for the whole text.
        batch_size: windows of a batch.
        dtype: float32, bfloat16 or float16.
        device: auto, cpu, cuda, cuda:0, ...
        data_dir: a folder with the file of the text; None for the hub.
        compare: whether to run the unquantized model beside it, for KL divergence and top-1 agreement.

    Raises:
        SpecError, FormatError: a value out of range.
    """

    recipe: Recipe
    model: str = models.EMBEDDED
    text: str = "wikitext2"
    window: int = 512
    stride: int | None = None
    windows: int | None = None
    batch_size: int = 4
    dtype: str = "bfloat16"
    device: str = "auto"
    data_dir: Path | None = None
    compare: bool = False

    def __post_init__(self) -> None:
        for name in ("model", "device", "text"):
            if not isinstance(value := getattr(self, name), str) or not value:
                raise SpecError(f"{name} is {value!r}: it must be a name")
        check_int("window", self.window, 2, None, "a whole number of tokens, 2 or more")
        if self.stride is not None:
            check_int(
                "stride", self.stride, 1, self.window, f"a whole number of tokens up to {self.window}, the window"
            )
        if self.windows is not None:
            check_int("windows", self.windows, 1, None, "a whole number, 1 or more")
        check_int("batch_size", self.batch_size, 1, None, "a whole number, 1 or more")
        check_choice("dtype", self.dtype, devices.DTYPES)
        if not isinstance(self.compare, bool):
            raise SpecError(f"compare is {self.compare!r}: it must be true or false")

    @property
    def sources(self) -> tuple[Hashable, ...]:
        """The model and the data it needs."""
        return self.model, self.text, self.data_dir

    def key(self) -> dict[str, Any]:
        """What tells it from others; raises SourceError where the text is missing."""
        return {
            "recipe": self.recipe.hash,
            "model": models.identity(self.model),
            "revision": models.revision(self.model),
            "text": texts.label(self.text),
            "data": {texts.label(self.text): texts.digest(self.text, self.data_dir)},
            "window": self.window,
            "stride": self.stride or self.window,
            "windows": self.windows,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "compare": self.compare,
        }

    def evaluate(self, folder: Path, load: LoadModel = models.load_model) -> Outcome:
        """Score the text; see :func:`evaluate`."""
        return evaluate(self, folder, load)


def evaluate(request: TextRequest, folder: Path, load: LoadModel = models.load_model) -> Outcome:
    """Score the text of ``request``; the metrics go to ``folder`` as ``metrics_<time>.json``, in lm-eval's layout.

    ``cross_entropy``, ``kl_divergence`` and ``topk_entropy`` are nats per token, means over all scored tokens;
    ``top1_agreement`` is a share of them. ``n-samples`` counts windows.

    Raises:
        SourceError: the model or the text cannot be had.
        ConversionError: the recipe does not fit the model.
        MetricError: the text is shorter than the windows asked for, or the logits are not numbers.
        SpecError: the window is longer than the model's context.
        RunError: memory does not hold the two models to compare.
    """
    start = time.perf_counter()
    text = texts.load_text(request.text, request.data_dir)
    loaded = load(request.model, request.dtype, request.device)
    check_context(loaded.model, request.window)
    ids = texts.encode(loaded.tokenizer, text)
    windows = sliding_windows(len(ids), request.window, request.stride, request.windows)
    reference = _Predict(_copy(loaded.model)) if request.compare else None
    conversion = apply(loaded.model, request.recipe)
    clamps = count_scale_clamps(conversion)
    predict = _Predict(loaded.model)
    scores = score_windows(predict, ids, windows, request.batch_size, reference)
    results = {text.name: _results(scores)}
    record = {
        "results": results,
        "config": _config(request, text, loaded.model.device),
        "n-samples": {text.name: {"original": _count(ids, request), "effective": len(windows)}},
        "model_name": request.model,
        "total_evaluation_time_seconds": time.perf_counter() - start,
    }
    return Outcome(_write(folder, record), results, conversion, predict.seconds, clamps)


class _Predict:
    """A model's logits, and the seconds they took."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.seconds = 0.0

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        start = time.perf_counter()
        logits = self._model(input_ids=ids.to(self._model.device), use_cache=False).logits
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        self.seconds += time.perf_counter() - start
        return logits


def check_context(model: Any, window: int) -> None:
    """Raise SpecError where a window of so many tokens is longer than the model's context."""
    context = getattr(model.config, "max_position_embeddings", None) or window
    if window > context:
        raise SpecError(f"window is {window} tokens, and the model's context {context}: give a shorter window")


def _copy(model: Any) -> Any:
    if not devices.has_room_for_copy(model, share=1):
        raise RunError(
            "memory does not hold the unquantized model beside the quantized one: leave the comparison out, or choose "
            "another device"
        )
    return copy.deepcopy(model)


def _results(scores: TokenScores) -> dict[str, Any]:
    loss = scores.loss
    measures = {
        "perplexity": loss.perplexity,
        "cross_entropy": loss.cross_entropy,
        "topk_entropy": _mean(scores.entropy),
    }
    if scores.kl is not None and scores.agrees is not None:
        measures |= {"kl_divergence": _mean(scores.kl), "top1_agreement": _mean(scores.agrees)}
    return {**{f"{name},none": value for name, value in measures.items()}, "tokens": loss.tokens}


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


def _count(ids: Tensor, request: TextRequest) -> int:
    return len(sliding_windows(len(ids), request.window, request.stride))


def _config(request: TextRequest, text: CorpusText, device: torch.device) -> dict[str, Any]:
    return {
        "model_args": {"pretrained": request.model},
        "model_dtype": f"torch.{request.dtype}",
        "batch_size": request.batch_size,
        "device": str(device),
        "text": {"name": text.name, "sha256": text.sha256, "origin": text.origin, "characters": len(text.text)},
        "window": request.window,
        "stride": request.stride or request.window,
        "windows": request.windows,
        "top_k": TOP_K,
        "compare": request.compare,
    }


def _write(folder: Path, record: dict[str, Any]) -> Path:
    file = folder / f"metrics_{datetime.datetime.now().isoformat().replace(':', '-')}.json"
    file.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return file
