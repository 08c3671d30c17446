"""Quantize weights once, in place where that can be, and again when they have changed."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mxlab.model.nn.operands import LinearOperands
from mxlab.recipe import Phase


class TensorVersion:
    """Recognises a weight as long as it is the same tensor and has not been written to.

    Torch does not count writes through ``weight.data``, nor any to a tensor of inference mode.
    """

    __slots__ = ("_version", "_weight", "address")

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._version, self.address = weakref.ref(weight), _version(weight), weight.data_ptr()

    def is_of(self, weight: Tensor) -> bool:
        """Return whether ``weight`` is the tensor that was remembered, with the values it had; it may have moved."""
        return self._weight() is weight and self._version == _version(weight)

    def is_in_place(self, weight: Tensor) -> bool:
        """Return the same, and whether its memory is where it was: not after a move, a cast or new ``data``."""
        return self.is_of(weight) and self.address == weight.data_ptr()


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


class QuantizedWeight(nn.Module):
    """The half of a quantized layer that keeps its weight quantized; see :class:`mxlab.model.nn.linear.QuantizedLayer`.

    The weight is quantized in place: it is *frozen*. Where it cannot be (it is tied to another module's, or the phases
    of generation want different formats) a quantized copy is kept for each format, and the weight stays unchanged.
    """

    weight: nn.Parameter
    input_axis: int  # of the weight: the one the matmul sums over, along which its blocks lie
    operands: Mapping[Phase, LinearOperands]
    is_in_place: bool
    _is_master: bool
    _frozen_at: TensorVersion | None
    _watched: int | None
    _copies: dict[str, tuple[TensorVersion, Tensor]]

    def _prepare(self, operands: Mapping[Phase, LinearOperands], is_tied: bool) -> None:
        """Set up a module that has just become of this class."""
        self.operands = operands
        self.is_in_place = not is_tied and len({o.weight_kind for o in operands.values()}) == 1
        self._is_master, self._frozen_at, self._watched, self._copies = False, None, None, {}

    def freeze(self) -> None:
        """Quantize the weight in place, unless it is frozen, trained, tied, on the meta device, or offloaded."""
        if (
            not self.is_in_place
            or self._is_master
            or self.is_frozen
            or self._is_in_training
            or self.weight.is_meta
            or self._is_offloaded
        ):
            return
        with torch.no_grad():
            self.weight.copy_(self._weight_operands.on_weight(self.weight, self.input_axis))
        self._frozen_at = TensorVersion(self.weight)

    @property
    def is_frozen(self) -> bool:
        """Whether the weight was quantized in place and has not changed since."""
        return self._frozen_at is not None and self._frozen_at.is_in_place(self.weight)

    @property
    def _weight_operands(self) -> LinearOperands:
        """What quantizes the weight in place: both phases treat it alike."""
        return self.operands["prefill"]

    @property
    def _is_in_training(self) -> bool:
        return self.training and self.weight.requires_grad

    @property
    def _is_offloaded(self) -> bool:
        hook = getattr(self, "_hf_hook", None)
        return any(getattr(h, "offload", False) for h in getattr(hook, "hooks", [hook]))

    def _quantized_weight(self, operands: LinearOperands) -> Tensor:
        """Return the weight as the matmul sees it under ``operands``; its shape and dtype."""
        if torch.compiler.is_compiling():
            # Neither the version nor the address of a weight can be traced. The marks are guards of the compiled code.
            if self._is_in_training and torch.is_grad_enabled():
                self._is_master = True
            is_plain = self._frozen_at is not None and not self._is_master and not self._is_in_training
            return self.weight if is_plain else operands.on_weight(self.weight, self.input_axis)
        if torch.is_grad_enabled() and self.weight.requires_grad:
            self._is_master |= self.training
            self._watch_for_gradients()
        if not self.is_frozen:
            self.freeze()
            if not self.is_frozen:
                return self._quantized_copy(operands)
        return self.weight

    def _quantized_copy(self, operands: LinearOperands) -> Tensor:
        """Return the quantized weight where the weight itself stays unchanged."""
        passes_gradient = torch.is_grad_enabled() and self.weight.requires_grad and (self._is_master or self.training)
        if self.is_in_place or passes_gradient or self._is_offloaded:
            return operands.on_weight(self.weight, self.input_axis)
        made_from, copy = self._copies.get(operands.weight_kind, (None, None))
        if copy is None or made_from is None or not made_from.is_in_place(self.weight):
            with torch.no_grad():
                copy = operands.on_weight(self.weight.detach(), self.input_axis)
            self._copies[operands.weight_kind] = TensorVersion(self.weight), copy
        return copy

    def _watch_for_gradients(self) -> None:
        """Notice a training step in evaluation mode, before the next call would undo it."""
        if self._watched != id(self.weight) and self.weight.is_leaf:
            self.weight.register_post_accumulate_grad_hook(self._got_gradient)
            self._watched = id(self.weight)

    def _got_gradient(self, _: Tensor) -> None:
        self._is_master = True

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        frozen = self.is_frozen
        super()._apply(fn, recurse)
        # The same values elsewhere: quantizing them again would move them under numerics that are not idempotent.
        self._frozen_at = TensorVersion(self.weight) if frozen else None
        self._copies.clear()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._frozen_at = None
        self._copies.clear()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._weight_operands.weight_is_idempotent:
            self._frozen_at = None  # quantizing again changes nothing, but for writes that went unnoticed
        self.freeze()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_frozen_at": self.is_frozen, "_watched": None, "_copies": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._frozen_at = TensorVersion(self.weight) if state["_frozen_at"] else None
