"""A mixture of experts whose weights are 3-D parameters, computed with quantized operands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mxlab.errors import ConversionError
from mxlab.nn.phase import PassPhase
from mxlab.nn.products import ExpertProducts
from mxlab.nn.quantizer import LinearQuantizer
from mxlab.rules import Phase

Quantizers = Mapping[Phase, LinearQuantizer]


class ExpertsQuantizer:
    """Forward hooks on an experts module that quantize the operands of its two projections.

    Weights are put on the grid once, in place, in evaluation; one that is trained, or has changed since, or has a
    format of its own for each phase, is quantized on the fly. Weights have the axis they are summed over last, or
    (``is_transposed``) last but one.
    """

    def __init__(self, name: str, experts: nn.Module, is_transposed: bool, phase: PassPhase) -> None:
        self._name, self._experts, self._phase = name, experts, phase
        self._axis = -2 if is_transposed else -1
        self._quantizers: dict[str, Quantizers] = {}
        self._frozen: dict[str, tuple[int, int]] = {}
        self._calls: list[ExpertProducts] = []

    def add(self, weight: str, quantizers: Quantizers) -> None:
        """Quantize the projection of that parameter; the first call attaches the hooks."""
        if not self._quantizers:
            self._experts.register_forward_pre_hook(self._enter)
            self._experts.register_forward_hook(self._leave, always_call=True)
        self._quantizers[weight] = quantizers

    def freeze(self) -> None:
        """Put the weights on the grid, in place, those that can be."""
        for name, quantizers in self._quantizers.items():
            weight = getattr(self._experts, name)
            is_trained = self._experts.training and weight.requires_grad
            if is_trained or weight.is_meta or len({q.weight_kind for q in quantizers.values()}) > 1:
                continue
            with torch.no_grad():
                weight.copy_(quantizers["prefill"].on_weight(weight, self._axis))
            self._frozen[name] = _fingerprint(weight)

    def _enter(self, *_: Any) -> None:
        frozen = {name for name, mark in self._frozen.items() if mark == _fingerprint(getattr(self._experts, name))}
        names = [name for name in ("gate_up_proj", "up_proj", "down_proj") if hasattr(self._experts, name)]

        def round(operand: str, is_second: bool, x: Tensor, axis: int) -> Tensor:
            name = names[is_second]
            if name not in self._quantizers:
                return x
            mx = self._quantizers[name][self._phase.current]
            if operand == "input":
                return mx.on_activation(x, axis=axis)
            return x if name in frozen else mx.on_weight(x, axis)

        self._calls.append(ExpertProducts(round))
        self._calls[-1].__enter__()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        products = self._calls.pop()
        products.__exit__(None, None, None)
        if products.seen % 2 or (not products.seen and isinstance(output, Tensor) and output.numel()):
            raise ConversionError(
                f"{self._name} computes its products where mxlab cannot see them: use "
                "model.set_experts_implementation('eager')"
            )


def _fingerprint(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version
