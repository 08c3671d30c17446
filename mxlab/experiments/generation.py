"""Text that a model generates under a recipe: how fast, and in how much memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import TextStreamer

from mxlab.errors import SpecError
from mxlab.model import footprint
from mxlab.model.apply import Storage, apply
from mxlab.recipe import Recipe
from mxlab.sources import devices, models


@dataclass(frozen=True)
class Generation:
    """What a model wrote, greedily, and what that took.

    Attributes:
        recipe: name of the recipe.
        text: without the prompt.
        tokens: its tokens.
        prompt_tokens: of the prompt.
        first_token_s: seconds to the first token: the prompt is read, and much is done for the first time.
        tokens_per_second: of those after the first; None where there are none.
        weight_bytes: of the model's parameters and buffers.
        cache_bytes: of keys and values, at the end.
        resident_bytes: of the process at the end, or allocated on the GPU.
    """

    recipe: str
    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    first_token_s: float
    tokens_per_second: float | None
    weight_bytes: int
    cache_bytes: int
    resident_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Generator:
    """Has one model generate behind one prompt, under one recipe after the other.

    Attributes:
        model: a hub name, a folder, or ``smollm2``.
        prompt: the text to go on from.
        count: tokens at most; the model may end earlier.
        dtype: what it computes in.
        device: where.
        storage: how quantized weights, and the cache, are kept; see :func:`mxlab.apply`.

    Raises:
        SpecError: no prompt, or no tokens.
    """

    model: str
    prompt: str
    count: int = 64
    dtype: str = devices.AUTO
    device: str = "auto"
    storage: Storage = "packed"

    def __post_init__(self) -> None:
        if not self.prompt:
            raise SpecError("the prompt is empty: give the text that the model is to go on from")
        if self.count < 1:
            raise SpecError(f"tokens is {self.count}: it must be 1 or more")

    def generate(self, recipe: Recipe, show: Callable[[str], None]) -> Generation:
        """Load and convert the model, and generate; ``show`` gets the text piece by piece, as it is written.

        Raises:
            SpecError: more tokens than the model has positions for.
            SourceError, ConversionError: as :func:`mxlab.sources.models.load_model` and :func:`mxlab.apply`.
        """
        devices.release_memory()  # of the model before
        devices.return_freed_memory()
        loaded = models.load_model(self.model, self.dtype, self.device)
        apply(loaded.model, recipe, self.storage)
        inputs = loaded.tokenizer(self.prompt, return_tensors="pt").to(loaded.model.device)
        length = inputs["input_ids"].shape[1]
        positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and length + self.count > positions:
            raise SpecError(
                f"the prompt has {length} tokens, and {self.count} more are asked for: {self.model} has positions for "
                f"{positions}; give a shorter prompt{f', or --tokens {positions - length}' * (positions > length)}"
            )
        return _written(recipe.name, loaded, inputs, self.count, show)


def _written(
    recipe: str, loaded: models.LoadedModel, inputs: Any, count: int, show: Callable[[str], None]
) -> Generation:
    streamer = _Streamer(loaded.tokenizer, show)
    with torch.inference_mode():
        out = loaded.model.generate(
            **inputs,
            max_new_tokens=count,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=0,  # of one row nothing is padded
            streamer=streamer,
            return_dict_in_generate=True,
        )
    length = inputs["input_ids"].shape[1]
    tokens = tuple(out.sequences[0, length:].tolist())
    start, first, *_, last = (*streamer.times, streamer.times[-1])
    on_gpu = loaded.model.device.type == "cuda"
    return Generation(
        recipe,
        "".join(streamer.pieces),
        tokens,
        length,
        first - start,
        (len(tokens) - 1) / (last - first) if len(tokens) > 1 else None,
        footprint.model_bytes(loaded.model),
        footprint.cache_bytes(out.past_key_values),
        torch.cuda.memory_allocated(loaded.model.device) if on_gpu else devices.resident_memory(),
    )


class _Streamer(TextStreamer):
    """Notes when a token came, and hands on what is text already."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show
        self.times: list[float] = []  # of the prompt, and of each token
        self.pieces: list[str] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        self._show(text)


def agreement(found: Sequence[Generation]) -> int:
    """Return how many tokens all begin with."""
    same = 0
    for tokens in zip(*(one.tokens for one in found), strict=False):
        if len(set(tokens)) > 1:
            break
        same += 1
    return same
