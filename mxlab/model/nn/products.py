"""See the matmuls that a module's forward computes, whatever it computes them with.

A :class:`torch.overrides.TorchFunctionMode` sees every torch function while it is entered. So a role inside an
attention or inside experts needs no rewritten forward, and a module computes as it always did but for the operand that
is rounded.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverloadPacket
from torch.overrides import TorchFunctionMode

# Rounds the operand of that role along that axis.
Round = Callable[[str, Tensor, int], Tensor]

_BMMS = (torch.bmm, Tensor.bmm)
_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, *_BMMS)
_ADDED_MATMULS = (torch.baddbmm, Tensor.baddbmm)
_SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)
_GROUPED = tuple(f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f is not None)

_FALLBACK = "grouped_mm_fallback"  # transformers' own operator


class _Entered(threading.local):
    """The products that the present thread looks at, outermost first."""

    def __init__(self) -> None:
        self.stack: list[AttentionProducts] = []


_entered = _Entered()


@contextmanager
def unseen() -> Iterator[None]:
    """Leave the matmuls alone that a module inside an attention computes: they are none of the attention's own."""
    present = [(products, products.is_paused) for products in _entered.stack[-1:]]
    for products, _ in present:
        products.is_paused = True
    try:
        yield
    finally:
        for products, was_paused in present:
            products.is_paused = was_paused


class AttentionProducts(TorchFunctionMode):
    """Rounds the query, what goes into the softmax, and the probabilities, in one call of an attention.

    The matmul before the softmax is QKᵀ, the one after it PV; a fused attention shows its query only. ``seen`` counts
    the operands met, by role. Where ``with_keys``, K and V are met here as well, rather than on their way to a cache.
    """

    def __init__(self, round: Round, seen: Counter[str], with_keys: bool = False) -> None:
        super().__init__()
        self.is_paused = False
        self._round = round
        self._seen = seen
        self._with_keys = with_keys

    def __enter__(self) -> Any:
        _entered.stack.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _entered.stack.pop()
        super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        return func(*args, **given) if self.is_paused else self._call(func, args, given)

    def _call(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func is F.scaled_dot_product_attention:
            args, kwargs = self._with(args, kwargs, 0, "query", "q")
            args, kwargs = self._with_key(args, kwargs, 1, "key", "k")
            args, kwargs = self._with_key(args, kwargs, 2, "value", "v")
        elif func in _MATMULS or func in _ADDED_MATMULS:
            first, name = (1, "batch1") if func in _ADDED_MATMULS else (0, "input")
            other = "batch2" if func in _ADDED_MATMULS else "mat2" if func in _BMMS else "other"
            roles = ("p", "v") if self._seen["softmax"] else ("q", "k")
            args, kwargs = self._with(args, kwargs, first, name, roles[0])
            # The blocks of both run along head_dim, which is the last axis of V but the last but one of Kᵀ.
            args, kwargs = self._with_key(args, kwargs, first + 1, other, roles[1], -1 if roles[1] == "v" else -2)
        elif func in _SOFTMAXES:
            args, kwargs = self._with(args, kwargs, 0, "input", "softmax")
        return func(*args, **kwargs)

    def _with(self, args: tuple, kwargs: dict, index: int, name: str, role: str, axis: int = -1) -> tuple[tuple, dict]:
        self._seen[role] += 1
        return replaced(args, kwargs, index, name, lambda x: self._round(role, x, axis))

    def _with_key(self, args: tuple, kwargs: dict, index: int, name: str, role: str, axis: int = -1) -> tuple:
        return self._with(args, kwargs, index, name, role, axis) if self._with_keys else (args, kwargs)


@dataclass(frozen=True)
class ProductOperand:
    """One operand of a product with a parameter.

    Attributes:
        is_weight: it is the parameter, or slices of it, rather than what that is multiplied by.
        product: which of the module's projections it belongs to.
        tensor: the operand.
        axis: the one that the product sums over.
        ends: (experts,), where the rows of each expert end, in a grouped product; else None.
    """

    is_weight: bool
    product: int
    tensor: Tensor
    axis: int
    ends: Tensor | None = None


class ParameterProducts(TorchFunctionMode):
    """Rounds both operands of the products in one call of a module that multiplies by parameters of its own.

    Whichever way transformers computes a mixture of experts (expert by expert, batched or grouped), its ``count``
    projections take turns.
    """

    def __init__(self, round: Callable[[ProductOperand], Tensor], count: int) -> None:
        super().__init__()
        self.seen = 0
        self._round = round
        self._count = count

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_grouped = func in _GROUPED or (isinstance(func, OpOverloadPacket) and func.__name__ == _FALLBACK)
        if func is F.linear:
            args = self._pair(args, inputs=0, input_axis=-1, weight_axis=-1)
        elif is_grouped:
            ends = kwargs["offs"] if "offs" in kwargs else args[2]
            args = self._pair(args, inputs=0, input_axis=-1, weight_axis=-2, ends=ends)
        elif func in _BMMS and args[0].shape[-2] == 1:  # (S, 1, in) @ (S, in, out)
            args = self._pair(args, inputs=0, input_axis=-1, weight_axis=-2)
        elif func in _BMMS:  # (S, out, in) @ (S, in, 1)
            args = self._pair(args, inputs=1, input_axis=-2, weight_axis=-1)
        elif func in _MATMULS:  # (tokens, in) @ (in, out)
            args = self._pair(args, inputs=0, input_axis=-1, weight_axis=-2)
        return func(*args, **kwargs)

    def _pair(
        self, args: tuple, inputs: int, input_axis: int, weight_axis: int, ends: Tensor | None = None
    ) -> tuple[Any, ...]:
        product = self.seen % self._count
        self.seen += 1
        pair = list(args)
        pair[inputs] = self._round(ProductOperand(False, product, pair[inputs], input_axis, ends))
        pair[1 - inputs] = self._round(ProductOperand(True, product, pair[1 - inputs], weight_axis, ends))
        return tuple(pair)


def replaced(
    args: tuple, kwargs: dict[str, Any], index: int, name: str, function: Callable[[Any], Any]
) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments of a call with one of them, given by place or by name, passed through ``function``."""
    if name in kwargs:
        return args, {**kwargs, name: function(kwargs[name])}
    return (*args[:index], function(args[index]), *args[index + 1 :]), kwargs
