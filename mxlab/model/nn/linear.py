"""Linear layers whose operands are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mxlab.model.nn.operands import LinearOperands, Observable
from mxlab.model.nn.phase import PassPhase
from mxlab.model.nn.shared_input import SharedInput
from mxlab.model.nn.weights import QuantizedWeight
from mxlab.recipe import Phase
from mxlab.sources.devices import is_native

# Half precision that torch multiplies slowly on this processor: a bfloat16 product takes six to ten times as long as a
# float32 one without bfloat16 units.
COMPUTED_IN_FLOAT32 = tuple(dtype for dtype in (torch.bfloat16,) if not is_native(dtype, torch.device("cpu")))


class QuantizedLayer(Observable, QuantizedWeight):
    """A linear layer that computes with quantized operands; made by :meth:`convert`.

    In evaluation the weight itself is quantized, once, in place, and again when it has changed: the first time the
    layer runs or its state is read. A weight that is trained (the layer ran in training mode, or the weight got a
    gradient) is the full-precision master from then on, in evaluation too: it is quantized on the fly, gradients pass
    straight through, and what is saved is the master. So call ``train()`` before the first step, while the weight is
    still what was loaded. A weight that accelerate offloaded is quantized on the fly, too. One that is tied to another
    module's stays unchanged, and is saved so; the layer computes with a quantized copy.

    Torch does not count writes through ``weight.data``: such a change is seen when the state is read, but not by the
    forward pass. Write to the weight itself, under ``torch.no_grad()``. Compiled code sees weights that are loaded, and
    training, but no other writes: call the layer once outside it, and compile again.
    """

    bias: nn.Parameter | None
    shared: SharedInput
    phase: PassPhase

    @classmethod
    def convert(
        cls,
        layer: nn.Module,
        operands: Mapping[Phase, LinearOperands],
        shared: SharedInput | None = None,
        phase: PassPhase | None = None,
        is_tied: bool = False,
    ) -> Any:
        """Turn ``layer`` itself into a quantized one: its parameters, hooks and places in the model stay the same.

        Layers with one ``shared`` quantize an input that is common to them once.
        """
        own = _own_forwards(layer)
        layer.__class__ = cls
        assert isinstance(layer, QuantizedLayer)
        layer._prepare(operands, is_tied)
        layer.shared, layer.phase = shared or SharedInput(), phase or PassPhase()
        for name in own:
            setattr(layer, name, MethodType(cls.forward, layer))
        return layer

    @property
    def mx(self) -> LinearOperands:
        """Operand treatment for the current phase (prefill or decode)."""
        return self.operands[self.phase.current]

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., out] from [..., in]."""
        phase = self.phase.current
        mx = self.operands[phase]
        self._note("weight", phase)
        self._show("weight", "activation", x)
        y = self._computed(x, mx)
        self._show("weight", "output", y)
        return mx.on_output(y)

    def _computed(self, x: Tensor, mx: LinearOperands) -> Tensor:
        """Quantize both operands; return their product with the bias, both rounded element-wise."""
        bias = self.bias
        if bias is None or mx.adds_bias_apart:
            return mx.on_product(self._quantized_product(x, mx, None), bias)
        return mx.on_product(self._quantized_product(x, mx, mx.on_bias(bias)), None)

    def _quantized_product(self, x: Tensor, mx: LinearOperands, bias: Tensor | None) -> Tensor:
        """Quantize both operands, and return their product [..., out]."""
        return self._product(self._quantized_input(x, mx), self._quantized_weight(mx), bias)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply [..., in] in the dtype that this processor is fast in, and round [..., out] once to that of ``x``.

        Products of two bfloat16 numbers are exact in float32: what differs from torch's own bfloat16 product is the
        order in which float32 sums are added up, and with it at most the last bit. A single row is left to torch,
        which is fast there, while widening the weight would take longer than the product.
        """
        is_fast = x.dtype not in COMPUTED_IN_FLOAT32 or x.device.type != "cpu" or x.numel() == x.shape[-1]
        if is_fast:
            return self._multiply(x, weight, bias)
        wide = None if bias is None else bias.float()
        return self._multiply(x.float(), weight.float(), wide).to(x.dtype)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:  # noqa: D102
        mx = self.mx
        return f"{super().extra_repr()}, weight={mx.weight}, activation={mx.activation}, {mx.numerics}"

    def _quantized_input(self, x: Tensor, mx: LinearOperands) -> Tensor:
        matrices = self.input_transform
        if torch.compiler.is_compiling() or not mx.shares_input:
            return mx.on_activation(x, matrices=matrices)
        if matrices is None:
            return self.shared.get(x, mx.input_kind, mx.on_activation)
        kind = mx.input_kind, self._number_of_transform(matrices)
        return self.shared.get(x, kind, lambda x, out: mx.on_activation(x, out, matrices=matrices))


class MxLinear(QuantizedLayer, nn.Linear):
    """A ``torch.nn.Linear`` that computes with quantized operands."""

    input_axis = -1

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class MxConv1D(QuantizedLayer, Conv1D):
    """A ``Conv1D`` of transformers, a linear layer with its weight as [in, out], that computes with quantized operands.

    Its bias is added by a matmul of two dimensions, as in the layer it was.
    """

    input_axis = 0

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        y = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
        return y.view(*x.shape[:-1], -1)


def convert(layer: nn.Module, *args: Any, **kwargs: Any) -> QuantizedLayer:
    """Turn a ``torch.nn.Linear`` or a ``Conv1D`` into a quantized one, as :meth:`QuantizedLayer.convert`."""
    return (MxConv1D if isinstance(layer, Conv1D) else MxLinear).convert(layer, *args, **kwargs)


def is_linear_layer(layer: nn.Module) -> bool:
    """Return whether a layer computes what a ``torch.nn.Linear`` or a ``Conv1D`` does, whatever its class is called."""
    kind = type(layer)
    if kind in (nn.Linear, Conv1D) or issubclass(kind, QuantizedLayer):
        return True
    if not isinstance(layer, nn.Linear) or len(layer._parameters) > 2 or layer._buffers or layer._modules:
        return False
    return _computes_linear(kind, layer.bias is not None)


@cache
def _computes_linear(kind: type[nn.Linear], has_bias: bool) -> bool:
    """Try a class derived from ``torch.nn.Linear`` on a small layer."""
    generator = torch.Generator().manual_seed(0)
    layer, x = nn.Linear(3, 2, has_bias), torch.rand(4, 3, generator=generator)
    expected = layer(x)
    layer.__class__ = kind
    try:
        found: Any = layer.forward(x)
    except Exception:  # whatever it wants that a linear layer does not have
        return False
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, atol=1e-6)


def is_convertible(layer: nn.Module) -> bool:
    """Return whether :func:`convert` takes effect: no code but accelerate's has replaced the layer's forward."""
    return "forward" not in vars(layer) or bool(_own_forwards(layer))


def _own_forwards(layer: nn.Module) -> list[str]:
    """Return the attributes in which accelerate's hooks, in place or removed, keep the layer's own forward."""
    return [
        name
        for name in ("forward", "_old_forward")
        if getattr(vars(layer).get(name), "__func__", None) is type(layer).forward
    ]
