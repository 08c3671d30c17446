"""The same weights in llama.cpp: reading a prompt, and tokens behind it.

llama.cpp takes part where ``llama-cpp-python`` is installed. It reads the weights that ``mxlab export --to gguf``
writes, and multiplies them by activations that it rounds to eight bits (Q8_0).
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxlab.bench import subjects
from mxlab.bench.results import BASELINE
from mxlab.bench.timing import Contender
from mxlab.bench.workload import Case, TextWorkload, check_count, check_dtypes, check_recipes, tokens_per_second
from mxlab.compat.recipes import load_any_recipe
from mxlab.hf import gguf_export

NAME = "llama.cpp"


@dataclass(frozen=True, kw_only=True)
class LlamaCppWorkload(TextWorkload):
    """A prompt of ``prompt`` tokens at once, and ``tokens`` one by one: torch, packed weights, and llama.cpp."""

    repeats: int = 7
    prompt: int = 512
    tokens: int = 32
    dtype: str = "float32"
    recipe: str = "ex1"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("prompt", self.prompt)
        check_count("tokens", self.tokens)
        check_dtypes((self.dtype,))
        check_recipes((self.recipe,))

    def __len__(self) -> int:
        """See :meth:`Workload.__len__`."""
        return 2

    def cases(self) -> Iterator[Case]:
        """See :meth:`Workload.cases`."""
        subject = subjects.load(self.model, self.dtype, self.device)
        packed = subjects.converted(subject.model, subjects.variant(self.recipe, "exact"), subjects.PACKED)
        text, data = subjects.text(subject, max(self.prompt, self.tokens), self.data_dir)
        columns = {"model": self.model, "dtype": self.dtype, "recipe": self.recipe, "text": data}
        columns |= {"threads": self.threads, "device": self.device}
        with tempfile.TemporaryDirectory() as folder:
            other = self._other(subject, Path(folder) / "gguf")
            players = {BASELINE: _Torch(subject.model), subjects.PACKED: _Torch(packed)} | other
            for name, count in (("prompt", self.prompt), ("decode", self.tokens)):
                calls = {who: partial(getattr(player, name), text, count) for who, player in players.items()}
                yield Case(
                    f"{count} tokens, {name}",
                    {**columns, "tokens": f"{count}, {'at once' if name == 'prompt' else 'one by one'}"},
                    [Contender(who, call) for who, call in calls.items()],
                    self.effort,
                    partial(tokens_per_second, count),
                )

    def _other(self, subject: subjects.Subject, folder: Path) -> dict[str, Any]:
        if not is_there() or subject.tokenizer is None:
            return {}
        gguf_export.export(self.model, load_any_recipe(self.recipe), self.dtype, folder, weights_only=True)
        room = self.prompt + self.tokens * 2 * (self.repeats + self.warmup + 1)  # a sample may take two calls
        return {NAME: _LlamaCpp(folder / gguf_export.FILE, room, self.threads or torch.get_num_threads())}


def is_there() -> bool:
    """Return whether ``llama-cpp-python`` is installed; nothing is imported."""
    return importlib.util.find_spec("llama_cpp") is not None


class _Torch:
    """A model of transformers; tokens are decoded behind the last prompt."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None

    def prompt(self, text: Tensor, count: int) -> None:
        self._cache = subjects.read(self._model, text[:, :count])

    @torch.no_grad()
    def decode(self, text: Tensor, count: int) -> None:
        for i in range(count):
            self._model(text[:, i : i + 1], past_key_values=self._cache)


class _LlamaCpp:
    """The model in llama.cpp, likewise."""

    def __init__(self, file: Path, room: int, threads: int) -> None:
        make: Callable[..., Any] = importlib.import_module("llama_cpp").Llama
        sizes = {"n_ctx": room, "n_batch": room, "n_ubatch": 512, "n_threads": threads, "n_threads_batch": threads}
        self._model = make(str(file), **sizes, verbose=False)

    def prompt(self, text: Tensor, count: int) -> None:
        self._model.reset()
        self._model.eval(text[0, :count].tolist())

    def decode(self, text: Tensor, count: int) -> None:
        for token in text[0, :count].tolist():
            self._model.eval([token])
