"""Modules that multiply by parameters of their own, experts and routers, computed with quantized operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mxlab.errors import ConversionError
from mxlab.model.nn.forward import Inside
from mxlab.model.nn.mark import Mark
from mxlab.model.nn.operands import LinearQuantizer
from mxlab.model.nn.phase import PassPhase
from mxlab.model.nn.products import ParameterProducts
from mxlab.recipe.rule import Phase

Quantizers = Mapping[Phase, LinearQuantizer]


class ExpertsQuantizer:
    """Takes the place of the forward of an experts module, or of a router, and quantizes its products' operands.

    Weights are put on the grid once, in place, in evaluation; one that is trained, or has changed since, or has a
    format of its own for each phase, is quantized on the fly. ``weights`` names all parameters that the module
    multiplies by, in the order in which it does; they have the axis they are summed over last, or (``is_transposed``)
    last but one.
    """

    def __init__(
        self, name: str, module: nn.Module, weights: tuple[str, ...], is_transposed: bool, phase: PassPhase
    ) -> None:
        self._name, self._module, self._weights, self._phase = name, module, weights, phase
        self._axis = -2 if is_transposed else -1
        self._quantizers: dict[str, Quantizers] = {}
        self._frozen: dict[str, Mark | int] = {}  # in a copy of the module, a checksum of what was frozen
        Inside(module, self).install()
        module.register_load_state_dict_post_hook(self._forget)

    def add(self, weight: str, quantizers: Quantizers) -> None:
        """Quantize the projection of that parameter."""
        self._quantizers[weight] = quantizers

    def freeze(self) -> None:
        """Put the weights on the grid, in place, those that can be."""
        for name, quantizers in self._quantizers.items():
            weight = getattr(self._module, name)
            is_trained = self._module.training and weight.requires_grad
            if is_trained or weight.is_meta or len({q.weight_kind for q in quantizers.values()}) > 1:
                continue
            with torch.no_grad():
                weight.copy_(quantizers["prefill"].on_weight(weight, self._axis))
            self._frozen[name] = Mark(weight)

    def compute(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """The module's output, its operands quantized.

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
        if name not in self._quantizers:
            return x
        mx = self._quantizers[name][self._phase.current]
        if operand == "input":
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
            mark = Mark(weight) if _checksum(weight) == mark else None
        if mark is None or not mark.is_of(weight):
            del self._frozen[name]
            return False
        self._frozen[name] = mark
        return True

    def _forget(self, *_: Any) -> None:
        """Weights were loaded: they are not on the grid."""
        self._frozen.clear()

    def __getstate__(self) -> dict[str, Any]:
        frozen = {name: _checksum(getattr(self._module, name)) for name in list(self._frozen) if self._is_frozen(name)}
        return {**self.__dict__, "_frozen": frozen}


def _checksum(weight: Tensor) -> int:
    return 0 if weight.is_meta else int(weight.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64))
