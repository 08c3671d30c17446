"""Quantized keys, values and what else an attention multiplies.

In transformers an attention hands K, after the rotary embedding, and V to its cache's ``update`` and computes with what
comes back. A stand-in for the cache is therefore the one place where every token's K and V pass exactly once, before
``repeat_kv`` and before any attention kernel, eager or fused, with a cache behind it or without. The cosines and sines
of the rotary embedding are an argument of the attention. Query, softmax input and probabilities are met inside it.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from mxlab.errors import ConversionError
from mxlab.formats import NumberFormat, Numerics
from mxlab.model.nn.forward import Inside
from mxlab.model.nn.phase import PassPhase
from mxlab.model.nn.products import AttentionProducts
from mxlab.numerics import quantize
from mxlab.recipe.rule import KV_ROLES, Phase

Observer = Callable[[str, NumberFormat, Tensor], None]

# The roles that are met inside the attention's own computation; the last two not in a fused one.
INNER_ROLES = ("q", "softmax", "p")
EAGER_ROLES = ("softmax", "p")
ROPE_ARGUMENT = "position_embeddings"

# Scores below it are masked ones: exp of them is zero beside any other. Masks are made of a dtype's least value, and
# may be widened afterwards.
_MASKED = torch.finfo(torch.float16).min / 2


class AttentionQuantizer:
    """Takes the place of an attention's forward and quantizes what its rule names.

    ``observer``, where set, is called with the role, the format and the tensor before it is quantized: K and V are
    (batch, heads, tokens, head_dim).
    """

    def __init__(
        self, formats: Mapping[Phase, Mapping[str, NumberFormat]], numerics: Numerics, phase: PassPhase | None = None
    ) -> None:
        self._formats = formats
        self._roles = {role for by_role in formats.values() for role in by_role}
        self.numerics: Numerics = numerics
        self.phase = phase or PassPhase()
        self.observer: Observer | None = None

    def attach(self, name: str, attention: nn.Module, cache_argument: str) -> None:
        """Quantize what ``attention`` multiplies from now on; its forward takes a cache as ``cache_argument``."""
        self._name, self._cache_argument = name, cache_argument
        self._parameters = list(inspect.signature(type(attention).forward).parameters)[1:]
        Inside(attention, self).install()

    @property
    def formats(self) -> Mapping[str, NumberFormat]:
        """The formats of the present phase of generation."""
        return self._formats[self.phase.current]

    def compute(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """The attention's output, its operands quantized.

        Raises:
            ConversionError: an operand that a format was given for was not met.
        """
        seen: Counter[str] = Counter()
        if not self._roles.isdisjoint(KV_ROLES):
            args, kwargs = self._with(args, kwargs, self._cache_argument, lambda cache: _stand_in(cache, self, seen))
        if "rope" in self._roles:
            args, kwargs = self._with(args, kwargs, ROPE_ARGUMENT, self._on_rope)
        if self._roles.isdisjoint(INNER_ROLES):
            output = forward(*args, **kwargs)
        else:
            with AttentionProducts(self.quantize, seen):
                output = forward(*args, **kwargs)
        self._check(seen)
        return output

    def quantize(self, role: str, x: Tensor, axis: int = -1) -> Tensor:
        """The operand as the attention computes with it."""
        fmt = self.formats.get(role)
        if fmt is None:
            return x
        if role == "softmax":
            # Masked scores stay as they are, and count as zeros in their block.
            masked = x < _MASKED
            return torch.where(masked, x, self._quantized(role, x.masked_fill(masked, 0.0), fmt, axis))
        return self._quantized(role, x, fmt, axis)

    def _quantized(self, role: str, x: Tensor, fmt: NumberFormat, axis: int) -> Tensor:
        if self.observer is not None:
            self.observer(role, fmt, x)
        return quantize(x, fmt, axis=axis, numerics=self.numerics)

    def _with(self, args: tuple, kwargs: dict[str, Any], name: str, function: Callable[[Any], Any]) -> tuple:
        """The arguments with the one called ``name``, None if it was not given, passed through ``function``."""
        index = self._parameters.index(name)
        if index < len(args):
            return (*args[:index], function(args[index]), *args[index + 1 :]), kwargs
        return args, {**kwargs, name: function(kwargs.get(name))}

    def _on_rope(self, tables: Any) -> tuple[Tensor, ...]:
        if not isinstance(tables, tuple | list):
            given = "without" if tables is None else f"with a {type(tables).__name__} as"
            raise ConversionError(
                f"{self._name} was called {given} {ROPE_ARGUMENT}: there are no cosines and sines to quantize as rope"
            )
        return tuple(self.quantize("rope", table) for table in tables)

    def _check(self, seen: Counter[str]) -> None:
        missed = [role for role in (*KV_ROLES, *INNER_ROLES) if role in self.formats and not seen[role]]
        if not missed:
            return
        remedy = f"leave {' and '.join(missed)} out for it"
        if not set(missed).issubset(KV_ROLES):
            remedy = f"load the model with attn_implementation='eager', or {remedy}"
        raise ConversionError(
            f"{self._name} computes its attention where mxlab cannot see {', '.join(missed)}: {remedy}"
        )


def _stand_in(cache: Any, quantizer: AttentionQuantizer, seen: Counter[str]) -> Any:
    """What an attention takes for its cache, which may be None: it quantizes what is written."""
    if not isinstance(cache, EncoderDecoderCache):
        return _QuantizingCache(cache, quantizer, seen)
    pair = copy.copy(cache)
    pair.self_attention_cache = _QuantizingCache(cache.self_attention_cache, quantizer, seen)  # pyright: ignore[reportAttributeAccessIssue]
    pair.cross_attention_cache = _QuantizingCache(cache.cross_attention_cache, quantizer, seen)  # pyright: ignore[reportAttributeAccessIssue]
    seen.update(KV_ROLES)  # those of the encoder are written once, not in every call
    return pair


class _QuantizingCache:
    """Quantizes what is written to ``cache`` (which may be None); all else is the cache's own."""

    def __init__(self, cache: Any, quantizer: AttentionQuantizer, seen: Counter[str]) -> None:
        self._cache = cache
        self._quantizer = quantizer
        self._seen = seen

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._seen.update(KV_ROLES)
        key, value = self._quantizer.quantize("k", key), self._quantizer.quantize("v", value)
        return (key, value) if self._cache is None else self._cache.update(key, value, *args, **kwargs)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0 if self._cache is None else self._cache.get_seq_length(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_cache":  # not set yet: this is a copy in the making
            raise AttributeError(name)
        return getattr(self._cache, name)
