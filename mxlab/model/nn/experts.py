"""Quantize the products of modules that multiply by parameters of their own: experts and routers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mxlab.errors import ConversionError
from mxlab.model.nn.forward import ForwardOverride
from mxlab.model.nn.operands import LinearOperands, Observable
from mxlab.model.nn.phase import PassPhase
from mxlab.model.nn.products import ParameterProducts, ProductOperand
from mxlab.model.nn.weights import FrozenWeight, TensorVersion
from mxlab.recipe.rule import Phase

Operands = Mapping[Phase, LinearOperands]
# Told of the input of a product with the weight of one expert, before it is quantized, and of that weight.
Chooser = Callable[[Tensor, Tensor], None]


class QuantizedExperts(Observable):
    """Takes the place of the forward of an experts module, or of a router, and quantizes its products' operands.

    A tensor, where a scale belongs to one, is the weight of one expert, and the tokens of a batch that go to one,
    however transformers computes them.

    Weights are quantized once, in evaluation (:class:`mxlab.model.nn.weights.FrozenWeight`). One that is trained, or
    has a format of its own for each phase, is quantized on the fly.

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
        self._frozen: dict[str, FrozenWeight] = {}
        self._choosers: dict[str, Chooser] = {}
        self._last_input: Tensor | None = None
        self._override = ForwardOverride(module, self)
        module.register_load_state_dict_post_hook(self._loaded)

    def install(self) -> None:
        """Quantize the products of the module, from now on."""
        self._override.install()

    def add(self, weight: str, operands: Operands) -> None:
        """Quantize the operands of the product with the parameter called ``weight``."""
        self._operands[weight] = operands
        self._frozen[weight] = FrozenWeight(operands, self._axis)

    def operands(self, weight: str) -> LinearOperands:
        """Return how the operands of the product with that parameter are treated in the present phase."""
        return self._operands[weight][self._phase.current]

    @contextmanager
    def choosing(self, weight: str, chooser: Chooser) -> Iterator[None]:
        """Leave the values of that parameter to ``chooser``, as long as the context is open.

        It is called before every product with the matrix of an expert, may write to that, and nobody else quantizes it.
        """
        self._choosers[weight] = chooser
        try:
            yield
        finally:
            del self._choosers[weight]

    def frozen_weight(self, parameter: str) -> FrozenWeight:
        """Return what knows of the parameter whether it is frozen."""
        return self._frozen[parameter]

    def weight(self, parameter: str) -> nn.Parameter:
        """Return the parameter of that name."""
        return self._module.get_parameter(parameter)

    def freeze_as(self, parameter: str, values: Tensor) -> None:
        """Take ``values``, of the shape of that parameter, for what it is quantized to."""
        self._frozen[parameter].freeze_as(self.weight(parameter), values)

    def freeze(self) -> None:
        """Quantize the weights, as far as they can be."""
        for name, frozen in self._frozen.items():
            frozen.freeze(getattr(self._module, name), self._module.training)

    def versions(self) -> list[tuple[TensorVersion, Tensor]]:
        """Return each weight beside what recognises the values that it was quantized to."""
        return [(v, getattr(self._module, name)) for name, frozen in self._frozen.items() for v in frozen.versions]

    def compute(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output, its operands quantized.

        Raises:
            ConversionError: the module multiplies in a way that was not seen.
        """
        # Before the forward, which may take its slices of a weight long before it multiplies by them.
        is_training = self._module.training
        settled = ((name, of) for name, of in self._frozen.items() if name not in self._choosers)
        frozen = [name for name, of in settled if of.settle(getattr(self._module, name), is_training)]
        chosen = next((x for x in (*args, *kwargs.values()) if _is_choice(x)), None)
        products = ParameterProducts(partial(self._round, frozen, chosen), len(self._weights))
        with products:
            output = forward(*args, **kwargs)
        is_nothing = isinstance(output, Tensor) and not output.numel()
        if products.seen % len(self._weights) or not (products.seen or is_nothing):
            raise ConversionError(
                f"{self._name} computes its products where mxlab cannot see them: use "
                "model.set_experts_implementation('eager'), or leave it out"
            )
        return output

    def _round(self, frozen: list[str], chosen: Tensor | None, operand: ProductOperand) -> Tensor:
        name, x, axis = self._weights[operand.product], operand.tensor, operand.axis
        if name not in self._operands:
            return x
        phase = self._phase.current
        self._note(name, phase)
        mx = self._operands[name][phase]
        chooser = self._choosers.get(name)
        if operand.is_weight and chooser is not None:
            assert self._last_input is not None
            chooser(self._last_input, x)
            self._last_input = None  # its memory
            return x
        if operand.is_weight:
            return x if name in frozen else mx.on_weight(x, axis)
        self._show(name, "activation", x, axis)
        self._last_input = x if chooser is not None else None
        rows = _experts_of_rows(x, chosen, operand.ends)
        if rows is None or mx.activation is None or not mx.activation.tensor_bits:
            return mx.on_activation(x, axis=axis)
        return _by_expert(mx, x, axis, rows)

    def replicated(self, module: nn.Module) -> QuantizedExperts:
        """Return the same for a replica, whose weights are on another device."""
        replica = copy.copy(self)
        replica._module, replica._frozen = module, copy.deepcopy(self._frozen)
        return replica

    def _loaded(self, *_: Any) -> None:
        """Notice at once that other values were loaded, also for compiled code."""
        for name, frozen in self._frozen.items():
            frozen.notice_loaded(getattr(self._module, name))


def _is_choice(x: Any) -> bool:
    """Return whether an argument of experts says which of them each token goes to."""
    return isinstance(x, Tensor) and not x.is_floating_point()


def _experts_of_rows(x: Tensor, chosen: Tensor | None, ends: Tensor | None) -> Tensor | None:
    """Return the expert of each row of an input that several share; None where all rows go to one.

    Args:
        x: (rows, in), or (rows, 1, in) and (rows, in, 1) where each row has a weight of its own.
        chosen: (tokens, experts of a token), what the router chose.
        ends: (experts,), where the rows of each expert end, sorted by expert.
    """
    if ends is not None:
        return torch.searchsorted(ends.to(torch.int64), torch.arange(x.shape[0], device=x.device), right=True)
    return chosen.reshape(-1) if x.ndim == 3 and chosen is not None and chosen.numel() == x.shape[0] else None


def _by_expert(mx: LinearOperands, x: Tensor, axis: int, rows: Tensor) -> Tensor:
    """Quantize the tokens of each expert as the tensor that they are where experts are called one by one."""
    out = x.clone()
    for expert in rows.unique():
        out[rows == expert] = mx.on_activation(x[rows == expert], axis=axis)
    return out
