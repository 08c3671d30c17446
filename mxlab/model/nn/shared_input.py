"""Quantize an activation once for all the projections that read it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

# Bytes of a workspace. Small memory is recycled at once: for a token it would only be work.
_SMALLEST, _LARGEST = 2**16, 2**26


Result = TypeVar("Result")


class _Workspace(threading.local):
    """Memory for one quantized activation, lent to one SharedInput after the other.

    A matmul reads it at once and nobody else sees it. New memory for every layer would cost page faults, which can take
    longer than quantizing. Torch's allocator for GPUs keeps its memory; there none is lent.
    """

    def __init__(self) -> None:
        self.borrower: SharedInput | None = None
        self._memory: dict[Hashable, Tensor] = {}

    def lend(self, borrower: SharedInput, x: Tensor) -> Tensor | None:
        """Return memory for a contiguous tensor like ``x`` until it is lent again; None where it must be new."""
        size = x.numel() * x.element_size()
        if (
            torch.is_grad_enabled()
            or x.device.type != "cpu"
            or not x.is_contiguous()
            or not _SMALLEST <= size <= _LARGEST
        ):
            return None
        kind = x.dtype, torch.is_inference_mode_enabled()
        memory = self._memory.get(kind)
        if memory is None or memory.numel() < x.numel():
            memory = self._memory[kind] = torch.empty(x.numel(), dtype=x.dtype)
        self.borrower = borrower
        return memory[: x.numel()].view(x.shape)


_workspace = _Workspace()


class SharedInput:
    """During a call of a parent module, remembers what its layers' last input was turned into.

    Query, key and value projections share one, as do gate and up. Outside a call of the parent nothing is remembered: a
    layer that is called on its own, or again with a buffer that was written to, computes anew.
    """

    def __init__(self) -> None:
        self._is_open = False
        self._last: tuple[Tensor, Hashable, Any, Tensor | None] | None = None

    def install(self, parent: nn.Module) -> None:
        """Remember inputs during the calls of ``parent``."""
        parent.register_forward_pre_hook(self._begin)
        parent.register_forward_hook(self._end, always_call=True)

    def get(self, x: Tensor, kind: Hashable, function: Callable[[Tensor, Tensor | None], Result]) -> Result:
        """Return ``function(x, out)``, ``out`` being memory for the result or None.

        It is not computed again for the same unchanged tensor and an equal ``kind``. The result is good until the next
        call of any SharedInput of this thread.
        """
        if not self._is_open:
            return function(x, None)
        key = (kind, torch.is_grad_enabled(), x.requires_grad, x.data_ptr(), 0 if x.is_inference() else x._version)
        last = self._last
        if last is not None and last[0] is x and last[1] == key and (last[3] is None or _workspace.borrower is self):
            return last[2]
        out = _workspace.lend(self, x)
        result = function(x, out)
        self._last = (x, key, result, out)
        return result

    def _begin(self, *_: Any) -> None:
        # Traced code quantizes for each layer: a trace sees no in-place changes of x.
        self._set(is_open=not torch.jit.is_tracing())  # pyright: ignore[reportPrivateImportUsage]

    def _end(self, *_: Any) -> None:
        self._set(is_open=False)

    def _set(self, *, is_open: bool) -> None:
        if not torch.compiler.is_compiling():
            self._is_open, self._last = is_open, None

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedInput, ()  # a copy begins empty; copies of layers that share one share one
