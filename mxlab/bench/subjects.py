"""What is timed: models, real or of random weights, and tokens for them."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxlab import shipped
from mxlab.bench.settings import LAMBADA
from mxlab.bench.shapes import RANDOM
from mxlab.compat.recipes import load_any_recipe
from mxlab.errors import SourceError
from mxlab.model.apply import apply
from mxlab.recipe import Recipe
from mxlab.sources import models
from mxlab.sources import tasks as data

_RANDOM_LENGTH = 128


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, and its tokenizer; None if the weights are random."""

    model: Any
    tokenizer: Any | None


def load(name: str, dtype: str, device: str) -> Subject:
    """A model of :data:`mxlab.bench.shapes.RANDOM`, or one that :func:`mxlab.sources.models.load_model` knows.

    Raises:
        SourceError: no such model.
    """
    if name in RANDOM:
        return Subject(_random_model(RANDOM[name], getattr(torch, dtype), torch.device(device)), None)
    loaded = models.load_model(name, dtype, device)
    return Subject(loaded.model, loaded.tokenizer)


def tokens(subject: Subject, batch: int, length: int | None, data_dir: Path | None) -> tuple[Tensor, str]:
    """Token numbers (batch, tokens), and what they are: rows of text, padded on the right as lm-eval pads them.

    Raises:
        SourceError: fewer rows than ``batch``.
    """
    if subject.tokenizer is None:
        shape = batch, length or _RANDOM_LENGTH
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(subject.model.config.vocab_size, shape, generator=generator)
        return ids.to(subject.model.device), "random tokens"
    name = data.PASSAGES if data_dir is None else LAMBADA
    rows = [subject.tokenizer(text)["input_ids"][:length] for text in texts(data_dir, batch)]
    ids = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True)
    return ids.to(subject.model.device), name


def texts(data_dir: Path | None, count: int) -> list[str]:
    """The first rows of lambada_openai in ``data_dir``, or of the embedded passages.

    Raises:
        SourceError: a file that is missing, cannot be read, or has fewer rows.
    """
    file = shipped.PACKAGE / "passages.jsonl" if data_dir is None else data_dir / data.LOCAL[LAMBADA].file
    try:
        with file.open(encoding="utf-8") as lines:
            found = [json.loads(line)["text"] for line, _ in zip(filter(str.strip, lines), range(count), strict=False)]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise SourceError(f'cannot read {file}: {e!r}; it must hold lines of {{"text": ...}}') from None
    if len(found) < count:
        raise SourceError(f"{file} has {len(found)} rows, and the batch {count}: choose a smaller one (--batch)")
    return found


def variant(name: str, numerics: str) -> Recipe:
    """The recipe under these numerics.

    Raises:
        SpecError: no such recipe.
    """
    return replace(load_any_recipe(name), numerics=numerics)


def converted(model: Any, recipe: Recipe) -> Any:
    """A quantized copy of ``model``, which stays as it is."""
    return apply(copy.deepcopy(model), recipe).model


def _random_model(shape: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype)
    return model.eval()
