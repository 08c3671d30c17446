"""Make what is measured on: models, token ids, and tensors of activations."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxlab.bench.workload import LAMBADA, RANDOM
from mxlab.compat.recipes import load_any_recipe
from mxlab.errors import SourceError
from mxlab.model.apply import Storage, apply
from mxlab.recipe import Recipe
from mxlab.sources import models
from mxlab.sources import tasks as data
from mxlab.sources.texts import PASSAGES_FILE

PACKED = "packed"  # a contender: exact numerics, with packed weights
_RANDOM_LENGTH = 128


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, and its tokenizer; None if the weights are random."""

    model: Any
    tokenizer: Any | None


def load(name: str, dtype: str, device: str) -> Subject:
    """Return a model of :data:`mxlab.bench.workload.RANDOM`, or one that :func:`mxlab.sources.models.load_model` knows.

    Raises:
        SourceError: no such model.
    """
    if name in RANDOM:
        return Subject(_random_model(RANDOM[name], getattr(torch, dtype), torch.device(device)), None)
    loaded = models.load_model(name, dtype, device)
    return Subject(loaded.model, loaded.tokenizer)


def tokens(subject: Subject, batch: int, length: int | None, data_dir: Path | None) -> tuple[Tensor, str]:
    """Return token ids (batch, tokens), and what they are: rows of text, padded on the right as lm-eval pads them.

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


def text(subject: Subject, length: int, data_dir: Path | None) -> tuple[Tensor, str]:
    """Return that many token ids, (1, length), and what they are: rows one after the other, again where too few.

    Raises:
        SourceError: as :func:`tokens`.
    """
    rows, data = tokens(subject, 16, None, data_dir)
    ids = rows.flatten()
    return ids.repeat(-(-length // len(ids)))[None, :length], data


@torch.no_grad()
def read(model: Any, ids: Tensor) -> Any:
    """Return the cache of a model that has read token ids (1, tokens)."""
    return model(ids, use_cache=True, logits_to_keep=1).past_key_values


def texts(data_dir: Path | None, count: int) -> list[str]:
    """Return the first rows of lambada_openai in ``data_dir``, or of the embedded passages.

    Raises:
        SourceError: a file that is missing, cannot be read, or has fewer rows.
    """
    file = PASSAGES_FILE if data_dir is None else data_dir / data.LOCAL[LAMBADA].file
    try:
        with file.open(encoding="utf-8") as lines:
            found = [json.loads(line)["text"] for line, _ in zip(filter(str.strip, lines), range(count), strict=False)]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise SourceError(f'cannot read {file}: {e!r}; it must hold lines of {{"text": ...}}') from None
    if len(found) < count:
        raise SourceError(f"{file} has {len(found)} rows, and the batch {count}: choose a smaller one (--batch)")
    return found


def variant(name: str, numerics: str) -> Recipe:
    """Return the recipe under these numerics.

    Raises:
        SpecError: no such recipe.
    """
    return replace(load_any_recipe(name), numerics=numerics)


def converted(model: Any, recipe: Recipe, storage: Storage = "grid") -> Any:
    """Return a quantized copy of ``model``, which is not changed."""
    return apply(copy.deepcopy(model), recipe, storage).model


def _random_model(shape: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype)
    return model.eval()


_TOKENS = (4, 512)
_LAYER = 15  # of 30
RANDOM_NUMBERS = "normal random numbers"


class Values:
    """Tensors of any shape: recorded activations where ``is_real`` and some have that width, else random numbers."""

    def __init__(self, is_real: bool) -> None:
        self._recorded = _record() if is_real else {}

    def tensor(self, shape: tuple[int, ...], dtype: str, device: torch.device) -> tuple[Tensor, str]:
        """Return a tensor, and what its numbers are."""
        kind = getattr(torch, dtype)
        name, found = self._recorded.get(shape[-1], ("", None))
        if found is not None and len(shape) == 2 and shape[0] <= len(found):
            return found[: shape[0]].to(device, kind, copy=True), name
        generator = torch.Generator(device).manual_seed(0)
        return torch.randn(shape, generator=generator, dtype=kind, device=device), RANDOM_NUMBERS


def _record() -> dict[int, tuple[str, Tensor]]:
    """Return, by width, the inputs of q_proj and down_proj in the middle of SmolLM2, a row a token of the passages."""
    try:
        loaded = models.load_model(models.EMBEDDED, "float32", "cpu")
    except SourceError:
        return {}  # not installed: the results say what the numbers are
    layer = loaded.model.model.layers[_LAYER]
    found: dict[int, tuple[str, Tensor]] = {}
    _remember(found, layer.self_attn.q_proj, "input of SmolLM2's q_proj")
    _remember(found, layer.mlp.down_proj, "input of SmolLM2's down_proj")
    ids = loaded.tokenizer("\n".join(texts(None, 100)), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loaded.model.model(ids[0, : _TOKENS[0] * _TOKENS[1]].view(_TOKENS))
    return found


def _remember(found: dict[int, tuple[str, Tensor]], linear: Any, name: str) -> None:
    def hook(_: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, 1)
        found[x.shape[-1]] = name, x.clone()

    linear.register_forward_pre_hook(hook)
