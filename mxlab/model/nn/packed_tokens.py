"""Keys or values of an attention in the codes of their format, with room for more tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mxlab.model.nn.states import StateGrid
from mxlab.numerics.kernels import attention
from mxlab.numerics.kernels.attention import PackedHeads
from mxlab.packed import MXTensor

_LEAST_ROOM, _SHARE_OF_ROOM = 64, 32  # tokens; a 32nd of those that are there
_TOKENS, _HEAD_DIM = 2, 3  # axes


class TokenCodes(NamedTuple):
    """Codes of tokens: elements uint8 [batch, heads, tokens, bytes], scales uint8 [batch, heads, tokens, blocks].

    ``units``, float32 [tokens], are what the scales are times, where the format has a scale of a tensor.
    """

    elements: Tensor
    scales: Tensor
    units: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenCodes:
        """Return what a function makes of what has a batch."""
        return TokenCodes(function(self.elements), function(self.scales), self.units)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenCodes:
        """Return the same on another device."""
        moved = self.map(lambda part: part.to(device, non_blocking=non_blocking))
        return moved._replace(units=None if self.units is None else self.units.to(device, non_blocking=non_blocking))

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return sum(x.nbytes for x in self if x is not None)

    def narrow(self, start: int, end: int) -> TokenCodes:
        """Return those of tokens [start, end), which share the memory."""
        elements, scales = (x[:, :, start:end] for x in (self.elements, self.scales))
        return TokenCodes(elements, scales, None if self.units is None else self.units[start:end])

    def write(self, start: int, codes: TokenCodes) -> None:
        """Copy the codes of other tokens to where these begin with token ``start``."""
        target = self.narrow(start, start + codes.elements.shape[_TOKENS])
        for to, given in zip(target, codes, strict=True):
            if to is not None and given is not None:
                to.copy_(given)


class Room:
    """Codes, with room for more; those that are written stay as they are, so that any number of tensors share them."""

    def __init__(self, codes: TokenCodes, capacity: int = 0) -> None:
        self.codes, self.used = codes, codes.elements.shape[_TOKENS]
        if capacity:
            *rest, _, _ = codes.elements.shape
            empty = codes.map(lambda part: part.new_empty(*rest, capacity, part.shape[-1]))
            self.codes = empty._replace(units=None if codes.units is None else codes.units.new_empty(capacity))
            self.codes.write(0, codes)

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.codes.elements.shape[_TOKENS]

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.elements.device

    def extended(self, start: int, end: int, codes: TokenCodes) -> tuple[Room, int]:
        """Return room that holds tokens [start, end) and more behind them, and where the former begin."""
        added = codes.elements.shape[_TOKENS]
        is_frozen = self.codes.elements.is_inference() and not torch.is_inference_mode_enabled()
        if end != self.used or end + added > self.capacity or is_frozen:
            kept = end - start
            capacity = kept + added + max(_LEAST_ROOM, (kept + added) // _SHARE_OF_ROOM)
            return Room(self.codes.narrow(start, end), capacity).extended(0, kept, codes)
        self.codes.write(end, codes)
        self.used += added
        return self, start


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """Keys or values [batch, heads, tokens, head_dim] in codes.

    Attributes:
        grid: what the codes stand for.
        dtype: of the values.
        head_dim: elements of a token and head.
        room: where the codes are, and others.
        start: the first token in it.
        end: behind the last one.
    """

    grid: StateGrid
    dtype: torch.dtype
    head_dim: int
    room: Room
    start: int
    end: int

    @classmethod
    def from_float(cls, x: Tensor, grid: StateGrid) -> PackedTokens:
        """Quantize what an attention gives its cache, float [batch, heads, tokens, head_dim]."""
        packed = grid.encode(x)
        units = packed.tensor_scale.expand(x.shape[_TOKENS]) if packed.fmt.tensor_bits else None
        room = Room(TokenCodes(packed.elements, packed.scales, units))
        return cls(grid, x.dtype, x.shape[_HEAD_DIM], room, 0, room.used)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Batch, heads, tokens and head_dim."""
        batch, heads = self.room.codes.elements.shape[:_TOKENS]
        return batch, heads, self.end - self.start, self.head_dim

    @property
    def codes(self) -> TokenCodes:
        """The codes of the tokens; they share the memory."""
        return self.room.codes.narrow(self.start, self.end)

    @property
    def heads(self) -> PackedHeads:
        """The codes as the kernels take them."""
        return PackedHeads(*self.codes[:2], self._fmt, self.head_dim)

    @property
    def _fmt(self) -> Any:  # a microscaling format
        return self.grid.fmt

    def values(self) -> Tensor:
        """Return the values, as the attention computes with them: a new tensor."""
        elements, scales, units = self.codes
        unit = torch.ones(()) if units is None else units[:, None, None]
        packed = MXTensor(self._fmt, self.shape, _HEAD_DIM, self.dtype, elements, scales, unit)
        return self.grid.restored(packed.dequantize())

    def scores(self, queries: Tensor) -> Tensor:
        """Return products with queries [batch, heads, rows, head_dim], float32 [batch, heads, rows, tokens]."""
        wide, units = queries.float(), self.codes.units
        added = self.grid.products_with_offset(wide)
        found = attention.score(self.grid.transformed(wide), self.heads)
        if units is not None:
            found *= units
        return found if added is None else found.add_(added)

    def mixed(self, probabilities: Tensor) -> Tensor:
        """Return their sums, weighted [batch, heads, rows, tokens]: float32 [batch, heads, rows, head_dim]."""
        units = self.codes.units
        given = probabilities.float() if units is None else probabilities.float() * units
        return self.grid.restored(attention.mix(given, self.heads))

    def narrowed(self, tokens: slice) -> PackedTokens:
        """Return some of the tokens, which share the memory."""
        start, stop, _ = tokens.indices(self.end - self.start)
        return replace(self, start=self.start + start, end=self.start + max(start, stop))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> PackedTokens:
        """Return what a function makes of the rows of the batch, of codes and scales alike."""
        return self._holding(self.codes.map(function))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedTokens:
        """Return the same on another device."""
        return self._holding(self.codes.to(device, non_blocking))

    def _holding(self, codes: TokenCodes) -> PackedTokens:
        room = Room(codes)
        return replace(self, room=room, start=0, end=room.used)

    def followed(self, others: Sequence[PackedTokens]) -> PackedTokens:
        """Return these tokens and those of others behind them."""
        room, start, end = self.room, self.start, self.end
        for other in others:
            room, moved = room.extended(start, end, other.codes)
            start, end = moved, moved + (end - start) + (other.end - other.start)
        return replace(self, room=room, start=start, end=end)

    def is_continued_by(self, other: PackedTokens) -> bool:
        """Return whether other tokens can be stored behind these."""
        same_kind = self.dtype == other.dtype and self.room.device == other.room.device
        sizes, others = self.shape, other.shape
        return same_kind and sizes[:2] + sizes[3:] == others[:2] + others[3:] and self.grid.is_like(other.grid)
