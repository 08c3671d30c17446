"""One quantized activation for all the projections that read it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


class SharedInput:
    """Remembers what the last input was turned into, for the other layers that are called with the same tensor.

    Query, key and value projections share one, as do gate and up. It holds the result no longer than the input lives.
    """

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], Hashable, Tensor] | None = None

    def get(self, x: Tensor, kind: Hashable, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``function(x)``; not computed again for the same unchanged tensor and an equal ``kind``."""
        key = (kind, torch.is_grad_enabled(), 0 if x.is_inference() else x._version)
        last = self._last
        if last is not None and last[0]() is x and last[1] == key:
            return last[2]
        result = function(x)
        if result is not x:
            self._last = (weakref.ref(x, self._forget), key, result)
        return result

    def _forget(self, reference: weakref.ref[Tensor]) -> None:
        last = self._last
        if last is not None and last[0] is reference:
            self._last = None

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedInput, ()  # a copy begins empty; copies of layers that share one share one
