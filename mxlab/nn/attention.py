"""Quantized keys, values and what else an attention multiplies.

In transformers an attention hands K, after the rotary embedding, and V to its cache's ``update`` and computes with what
comes back. A stand-in for the cache is therefore the one place where every token's K and V pass exactly once, before
``repeat_kv`` and before any attention kernel, eager or fused, with a cache behind it or without. The cosines and sines
of the rotary embedding are an argument of the attention. Query, softmax input and probabilities are met inside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mxlab.errors import ConversionError
from mxlab.formats import Numerics
from mxlab.nn.phase import PassPhase
from mxlab.nn.products import AttentionProducts
from mxlab.numerics import quantize
from mxlab.quantizers import Format
from mxlab.rules import Phase

Observer = Callable[[str, Format, Tensor], None]

# The roles that are met inside the attention's own computation; the last two not in a fused one.
INNER_ROLES = ("q", "softmax", "p")
EAGER_ROLES = ("softmax", "p")
ROPE_ARGUMENT = "position_embeddings"


class AttentionQuantizer:
    """Forward hooks on an attention module that quantize what its rule names.

    ``observer``, where set, is called with the role, the format and the tensor before it is quantized: K and V are
    (batch, heads, tokens, head_dim).
    """

    def __init__(
        self, formats: Mapping[Phase, Mapping[str, Format]], numerics: Numerics, phase: PassPhase | None = None
    ) -> None:
        self._formats = formats
        self._roles = {role for by_role in formats.values() for role in by_role}
        self._products: list[AttentionProducts] = []  # of the calls under way
        self.numerics: Numerics = numerics
        self.phase = phase or PassPhase()
        self.observer: Observer | None = None

    def attach(self, name: str, attention: nn.Module, cache_argument: str) -> None:
        """Quantize what ``attention`` multiplies from now on; its forward takes a cache as ``cache_argument``."""
        self._name, self._cache_argument = name, cache_argument
        self._parameters = list(inspect.signature(attention.forward).parameters)
        attention.register_forward_pre_hook(self, with_kwargs=True)
        if not self._roles.isdisjoint(INNER_ROLES):
            attention.register_forward_pre_hook(self._enter)
            attention.register_forward_hook(self._leave, always_call=True)

    @property
    def formats(self) -> Mapping[str, Format]:
        """The formats of the present phase of generation."""
        return self._formats[self.phase.current]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Put a quantizing stand-in in place of the cache, and quantized cosines and sines in place of those given."""
        if not self._roles.isdisjoint(("k", "v")):
            args, kwargs = self._with(args, kwargs, self._cache_argument, lambda cache: _QuantizingCache(cache, self))
        if "rope" in self._roles:
            args, kwargs = self._with(args, kwargs, ROPE_ARGUMENT, self._on_rope)
        return args, kwargs

    def quantize(self, role: str, x: Tensor, axis: int = -1) -> Tensor:
        """The operand as the attention computes with it."""
        fmt = self.formats.get(role)
        if fmt is None:
            return x
        if self.observer is not None:
            self.observer(role, fmt, x)
        return self._on_scores(x, fmt) if role == "softmax" else quantize(x, fmt, axis=axis, numerics=self.numerics)

    def _with(self, args: tuple, kwargs: dict[str, Any], name: str, function: Callable[[Any], Any]) -> tuple:
        """The arguments with the one called ``name``, None if it was not given, passed through ``function``."""
        index = self._parameters.index(name)
        if index < len(args):
            return (*args[:index], function(args[index]), *args[index + 1 :]), kwargs
        return args, {**kwargs, name: function(kwargs.get(name))}

    def _on_rope(self, tables: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        if tables is None:
            raise ConversionError(f"{self._name} was called without {ROPE_ARGUMENT}: there is no rope to quantize")
        return tuple(self.quantize("rope", table) for table in tables)

    def _on_scores(self, scores: Tensor, fmt: Format) -> Tensor:
        """The softmax's input. Masked scores stay as they are, and count as zeros in their block."""
        masked = scores < torch.finfo(scores.dtype).min / 2
        quantized = quantize(scores.masked_fill(masked, 0.0), fmt, numerics=self.numerics)
        return torch.where(masked, scores, quantized)

    def _enter(self, *_: Any) -> None:
        products = AttentionProducts(self.quantize)
        self._products.append(products)
        products.__enter__()

    def _leave(self, *_: Any) -> None:
        products = self._products.pop()
        products.__exit__(None, None, None)
        missed = [role for role in INNER_ROLES if role in self.formats and not products.seen[role]]
        if missed and products.seen:
            raise ConversionError(
                f"{self._name} computes its attention where mxlab cannot see {', '.join(missed)}: use "
                "model.set_attn_implementation('eager'), or leave the role out"
            )


class _QuantizingCache:
    """Quantizes what is written to ``cache`` (which may be None); all else is the cache's own."""

    def __init__(self, cache: Any, quantizer: AttentionQuantizer) -> None:
        self._cache = cache
        self._quantizer = quantizer

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key, value = self._quantizer.quantize("k", key), self._quantizer.quantize("v", value)
        return (key, value) if self._cache is None else self._cache.update(key, value, *args, **kwargs)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0 if self._cache is None else self._cache.get_seq_length(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_cache":  # not set yet: this is a copy in the making
            raise AttributeError(name)
        return getattr(self._cache, name)
