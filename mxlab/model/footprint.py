"""Bytes that a model and its cache take: as the formats say, and as they are."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from mxlab.model.conversion import Conversion
from mxlab.model.nn.packed_cache import packed_bytes
from mxlab.model.sites import find_sites


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
    model = conversion.model
    others = {id(x): x.nbytes for x in [*model.parameters(), *model.buffers()] if id(x) not in in_place}
    states = sum(2 * prod(site.shape) for site in find_sites(model) if site.kind == "attention")
    width = conversion.kv_bits_in("decode") or 0.0
    return Footprint(elements // 8, (bits - elements) // 8, sum(others.values()), int(states * width * tokens / 8))


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers; what is shared counts once."""
    tensors = {id(x): x.nbytes for x in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())


def cache_bytes(cache: Any) -> int:
    """Return the bytes that a cache of transformers keeps: keys and values with the room for more, and other states."""
    layers = getattr(cache, "layers", None)
    if layers is None:  # of an encoder and a decoder
        return sum(cache_bytes(part) for part in (cache.self_attention_cache, cache.cross_attention_cache))
    found = {id(x): packed_bytes(x) for layer in layers for x in vars(layer).values() if isinstance(x, Tensor)}
    return sum(found.values())
