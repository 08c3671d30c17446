"""Quantize weights once, and again when they have changed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mxlab.errors import ConversionError
from mxlab.model.nn.operands import LinearOperands
from mxlab.numerics.fingerprints import fingerprint, fingerprints
from mxlab.recipe import Phase
from mxlab.recipe.transform import Transform, Wush


class TensorVersion:
    """Recognises a weight as long as it is the same tensor and has not been written to, as far as torch counts writes.

    Torch does not count writes through ``weight.data`` or a NumPy view, nor any to a tensor of inference mode. The
    fingerprint tells of those; it is compared where the counters differ, and by :meth:`verify`.
    """

    __slots__ = ("_address", "_version", "_weight", "dtype", "fingerprint")

    def __init__(self, weight: Tensor) -> None:
        self.dtype, self.fingerprint = weight.dtype, fingerprint(weight)
        self._note(weight)

    @classmethod
    def recorded(cls, dtype: torch.dtype, number: int) -> TensorVersion:
        """Return what recognises the values of a weight by the fingerprint it had in ``dtype``."""
        made = cls.__new__(cls)
        made.dtype, made.fingerprint = dtype, number
        made._note(None)
        return made

    def is_of(self, weight: Tensor) -> bool:
        """Return whether ``weight`` has the values that were remembered."""
        is_same = self._weight is not None and self._weight() is weight
        if is_same and self._version == _version(weight) and self._address == weight.data_ptr():
            return True
        return self.verify(weight)

    def verify(self, weight: Tensor, number: int | None = None) -> bool:
        """Return the same by the values themselves, which takes as long as reading them.

        Values that were cast to another dtype are the same if that changed none. ``number`` is the fingerprint of
        ``weight``, if that is known.
        """
        is_same = self._has_values_of(weight, number)
        self._note(weight if is_same else None)
        return is_same

    def _has_values_of(self, weight: Tensor, number: int | None) -> bool:
        kept = weight.detach()
        if weight.dtype != self.dtype:
            kept = kept.to(self.dtype)
            if not torch.equal(kept.to(weight.dtype), weight.detach()):
                return False
            number = None
        return (fingerprint(kept) if number is None else number) == self.fingerprint

    def _note(self, weight: Tensor | None) -> None:
        """Remember the tensor that has the values; None: that which had them has others."""
        self._weight: Any = None if weight is None else weakref.ref(weight)
        self._version, self._address = (-1, 0) if weight is None else (_version(weight), weight.data_ptr())

    def __reduce__(self) -> tuple[Any, ...]:
        return TensorVersion.recorded, (self.dtype, self.fingerprint)  # a copy knows the values, not the tensor


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def verify(versions: Iterable[tuple[TensorVersion, Tensor]]) -> None:
    """Notice changes of weights that torch does not count: :meth:`TensorVersion.is_of` knows of them from then on."""
    present = [(version, weight) for version, weight in versions if not weight.is_meta]
    for (version, weight), number in zip(present, fingerprints([weight for _, weight in present]), strict=True):
        version.verify(weight, number)


_CHANGED = (
    "a weight was written to after it was transformed and quantized in place, so that it is neither what it was nor a "
    "weight in full precision: change the model before mxlab converts it, or load the new weights by load_state_dict"
)
_TRAINED = (
    "a weight that is to be trained was transformed and quantized in place: call train() before mxlab converts the "
    "model, or leave transform out of the recipe"
)


class FrozenWeight:
    """Knows of one weight whether it is *frozen*: its own values are quantized, so that products need not do it.

    A weight that is trained, in training mode or by a gradient that arrives, is the full-precision *master* from then
    on and is not frozen any more.

    Args:
        operands: by phase, what quantizes the weight.
        axis: the axis that the product sums over, along which the blocks run.
        is_tied: another module uses the weight, too.
    """

    def __init__(self, operands: Mapping[Phase, LinearOperands], axis: int, is_tied: bool = False) -> None:
        self._operands, self._axis = operands["prefill"], axis
        # A tied weight, and one with a format for each phase, stays unchanged.
        self.is_possible = not is_tied and len({o.weight_kind for o in operands.values()}) == 1
        self.is_master = False
        self._mark: TensorVersion | None = None
        self._watched: int | None = None

    def settle(self, weight: nn.Parameter, is_training: bool, is_kept: bool = False) -> bool:
        """Freeze the weight if that can be, before a product; return whether it is frozen.

        Args:
            weight: the weight.
            is_training: its module is in training mode.
            is_kept: it must not be written to, such as one that accelerate offloaded.
        """
        if torch.compiler.is_compiling():
            return self._is_frozen_in_trace(weight, is_training)
        if torch.is_grad_enabled() and weight.requires_grad:
            if is_training and self._mark is not None and self._operands.weight_transform is not None:
                raise ConversionError(_TRAINED)
            self.is_master |= is_training
            self._watch_for_gradients(weight)
        if self.is_frozen(weight):
            return True
        self.freeze(weight, is_training, is_kept)
        return self._mark is not None

    def freeze(self, weight: nn.Parameter, is_training: bool = False, is_kept: bool = False) -> None:
        """Quantize the weight, unless it is frozen, trained, tied, on the meta device, or to be kept.

        The values go to memory of their own: whoever shares the weight's memory keeps the full-precision ones.
        """
        is_trained = self.is_master or (is_training and weight.requires_grad)
        if not self.is_possible or is_trained or is_kept or weight.is_meta or self.is_frozen(weight):
            return
        with torch.inference_mode(weight.is_inference()), torch.no_grad():
            weight.data = self._operands.on_weight(weight.detach(), self._axis)
        self.mark(weight)

    def freeze_as(self, weight: nn.Parameter, values: Tensor) -> None:
        """Take ``values``, of the shape of the weight, for what it is quantized to."""
        with torch.no_grad():
            weight.data = values.contiguous().to(weight.dtype)
        self.mark(weight)

    def mark(self, weight: Tensor) -> None:
        """Take the present values for quantized ones, whatever was trained before."""
        self._mark, self.is_master = TensorVersion(weight), False

    def expect(self, version: TensorVersion) -> None:
        """Take values that ``version`` recognises for quantized ones, once the weight has them."""
        self._mark = version

    def is_frozen(self, weight: Tensor) -> bool:
        """Return whether the weight is frozen and has not changed since."""
        if weight.is_meta:  # its values are elsewhere, until accelerate brings them
            return False
        if self._mark is not None and not self._mark.is_of(weight):
            if self._operands.weight_transform is not None:
                raise ConversionError(_CHANGED)
            self._mark = None
        return self._mark is not None

    def notice_loaded(self, weight: Tensor) -> None:
        """Take values that were loaded for full-precision ones, unless they are those that were frozen."""
        if self._mark is not None and not self._mark.is_of(weight):
            self._mark = None

    @property
    def versions(self) -> list[TensorVersion]:
        """What recognises the quantized values, if the weight was frozen."""
        return [] if self._mark is None else [self._mark]

    def _is_frozen_in_trace(self, weight: nn.Parameter, is_training: bool) -> bool:
        # Neither the version nor the values of a weight can be traced. The marks are guards of the compiled code.
        is_trained = is_training and weight.requires_grad
        if is_trained and torch.is_grad_enabled():
            self.is_master = True
        return self._mark is not None and not self.is_master and not is_trained

    def _watch_for_gradients(self, weight: nn.Parameter) -> None:
        """Notice a training step in evaluation mode, before the next call would undo it."""
        if self._watched != id(weight) and weight.is_leaf:
            weight.register_post_accumulate_grad_hook(self._got_gradient)
            self._watched = id(weight)

    def _got_gradient(self, _: Tensor) -> None:
        self.is_master = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watched": None}


def make_room_for_transform(layer: Any, transform: Transform | None, axis: int) -> None:
    """Give a linear layer the buffer ``input_transform`` for a transform that is fitted, unless it has it.

    Args:
        layer: whose weight is called that.
        transform: of the layer; others than fitted ones need no room.
        axis: of the weight, the one that the product sums over.
    """
    if getattr(layer, "input_transform", None) is None:
        matrices = None
        if isinstance(transform, Wush):
            one = torch.eye(transform.size, device=layer.weight.device)
            matrices = one.repeat(layer.weight.shape[axis] // transform.size, 1, 1)
        layer.register_buffer("input_transform", matrices)


class QuantizedWeight(nn.Module):
    """The half of a quantized layer that keeps its weight quantized; see :class:`mxlab.model.nn.linear.QuantizedLayer`.

    Where the weight cannot be frozen (it is tied to another module's, or the phases of generation want different
    formats) a quantized copy is kept for each format, and the weight stays unchanged.
    """

    weight: nn.Parameter
    input_axis: int  # of the weight: the one the matmul sums over, along which its blocks run
    operands: Mapping[Phase, LinearOperands]
    frozen: FrozenWeight
    input_transform: Tensor | None  # of a transform that is fitted: the matrices of the input, [blocks, size, size]
    _copies: dict[tuple[str, torch.device, torch.dtype], tuple[TensorVersion, Tensor]]
    _numbered: tuple[tuple[int, int], int] | None

    def _prepare(self, operands: Mapping[Phase, LinearOperands], is_tied: bool) -> None:
        """Set up a module that has just become of this class."""
        self.operands = operands
        self.frozen, self._copies = FrozenWeight(operands, self.input_axis, is_tied), {}
        self._numbered = None
        make_room_for_transform(self, operands["prefill"].transform, self.input_axis)

    def _number_of_transform(self, matrices: Tensor) -> int:
        """Return a number that tells the values of the transform from others; it is kept until they change."""
        present = matrices.data_ptr(), 0 if matrices.is_inference() else matrices._version
        if self._numbered is None or self._numbered[0] != present:
            self._numbered = present, fingerprint(matrices)
        return self._numbered[1]

    def freeze(self) -> None:
        """Quantize the weight, as :meth:`FrozenWeight.freeze`."""
        self.frozen.freeze(self.weight, self.training, self._is_offloaded)

    def freeze_as(self, values: Tensor) -> None:
        """Take ``values`` [out, in] for what the weight is quantized to in the basis of its transform."""
        self.frozen.freeze_as(self.weight, values.t() if self.input_axis == 0 else values)

    def versions(self) -> list[tuple[TensorVersion, Tensor]]:
        """Return the weight beside what recognises the values that it was quantized to, or copied from."""
        copied_from = [version for version, _ in self._copies.values()]
        return [(version, self.weight) for version in (*self.frozen.versions, *copied_from)]

    @property
    def is_frozen(self) -> bool:
        """Whether the weight itself is quantized and has not changed since."""
        return self.frozen.is_frozen(self.weight)

    @property
    def _is_offloaded(self) -> bool:
        hook = vars(self).get("_hf_hook")  # getattr would search parameters and modules, at every call
        if hook is None:
            return False
        return any(getattr(h, "offload", False) for h in getattr(hook, "hooks", [hook]))

    def _quantized_weight(self, operands: LinearOperands) -> Tensor:
        """Return the weight as the matmul sees it under ``operands``; its shape and dtype."""
        if self.frozen.settle(self.weight, self.training, self._is_offloaded):
            return self.weight
        is_trained = torch.is_grad_enabled() and self.weight.requires_grad and (self.frozen.is_master or self.training)
        if torch.compiler.is_compiling() or self.frozen.is_possible or is_trained or self._is_offloaded:
            return operands.on_weight(self.weight, self.input_axis)
        return self._quantized_copy(operands)

    def _quantized_copy(self, operands: LinearOperands) -> Tensor:
        """Return the quantized weight where the weight itself stays unchanged."""
        kind = operands.weight_kind, self.weight.device, self.weight.dtype
        made_from, copy = self._copies.get(kind, (None, None))
        if copy is None or made_from is None or not made_from.is_of(self.weight):
            with torch.no_grad():
                copy = operands.on_weight(self.weight.detach(), self.input_axis)
            elsewhere = [other for other in self._copies if other[1:] != kind[1:]]
            for other in elsewhere:  # from before the layer was moved or cast
                del self._copies[other]
            self._copies[kind] = TensorVersion(self.weight), copy
        return copy

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.frozen.notice_loaded(self.weight)  # compiled code is to know at once

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        verify(self.versions())
        self.freeze()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __getstate__(self) -> dict[str, Any]:
        self.frozen.is_frozen(self.weight)  # a copy knows the values alone: what changed is to be forgotten before
        return {**self.__dict__, "_copies": {}}
