"""Weights on the grid: quantized once, in place where that can be, and again when they have changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mxlab.model.nn.mark import Mark
from mxlab.model.nn.operands import LinearQuantizer
from mxlab.recipe.rule import Phase


class OnGrid(nn.Module):
    """The half of a quantized layer that keeps its weight on the grid; see :class:`mxlab.model.nn.linear.MxLinear`.

    The weight is put on the grid in place. Where it cannot be (it is tied to another module's, or the phases of
    generation want different formats) a quantized copy is kept beside it for each of them, and the weight stays.
    """

    weight: nn.Parameter
    input_axis: int  # of the weight: the one the matmul sums over
    quantizers: Mapping[Phase, LinearQuantizer]
    in_place: bool
    _is_master: bool
    _frozen_at: Mark | None
    _watched: int | None
    _copies: dict[str, tuple[Mark, Tensor]]

    def _start(self, quantizers: Mapping[Phase, LinearQuantizer], is_tied: bool) -> None:
        """Set up a module that has just become of this class."""
        self.quantizers = quantizers
        self.in_place = not is_tied and len({q.weight_kind for q in quantizers.values()}) == 1
        self._is_master, self._frozen_at, self._watched, self._copies = False, None, None, {}

    def freeze(self) -> None:
        """Put the weight on the grid, in place, unless it is there, must stay, is on the meta device, or offloaded."""
        if (
            not self.in_place
            or self._is_master
            or self.is_frozen
            or self._is_in_training
            or self.weight.is_meta
            or self._is_offloaded
        ):
            return
        with torch.no_grad():
            self.weight.copy_(self._quantizer.on_weight(self.weight, self.input_axis))
        self._frozen_at = Mark(self.weight)

    @property
    def is_frozen(self) -> bool:
        """Whether the weight was put on the grid and has not changed since."""
        return self._frozen_at is not None and self._frozen_at.is_in_place(self.weight)

    @property
    def _quantizer(self) -> LinearQuantizer:
        """Of the weight that is put on the grid in place: there is but one."""
        return self.quantizers["prefill"]

    @property
    def _is_in_training(self) -> bool:
        return self.training and self.weight.requires_grad

    @property
    def _is_offloaded(self) -> bool:
        hook = getattr(self, "_hf_hook", None)
        return any(getattr(h, "offload", False) for h in getattr(hook, "hooks", [hook]))

    def _grid_weight(self, mx: LinearQuantizer) -> Tensor:
        """The weight as the matmul sees it under ``mx``."""
        if torch.compiler.is_compiling():
            # Neither the version nor the address of a weight can be traced. The marks are guards of the compiled code.
            if self._is_in_training and torch.is_grad_enabled():
                self._is_master = True
            is_plain = self._frozen_at is not None and not self._is_master and not self._is_in_training
            return self.weight if is_plain else mx.on_weight(self.weight, self.input_axis)
        if torch.is_grad_enabled() and self.weight.requires_grad:
            self._is_master |= self.training
            self._watch_for_gradients()
        if not self.is_frozen:
            self.freeze()
            if not self.is_frozen:
                return self._apart(mx)
        return self.weight

    def _apart(self, mx: LinearQuantizer) -> Tensor:
        """The quantized weight where the weight itself stays as it is."""
        passes_gradient = torch.is_grad_enabled() and self.weight.requires_grad and (self._is_master or self.training)
        if self.in_place or passes_gradient or self._is_offloaded:
            return mx.on_weight(self.weight, self.input_axis)
        made_from, copy = self._copies.get(mx.weight_kind, (None, None))
        if copy is None or made_from is None or not made_from.is_in_place(self.weight):
            with torch.no_grad():
                copy = mx.on_weight(self.weight.detach(), self.input_axis)
            self._copies[mx.weight_kind] = Mark(self.weight), copy
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
        self._frozen_at = Mark(self.weight) if frozen else None
        self._copies.clear()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._frozen_at = None
        self._copies.clear()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._quantizer.weight_is_idempotent:
            self._frozen_at = None  # quantizing again changes nothing, but for writes that went unnoticed
        self.freeze()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_frozen_at": self.is_frozen, "_watched": None, "_copies": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._frozen_at = Mark(self.weight) if state["_frozen_at"] else None
