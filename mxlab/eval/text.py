"""Evaluate a model on a text: perplexity over windows of it, and its divergence from the unquantized model."""

from __future__ import annotations

import copy
import datetime
import json
import logging
import time
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mxlab.checks import check_bool, check_int
from mxlab.errors import RunError, SpecError
from mxlab.eval.metrics import TOP_K, TokenScores
from mxlab.eval.request import EvaluationRequest, LoadModel, Outcome, check_name, check_rules_acted
from mxlab.eval.scorer import Predictor, Scorer, check_context
from mxlab.eval.windows import sliding_windows
from mxlab.model.observe import count_scale_clamps
from mxlab.model.saved import conversion_of
from mxlab.sources import devices, models, texts
from mxlab.sources.texts import CorpusText

logger = logging.getLogger("mxlab")


@dataclass(frozen=True)
class TextRequest(EvaluationRequest):
    """Which text to score, and how.

    Attributes:
        text: a name or a path, as :func:`mxlab.sources.texts.load_text` takes it.
        window: tokens of a window.
        stride: tokens from one window to the next; None for disjoint windows.
        windows: the first so many windows; None for the whole text.
        compare: whether to run the unquantized model as well, for KL divergence and top-1 agreement.
        reference: the model to compare with, where that is not ``model`` before the recipe: for a model that was saved
            quantized, the one it was made from.
        bos: whether the model sees its token for the beginning of a text before each window; that is not scored.

    Raises:
        SpecError, FormatError: a value out of range.
    """

    batch_size: int = 4
    text: str = "wikitext2"
    window: int = 512
    stride: int | None = None
    windows: int | None = None
    compare: bool = False
    reference: str | None = None
    bos: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("text", self.text)
        check_int("window", self.window, 2, None, "a whole number of tokens, 2 or more")
        if self.stride is not None:
            check_int(
                "stride", self.stride, 1, self.window, f"a whole number of tokens up to {self.window}, the window"
            )
        if self.windows is not None:
            check_int("windows", self.windows, 1, None, "a whole number, 1 or more")
        check_bool("compare", self.compare)
        if self.reference is not None:
            check_name("reference", self.reference)
            object.__setattr__(self, "compare", True)
        check_bool("bos", self.bos)

    @property
    def sources(self) -> tuple[Hashable, ...]:
        """The model and the data it needs."""
        return self.model, self.reference, self.text, self.data_dir

    def key(self) -> dict[str, Any]:
        """Return what tells it from others; raises SourceError where the text is missing."""
        name = texts.label(self.text)
        return {
            **super().key(),
            "text": name,
            "data": {name: texts.digest(self.text, self.data_dir)},
            "window": self.window,
            "stride": self.stride or self.window,
            "windows": self.windows,
            "compare": self.compare,
            # Runs of before these options are still found.
            **({"bos": True} if self.bos else {}),
            **({"reference": models.identity(self.reference)} if self.reference else {}),
        }

    def evaluate(self, folder: Path, load: LoadModel = models.load_model) -> Outcome:
        """Score the text; see :func:`evaluate_text`."""
        return evaluate_text(self, folder, load)


def evaluate_text(request: TextRequest, folder: Path, load: LoadModel = models.load_model) -> Outcome:
    """Score a text; the metrics go to ``folder`` as ``metrics_<time>.json``, in lm-eval's layout.

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
    loaded = request.load(load)
    bos = _bos(request, loaded.tokenizer)
    check_context(loaded.model, request.window + request.bos)
    ids = texts.encode(loaded.tokenizer, text)
    windows = sliding_windows(len(ids), request.window, request.stride, request.windows)
    reference = Predictor(load_reference(request, loaded.model, load), bos) if request.compare else None
    clamps: dict[str, Counter[str]] = {}
    scorer = Scorer(lambda: loaded.model, ids, windows, request.batch_size, reference, bos, request.storage)
    score = scorer.score(request.recipe, lambda conversion: clamps.update(count_scale_clamps(conversion)))
    check_rules_acted(score.conversion)
    results = {text.name: _results(score.tokens)}
    every_window = sliding_windows(len(ids), request.window, request.stride)
    record = {
        "results": results,
        "config": _config(request, text, loaded.model),
        "n-samples": {text.name: {"original": len(every_window), "effective": len(windows)}},
        "model_name": request.model,
        "total_evaluation_time_seconds": time.perf_counter() - start,
    }
    return Outcome(_write(folder, record), results, score.conversion, score.forward_seconds, clamps)


def _bos(request: TextRequest, tokenizer: Any) -> int | None:
    """Return the token to put before each window; warn where the model is used to one and gets none."""
    bos = tokenizer.bos_token_id
    if request.bos:
        if bos is None:
            raise SpecError(f"the tokenizer of {request.model} has no token for a text's beginning: leave --bos out")
        return bos
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        logger.warning(
            "%s is used to %s at the beginning of a text, and the windows have none: the perplexity may be far too "
            "high; put it there with --bos",
            request.model,
            tokenizer.bos_token,
        )
    return None


def load_reference(request: TextRequest, model: Any, load: LoadModel) -> Any:
    """Return the unquantized model to compare ``model`` with.

    Raises:
        SpecError: there is none, or what is named is quantized itself, or has another vocabulary.
        RunError: memory does not hold both.
    """
    if request.reference is None and (carried := conversion_of(model)) is not None:
        raise SpecError(
            f"{request.model} is quantized already, under recipe {carried.recipe.name}: there is no unquantized model "
            "to compare with; leave the comparison out, or name the model it was made from (--reference)"
        )
    if not devices.has_room_for_copy(model, share=1):
        raise RunError(
            "memory does not hold the unquantized model beside the quantized one: leave the comparison out, or choose "
            "another device"
        )
    if request.reference is None:
        return copy.deepcopy(model)
    reference = replace(request, model=request.reference).load(load).model
    if (carried := conversion_of(reference)) is not None:
        raise SpecError(
            f"the reference {request.reference} is quantized itself, under recipe {carried.recipe.name}: name an "
            "unquantized model"
        )
    if reference.config.vocab_size != model.config.vocab_size:
        raise SpecError(
            f"the reference {request.reference} has {reference.config.vocab_size} tokens, {request.model} has "
            f"{model.config.vocab_size}: their predictions do not compare"
        )
    return reference


def _results(scores: TokenScores) -> dict[str, Any]:
    return {**{f"{name},none": value for name, value in scores.means().items()}, "tokens": scores.loss.tokens}


def _config(request: TextRequest, text: CorpusText, model: Any) -> dict[str, Any]:
    return {
        "model_args": {"pretrained": request.model},
        "model_dtype": str(model.dtype),
        "batch_size": request.batch_size,
        "device": str(model.device),
        "text": {"name": text.name, "sha256": text.sha256, "origin": text.origin, "characters": len(text.text)},
        "window": request.window,
        "stride": request.stride or request.window,
        "windows": request.windows,
        "top_k": TOP_K,
        "compare": request.compare,
        **({"reference": request.reference} if request.reference else {}),
        "bos": request.bos,
    }


def _write(folder: Path, record: dict[str, Any]) -> Path:
    file = folder / f"metrics_{datetime.datetime.now().isoformat().replace(':', '-')}.json"
    file.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return file
