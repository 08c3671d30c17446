"""Quantize keys, values and whatever else an attention multiplies.

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
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.pytorch_utils import Conv1D

from mxlab.errors import ConversionError
from mxlab.formats import NumberFormat, Numerics
from mxlab.model.nn.forward import ForwardOverride
from mxlab.model.nn.operands import Observable
from mxlab.model.nn.packed_cache import PackedStates, unpacked
from mxlab.model.nn.phase import PassPhase
from mxlab.model.nn.products import AttentionProducts, unseen
from mxlab.model.nn.states import StateGrid
from mxlab.recipe.rule import DEROTATED_ROLES, KV_ROLES, TRANSFORMED_ATTENTION_ROLES, Phase
from mxlab.recipe.transform import Derotated, Hadamard, Transform

# The roles that are met inside the attention's own computation; the last two not in a fused one.
INNER_ROLES = ("q", "softmax", "p")
EAGER_ROLES = ("softmax", "p")
ROPE_ARGUMENT = "position_embeddings"
K_OFFSET = "k_offset"  # the buffer with the mean of K
SHARED_ARGUMENT = "shared_kv_states"  # by which transformers 5 hands K and V from layer to layer

# Scores below this are masked ones, whatever their dtype: exp of them is zero beside any other. Masks are made of the
# least value of a dtype, float16's too, and may be widened afterwards.
MASKED = torch.finfo(torch.float16).min / 2


class QuantizedAttention(Observable):
    """Takes the place of an attention's forward and quantizes the operands that its rule names.

    Args:
        name: qualified name of the attention, for errors.
        attention: the module.
        cache_argument: name of its forward's argument that is the cache.
        formats: by phase and role.
        numerics: ``exact`` or ``microxcaling``.
        phase: which phase a pass is in.
        is_passive: show the operands to observers, and leave them unchanged.
        transform: of K, V and the query along head_dim, before they are quantized. The attention sees them transformed
            back. As it is orthogonal, the products are those of the transformed operands, which lie on the grid. One
            that is derotated leaves the query alone.

    Attributes:
        keeps_codes: the cache keeps K and V in the codes of their formats (:mod:`mxlab.model.nn.packed_cache`).

    The attention's buffer ``k_offset`` (:func:`make_room_for_offset`), where it has one, is taken off K before it is
    quantized and added again afterwards. That moves all scores of a query alike, by what the query makes of it: on the
    grid lies the rest. So a format that is symmetric around zero need not spend its range on the mean (SageAttention,
    arXiv 2410.02367, section 4.2).
    """

    def __init__(
        self,
        name: str,
        attention: nn.Module,
        cache_argument: str,
        formats: Mapping[Phase, Mapping[str, NumberFormat]],
        numerics: Numerics,
        phase: PassPhase | None = None,
        is_passive: bool = False,
        transform: Transform | None = None,
    ) -> None:
        self._name, self._cache_argument = name, cache_argument
        self._attention = attention
        self._config = getattr(attention, "config", None)
        # Gemma's last layers use the K and V of an earlier one, which are quantized there.
        self._reuses_keys = bool(getattr(attention, "is_kv_shared_layer", False))
        self._parameters = list(inspect.signature(type(attention).forward).parameters)[1:]
        self._override = ForwardOverride(attention, self)
        self._inner = [ForwardOverride(inner, _Aside()) for inner in _inner_modules(attention)]
        self._formats = formats
        self._roles = {role for by_role in formats.values() for role in by_role}
        self.numerics: Numerics = numerics
        self.phase = phase or PassPhase()
        self._is_passive = is_passive
        self._transform = transform
        self.keeps_codes = False

    def install(self) -> None:
        """Quantize what the attention multiplies, from now on."""
        for override in (self._override, *self._inner):
            override.install()

    @property
    def formats(self) -> Mapping[str, NumberFormat]:
        """The formats by role in the current phase."""
        return self._formats[self.phase.current]

    def compute(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """Return the attention's output, its operands quantized.

        Raises:
            ConversionError: an operand that a format was given for was not met.
        """
        seen: Counter[str] = Counter()
        meets_keys = False
        self._note("", self.phase.current)
        if not self._roles.isdisjoint(KV_ROLES):
            meets_keys = self._computes_keys_anew(args, kwargs)
            if not meets_keys:
                args, kwargs = self._with(args, kwargs, self._cache_argument, lambda cache: self._stand_in(cache, seen))
        if "rope" in self._roles:
            args, kwargs = self._with(args, kwargs, ROPE_ARGUMENT, self._on_rope)
        if self._roles.isdisjoint(INNER_ROLES) and not meets_keys:
            output = forward(*args, **kwargs)
        else:
            with AttentionProducts(self.quantize, seen, meets_keys):
                output = forward(*args, **kwargs)
        self._check(seen)
        return output

    def replicated(self, module: nn.Module) -> QuantizedAttention:
        """Return what computes ``module``, which has buffers of its own."""
        replica = copy.copy(self)
        replica._attention = module
        return replica

    def _computes_keys_anew(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Return whether K and V that would be read from the cache of an earlier layer are computed: there is none."""
        if not self._reuses_keys or SHARED_ARGUMENT in self._parameters:
            return False
        index = self._parameters.index(self._cache_argument)
        return (args[index] if index < len(args) else kwargs.get(self._cache_argument)) is None

    def _stand_in(self, cache: Any, seen: Counter[str]) -> Any:
        """Return what the attention takes for its cache (which may be None): it quantizes what is written."""
        if self._reuses_keys and SHARED_ARGUMENT in self._parameters:
            seen.update(KV_ROLES)
        if not isinstance(cache, EncoderDecoderCache):
            return _QuantizingCache(cache, self, seen, self._config)
        pair = copy.copy(cache)
        own, cross = cache.self_attention_cache, cache.cross_attention_cache
        pair.self_attention_cache = _QuantizingCache(own, self, seen, self._config)  # pyright: ignore[reportAttributeAccessIssue]
        pair.cross_attention_cache = _QuantizingCache(cross, self, seen, self._config)  # pyright: ignore[reportAttributeAccessIssue]
        seen.update(KV_ROLES)  # those of the encoder are written once, not in every call
        return pair

    def coded(self, role: str, x: Tensor) -> Tensor:
        """Return K or V as a cache is to keep it: in codes, if it has a format and the attention keeps them."""
        fmt = self.formats.get(role)
        if fmt is None or not self.keeps_codes:
            return self.quantize(role, x)
        self._show("", role, x, -1)
        return PackedStates.from_float(x, self._grid(role, fmt))

    def quantize(self, role: str, x: Tensor, axis: int = -1) -> Tensor:
        """Return the operand as the attention computes with it, same shape and dtype.

        K, V and the query are (batch, heads, tokens, head_dim), scores and probabilities (batch, heads, tokens, keys).
        Masked scores stay unchanged, and count as zeros in their block.
        """
        fmt = self.formats.get(role)
        if fmt is None:
            return x
        if role != "softmax":
            return self._quantized(role, x, fmt, axis)
        masked = x < MASKED
        return torch.where(masked, x, self._quantized(role, x.masked_fill(masked, 0.0), fmt, axis))

    def _quantized(self, role: str, x: Tensor, fmt: NumberFormat, axis: int) -> Tensor:
        self._show("", role, x, axis)
        if self._is_passive:
            return x
        return self._grid(role, fmt).quantize(x, axis)

    def _grid(self, role: str, fmt: NumberFormat) -> StateGrid:
        transform = self._transform
        is_transformed = isinstance(transform, Hadamard | Derotated) and role in _transformed_roles(transform)
        size = transform.size if is_transformed else None  # pyright: ignore[reportOptionalMemberAccess]
        offset = getattr(self._attention, K_OFFSET, None) if role == "k" else None
        return StateGrid(self._name, fmt, self.numerics, size, offset)

    def _with(self, args: tuple, kwargs: dict[str, Any], name: str, function: Callable[[Any], Any]) -> tuple:
        """Return the arguments with the one called ``name`` (None if not given) passed through ``function``."""
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


def make_room_for_offset(name: str, attention: nn.Module, shape: tuple[int, ...]) -> None:
    """Give an attention of (K/V heads, head_dim) the buffer of the offset of its keys, [heads, 1, head_dim].

    Raises:
        ConversionError: the shape is not known.
    """
    if not shape:
        raise ConversionError(f"mxlab cannot tell the heads of {name}, a {type(attention).__name__}: take k_offset out")
    if not hasattr(attention, K_OFFSET):
        heads, head_dim = shape
        device = next((p.device for p in attention.parameters()), None)
        attention.register_buffer(K_OFFSET, torch.zeros(heads, 1, head_dim, device=device))


def _transformed_roles(transform: Transform) -> tuple[str, ...]:
    return DEROTATED_ROLES if isinstance(transform, Derotated) else TRANSFORMED_ATTENTION_ROLES


class _QuantizingCache:
    """Quantizes what is written to ``cache`` (which may be None); all else is the cache's own.

    What the attention reads from the cache itself was quantized when it was written: a cross attention in decode, or a
    layer that reuses the keys of another, need not write any.
    """

    def __init__(self, cache: Any, attention: QuantizedAttention, seen: Counter[str], config: Any) -> None:
        self._cache: Any = cache
        self._attention = attention
        self._seen = seen
        self._config = config

    @property
    def behind(self) -> Any:
        """The cache that the model has; None where it has none."""
        return None if isinstance(self._cache, _PassingCache) else self._cache

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._seen.update(KV_ROLES)
        if self._cache is None or not _can_pack(key, value):
            key, value = self._attention.quantize("k", key), self._attention.quantize("v", value)
            return (key, value) if self._cache is None else self._cache.update(key, value, *args, **kwargs)
        coded = self._attention.coded("k", key), self._attention.coded("v", value)
        kept = self._cache.update(*coded, *args, **kwargs)
        return kept if key.shape[-2] == 1 else (unpacked(kept[0]), unpacked(kept[1]))

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0 if self._cache is None else self._cache.get_seq_length(*args, **kwargs)

    def __getitem__(self, index: int) -> Any:
        self._seen.update(KV_ROLES)
        return self._cache[index]

    def __getattr__(self, name: str) -> Any:
        if name == "_cache":  # not set yet: this is a copy in the making
            raise AttributeError(name)
        if name in _STORED:
            self._seen.update(KV_ROLES)
        return getattr(self._real(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:  # Gemma keeps K and V for later layers in an attribute of the cache
            setattr(self._real(), name, value)

    def _real(self) -> Any:
        if self._cache is None:  # an attention without a cache would not have asked: it gets an empty one
            self._cache = _PassingCache(config=self._config) if self._config is not None else _PassingCache()
        return self._cache


def _can_pack(key: Tensor, value: Tensor) -> bool:
    """Return whether K and V can be kept in codes: nothing learns from them, and they have the usual axes."""
    is_learning = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
    return not is_learning and not torch.compiler.is_compiling() and key.ndim == value.ndim == 4 and key.numel() > 0


class _PassingCache(DynamicCache):
    """An empty cache for one call of one attention, which the model is not told of."""


_STORED = ("layers", "shared_layers", "key_cache", "value_cache")  # where caches keep K and V
_OWN = ("_cache", "_attention", "_seen", "_config")


class _Aside:
    """Computes a module inside an attention: what it multiplies, and what cache it has, is its own affair."""

    def compute(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        own = (x.behind if isinstance(x, _QuantizingCache) else x for x in args)
        named = {name: x.behind if isinstance(x, _QuantizingCache) else x for name, x in kwargs.items()}
        with unseen():
            return forward(*own, **named)

    def replicated(self, module: nn.Module) -> _Aside:
        return self


def _inner_modules(attention: nn.Module) -> list[nn.Module]:
    """Return the outermost modules inside an attention that may multiply by themselves, such as a nested scorer."""
    found: list[nn.Module] = []
    for child in attention.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            found += _inner_modules(child)
        elif any(True for _ in child.children()) or _has_matrix(child):
            found.append(child)
    return found


def _has_matrix(module: nn.Module) -> bool:
    is_known = isinstance(module, nn.Linear | nn.Embedding | Conv1D | nn.modules.conv._ConvNd)
    return not is_known and any(p.ndim > 1 for p in module.parameters(recurse=False))
