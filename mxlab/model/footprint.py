"""Bytes that a model and its cache take: as the formats say, and as they are."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from mxlab.model.conversion import Conversion
from mxlab.model.nn.packed_cache import packed_bytes
from mxlab.model.sites import find_sites
from mxlab.recipe.rule import KV_ROLES


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model and of what it keeps of a text.

    Attributes:
        elements: of quantized weights.
        scales: of their blocks and tensors.
        others: of all other parameters and buffers.
        cache: of keys and values.
    """

    elements: int
    scales: int
    others: int
    cache: int

    @property
    def weights(self) -> int:
        """All that is there without a text."""
        return self.elements + self.scales + self.others


def predicted(conversion: Conversion, tokens: int) -> Footprint:
    """Return what the formats of a converted model come to, weights packed, with so many tokens in the cache.

    Nothing but shapes is read: the model may be on the meta device. A sliding window is not counted on.
    """
    quantized = [site for site in conversion.linears if "weight" in site.roles]
    bits = sum(site.storage_bits() for site in quantized)
    elements = sum(prod(site.shape) * fmt.element_bits for site in quantized for fmt in site.weight_formats)
    in_place = {id(p) for site in quantized for p in site.stored_parameters()}
    others = model_bytes(conversion.model, in_place)
    return Footprint(elements // 8, (bits - elements) // 8, others, _cache_bits(conversion, tokens) // 8)


def _cache_bits(conversion: Conversion, tokens: int) -> int:
    """Return what keys and values of so many tokens come to in the formats of a pass that adds one."""
    unquantized = next(conversion.model.parameters()).element_size() * 8
    formats = {site.name: site.by_phase["decode"] for site in conversion.attentions}
    bits = 0
    for site in find_sites(conversion.model):
        if site.kind == "attention" and site.shape:
            heads, head_dim = site.shape
            for role in KV_ROLES:
                fmt = formats.get(site.name, {}).get(role)
                shape = (heads, tokens, head_dim)
                bits += prod(shape) * unquantized if fmt is None else fmt.storage_bits(shape)
    return bits


def model_bytes(model: nn.Module, left_out: Set[int] = frozenset()) -> int:
    """Return the bytes of a model's parameters and buffers but for those with an id in ``left_out``.

    What is shared counts once.
    """
    tensors = {id(x): x.nbytes for x in [*model.parameters(), *model.buffers()] if id(x) not in left_out}
    return sum(tensors.values())


def cache_bytes(cache: Any) -> int:
    """Return the bytes that a cache of transformers keeps: keys and values with the room for more, and other states."""
    layers = getattr(cache, "layers", None)
    if layers is None:  # of an encoder and a decoder
        return sum(cache_bytes(part) for part in (cache.self_attention_cache, cache.cross_attention_cache))
    found = {id(x): packed_bytes(x) for layer in layers for x in vars(layer).values() if isinstance(x, Tensor)}
    return sum(found.values())
