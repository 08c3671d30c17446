"""Quantized keys and values.

In transformers an attention hands K, after the rotary embedding, and V to ``past_key_values.update`` and computes with
what comes back. A stand-in for the cache is therefore the one place where every token's K and V pass exactly once,
before ``repeat_kv`` and before any attention kernel, eager or fused, with a cache behind it or without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mxlab.formats import MXFormat, Numerics
from mxlab.numerics import quantize

Observer = Callable[[str, MXFormat, Tensor], None]


class KVQuantizer:
    """A forward pre-hook on an attention module that quantizes K and V along head_dim.

    ``observer``, where set, is called with the role, the format and the tensor (batch, heads, tokens, head_dim) before
    it is quantized.
    """

    def __init__(self, k: MXFormat | None, v: MXFormat | None, numerics: Numerics) -> None:
        self.formats = {"k": k, "v": v}
        self.numerics: Numerics = numerics
        self.observer: Observer | None = None

    def attach(self, attention: nn.Module) -> None:
        """Quantize the K and V of ``attention`` from now on."""
        attention.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Put a quantizing stand-in in place of the cache that ``module`` is called with."""
        return args, {**kwargs, "past_key_values": _QuantizingCache(kwargs.get("past_key_values"), self)}

    def quantize(self, role: str, x: Tensor) -> Tensor:
        """K or V (batch, heads, tokens, head_dim) as the attention sees it."""
        fmt = self.formats[role]
        if fmt is None:
            return x
        if self.observer is not None:
            self.observer(role, fmt, x)
        return quantize(x, fmt, numerics=self.numerics)


class _QuantizingCache:
    """Quantizes what is written to ``cache`` (which may be None); all else is the cache's own."""

    def __init__(self, cache: Any, quantizer: KVQuantizer) -> None:
        self._cache = cache
        self._quantizer = quantizer

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key, value = self._quantizer.quantize("k", key), self._quantizer.quantize("v", value)
        return (key, value) if self._cache is None else self._cache.update(key, value, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_cache":  # not set yet: this is a copy in the making
            raise AttributeError(name)
        return getattr(self._cache, name)
