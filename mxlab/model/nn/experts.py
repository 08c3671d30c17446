"""Quantize the products of modules that multiply by parameters of their own: experts and routers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mxlab.errors import ConversionError
from mxlab.model.nn.forward import ForwardOverride
from mxlab.model.nn.operands import LinearOperands, Observable
from mxlab.model.nn.phase import PassPhase
from mxlab.model.nn.products import ParameterProducts
from mxlab.model.nn.weights import TensorVersion
from mxlab.recipe.rule import Phase

Operands = Mapping[Phase, LinearOperands]


class QuantizedExperts(Observable):
    """Takes the place of the forward of an experts module, or of a router, and quantizes its products' operands.

    Weights are quantized once, in place, in evaluation; one that is trained, or has changed since, or has a format of
    its own for each phase, is quantized on the fly.

    Args:
        name: qualified name of the module, for errors.
        module: the module.
        weights: all parameters that it multiplies by, in the order in which it does: [experts, out, in], or where
            ``is_transposed`` [experts, in, out]; a router's is [experts, in].
        is_transposed: whether the products sum over the last axis but one.
        phase: which phase a pass is in.
    """

    def __init__(
        self, name: str, module: nn.Module, weights: tuple[str, ...], is_transposed: bool, phase: PassPhase
    ) -> None:
        self._name, self._module, self._weights, self._phase = name, module, weights, phase
        self._axis = -2 if is_transposed else -1
        self._operands: dict[str, Operands] = {}
        self._frozen: dict[str, TensorVersion | int] = {}  # in a copy of the module, a checksum of what was frozen
        self._override = ForwardOverride(module, self)
        module.register_load_state_dict_post_hook(self._forget)

    def install(self) -> None:
        """Quantize the products of the module, from now on."""
        self._override.install()

    def add(self, weight: str, operands: Operands) -> None:
        """Quantize the operands of the product with the parameter called ``weight``."""
        self._operands[weight] = operands

    def freeze(self) -> None:
        """Quantize the weights in place, as far as they can be."""
        for name, operands in self._operands.items():
            weight = getattr(self._module, name)
            is_trained = self._module.training and weight.requires_grad
            if is_trained or weight.is_meta or len({o.weight_kind for o in operands.values()}) > 1:
                continue
            with torch.no_grad():
                weight.copy_(operands["prefill"].on_weight(weight, self._axis))
            self._frozen[name] = TensorVersion(weight)

    def compute(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output, its operands quantized.

        Raises:
            ConversionError: the module multiplies in a way that was not seen.
        """
        products = ParameterProducts(self._round, len(self._weights))
        with products:
            output = forward(*args, **kwargs)
        is_nothing = isinstance(output, Tensor) and not output.numel()
        if products.seen % len(self._weights) or not (products.seen or is_nothing):
            raise ConversionError(
                f"{self._name} computes its products where mxlab cannot see them: use "
                "model.set_experts_implementation('eager'), or leave it out"
            )
        return output

    def _round(self, operand: str, product: int, x: Tensor, axis: int) -> Tensor:
        name = self._weights[product]
        if name not in self._operands:
            return x
        mx = self._operands[name][self._phase.current]
        if operand == "input":
            self._show(name, "activation", x, axis)
            return mx.on_activation(x, axis=axis)
        return x if self._is_frozen(name) else mx.on_weight(x, axis)

    def _is_frozen(self, name: str) -> bool:
        mark, weight = self._frozen.get(name), getattr(self._module, name)
        if mark is None:
            return False
        if torch.compiler.is_compiling():  # there, neither versions nor values can be compared
            if self._module.training and weight.requires_grad and torch.is_grad_enabled():
                del self._frozen[name]
            return name in self._frozen
        if isinstance(mark, int):
            mark = TensorVersion(weight) if _checksum(weight) == mark else None
        if mark is None or not mark.is_of(weight):
            del self._frozen[name]
            return False
        self._frozen[name] = mark
        return True

    def _forget(self, *_: Any) -> None:
        """Forget what is frozen: weights were loaded, which are not quantized."""
        self._frozen.clear()

    def __getstate__(self) -> dict[str, Any]:
        frozen = {name: _checksum(getattr(self._module, name)) for name in list(self._frozen) if self._is_frozen(name)}
        return {**self.__dict__, "_frozen": frozen}


def _checksum(weight: Tensor) -> int:
    return 0 if weight.is_meta else int(weight.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64))
