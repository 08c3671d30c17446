"""A linear layer whose operands are rounded to MX formats."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mxlab.formats import MXFormat, Numerics, Rounding, elementwise_format
from mxlab.nn.sharing import SharedInput
from mxlab.numerics import DTYPES, is_lossless, quantize, round_elementwise
from mxlab.recipe import Elementwise


@dataclass(frozen=True)
class LinearQuantizer:
    """What a linear layer does to its operands and its result.

    The order is microxcaling's: round element-wise, quantize along the inner dimension, multiply, round the result,
    add the rounded bias, round again.
    """

    weight: MXFormat | None
    activation: MXFormat | None
    elementwise: Elementwise
    numerics: Numerics
    # The dtypes that element-wise rounding leaves as they are.
    untouched: tuple[torch.dtype, ...] = field(init=False)
    # Equal where the same input becomes the same quantized input; short, as it is compared at every call.
    input_kind: str = field(init=False)

    def __post_init__(self) -> None:
        e = self.elementwise
        object.__setattr__(self, "input_kind", f"{self.activation} {self.numerics} {e}")
        element = elementwise_format(e.bfloat, e.fp)
        exactly = self.numerics == "exact" and e.subnormals
        untouched = tuple(t for t in DTYPES if element is None or (exactly and is_lossless(element, t)))
        object.__setattr__(self, "untouched", untouched)

    def on_weight(self, weight: Tensor) -> Tensor:
        """The weight [out, in] as the matmul sees it."""
        return self._quantized(self._rounded(weight, self.elementwise.weight_rounding), self.weight)

    def on_activation(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The input [..., in] as the matmul sees it; in ``out``, where one is given and there is something to write."""
        return self._quantized(self._rounded(x, self.elementwise.output_rounding), self.activation, out)

    def on_bias(self, bias: Tensor) -> Tensor:
        """The bias [out] as it is added."""
        return self._rounded(bias, self.elementwise.weight_rounding)

    def on_output(self, y: Tensor) -> Tensor:
        """The result of the matmul, and of adding the bias, [..., out]."""
        return self._rounded(y, self.elementwise.output_rounding)

    @property
    def shares_input(self) -> bool:
        """Whether layers with equal quantizers may share one quantized input: not if each draws its own noise."""
        fmt = self.activation
        return "dither" not in (fmt and fmt.rounding, self.elementwise.output_rounding)

    def _quantized(self, x: Tensor, fmt: MXFormat | None, out: Tensor | None = None) -> Tensor:
        return x if fmt is None else quantize(x, fmt, numerics=self.numerics, out=out)

    def _rounded(self, x: Tensor, rounding: Rounding) -> Tensor:
        if x.dtype in self.untouched:
            return x
        e = self.elementwise
        return round_elementwise(
            x, bfloat=e.bfloat, fp=e.fp, rounding=rounding, subnormals=e.subnormals, numerics=self.numerics
        )


class MxLinear(nn.Linear):
    """A ``torch.nn.Linear`` that computes with quantized operands; made by :meth:`convert`.

    In evaluation the weight itself is put on the grid, once, in place, and again when it has changed: the first time
    the layer runs or its state is read. A weight that is trained (the layer ran in training mode, or the weight got a
    gradient) is the full-precision master from then on, in evaluation too: it is quantized on the fly, gradients pass
    straight through, and what is saved is the master. So call ``train()`` before the first step, while the weight is
    still what was loaded. A weight that accelerate offloaded is quantized on the fly, too.

    Torch does not count writes through ``weight.data``: such a change is seen when the state is read, but not by the
    forward pass. Write to the weight itself, under ``torch.no_grad()``. Compiled code sees weights that are loaded, and
    training, but no other writes: call the layer once outside it, and compile again.
    """

    mx: LinearQuantizer
    shared: SharedInput
    _is_master: bool
    _frozen_at: tuple[int, int] | None
    _watched: int | None

    @staticmethod
    def convert(linear: nn.Linear, quantizer: LinearQuantizer, shared: SharedInput | None = None) -> MxLinear:
        """Turn ``linear`` itself into an MxLinear: its parameters, hooks and places in the model stay as they are.

        Layers with one ``shared`` quantize an input that is common to them once.
        """
        linear.__class__ = MxLinear
        assert isinstance(linear, MxLinear)
        linear.mx, linear.shared = quantizer, shared or SharedInput()
        linear._is_master, linear._frozen_at, linear._watched = False, None, None
        for name in _own_forwards(linear):
            setattr(linear, name, MethodType(MxLinear.forward, linear))
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        y = self.mx.on_output(F.linear(self._grid_activation(x), self._grid_weight()))
        if self.bias is not None:
            y = self.mx.on_output(y + self.mx.on_bias(self.bias))
        return y

    def freeze(self) -> None:
        """Put the weight on the grid, in place, unless it is there, is on the meta device, offloaded, or trained."""
        if self._is_master or self.is_frozen or self._is_in_training or self.weight.is_meta or self._is_offloaded:
            return
        with torch.no_grad():
            self.weight.copy_(self.mx.on_weight(self.weight))
        self._frozen_at = self._fingerprint()

    @property
    def is_frozen(self) -> bool:
        """Whether the weight was put on the grid and has not changed since."""
        return self._frozen_at is not None and self._frozen_at == self._fingerprint()

    @property
    def _is_in_training(self) -> bool:
        return self.training and self.weight.requires_grad

    @property
    def _is_offloaded(self) -> bool:
        hook = getattr(self, "_hf_hook", None)
        return any(getattr(h, "offload", False) for h in getattr(hook, "hooks", [hook]))

    def extra_repr(self) -> str:  # noqa: D102
        return f"{super().extra_repr()}, weight={self.mx.weight}, activation={self.mx.activation}, {self.mx.numerics}"

    def _grid_activation(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not self.mx.shares_input:
            return self.mx.on_activation(x)
        return self.shared.get(x, self.mx.input_kind, self.mx.on_activation)

    def _grid_weight(self) -> Tensor:
        if torch.compiler.is_compiling():
            # Neither the version nor the address of a weight can be traced. The marks are guards of the compiled code.
            if self._is_in_training and torch.is_grad_enabled():
                self._is_master = True
            is_plain = self._frozen_at is not None and not self._is_master and not self._is_in_training
            return self.weight if is_plain else self.mx.on_weight(self.weight)
        if torch.is_grad_enabled() and self.weight.requires_grad:
            self._is_master |= self.training
            self._watch_for_gradients()
        if not self.is_frozen:
            self.freeze()
            if not self.is_frozen:
                return self.mx.on_weight(self.weight)
        return self.weight

    def _watch_for_gradients(self) -> None:
        """Notice a training step in evaluation mode, before the next call would undo it."""
        if self._watched != id(self.weight) and self.weight.is_leaf:
            self.weight.register_post_accumulate_grad_hook(self._got_gradient)
            self._watched = id(self.weight)

    def _got_gradient(self, _: Tensor) -> None:
        self._is_master = True

    def _fingerprint(self) -> tuple[int, int]:
        # In-place changes raise the version; loading, casting and moving replace the storage.
        weight = self.weight
        return weight.data_ptr(), 0 if weight.is_inference() else weight._version

    def _apply(self, fn: Any, recurse: bool = True) -> MxLinear:
        frozen = self.is_frozen
        super()._apply(fn, recurse)
        # The same values elsewhere: quantizing them again would move them under numerics that are not idempotent.
        self._frozen_at = self._fingerprint() if frozen else None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._frozen_at = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.mx.numerics == "exact":
            self._frozen_at = None  # quantizing again changes nothing, but for writes that went unnoticed
        self.freeze()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_frozen_at": self.is_frozen, "_watched": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._frozen_at = self._fingerprint() if state["_frozen_at"] else None


def is_convertible(linear: nn.Linear) -> bool:
    """Whether :meth:`MxLinear.convert` takes effect: no other code than accelerate's replaced the layer's forward."""
    return "forward" not in vars(linear) or bool(_own_forwards(linear))


def _own_forwards(linear: nn.Linear) -> list[str]:
    """Where accelerate's hooks, in place or taken off again, keep the layer's own forward as an attribute of it."""
    return [
        name
        for name in ("forward", "_old_forward")
        if getattr(vars(linear).get(name), "__func__", None) is nn.Linear.forward
    ]
