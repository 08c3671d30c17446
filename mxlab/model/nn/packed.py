"""Linear layers whose weights are stored in the bits of their format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mxlab.errors import ConversionError, FormatError, SourceError
from mxlab.formats import MXFormat, NumberFormat
from mxlab.model.nn.linear import MxConv1D, MxLinear, QuantizedLayer
from mxlab.model.nn.operands import LinearOperands
from mxlab.model.nn.weights import TensorVersion
from mxlab.numerics.codes import scale_values
from mxlab.packed import MXTensor
from mxlab.packed.matmul import IntegerActivation, multiply, obstacle
from mxlab.recipe.transform import Derotated

PARTS = {"elements": "weight_elements", "scales": "weight_scales", "tensor_scale": "weight_tensor_scale"}


class PackedLayer(QuantizedLayer):
    """A quantized layer whose weight is kept as an :class:`~mxlab.packed.MXTensor`, in buffers; made by :func:`pack`.

    The layer has no parameter ``weight`` any more; the attribute of that name computes its values, each time. Products
    are computed in integers where the activation's format and the device allow it, and else with these values.
    """

    weight_elements: Tensor
    weight_scales: Tensor
    _made: tuple[Any, MXTensor]

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The values of the weight, as they are multiplied: a new tensor."""
        packed = self.packed
        if packed.device.type == "meta":
            return torch.empty(packed.shape, dtype=packed.dtype, device="meta")
        return packed.dequantize()

    @property
    def packed(self) -> MXTensor:
        """The weight as it is stored; it shares the memory of the buffers."""
        present = tuple(
            (buffer.data_ptr(), 0 if buffer.is_inference() else buffer._version)
            for name in PARTS.values()
            if (buffer := self._buffers.get(name)) is not None
        )
        before, made = self._made
        if before != present or made.elements is not self.weight_elements:
            made = MXTensor.from_tensors(self._parts(), made.description(), type(self).__name__)
            self._made = present, made
        return made

    @property
    def is_frozen(self) -> bool:
        """Whether the weight is on the grid: always."""
        return True

    def freeze(self) -> None:
        """Do nothing: the weight is on the grid."""

    def freeze_as(self, values: Tensor) -> None:
        """Raise ConversionError: the weight has been packed."""
        raise ConversionError("the weight is packed: quantize it before it is packed (storage='grid')")

    def versions(self) -> list[tuple[TensorVersion, Tensor]]:
        """Return nothing: there is no parameter that others could write to."""
        return []

    def _parts(self) -> dict[str, Tensor]:
        return {part: tensor for part, name in PARTS.items() if (tensor := self._buffers.get(name)) is not None}

    def _quantized_product(self, x: Tensor, mx: LinearOperands, bias: Tensor | None) -> Tensor:
        packed = self.packed
        if (product := self._integer_product(x, mx, packed, bias)) is not None:
            return product
        return self._product(self._quantized_input(x, mx), packed.dequantize(x.dtype), bias)

    def _integer_product(self, x: Tensor, mx: LinearOperands, packed: MXTensor, bias: Tensor | None) -> Tensor | None:
        """Return the product; None where it cannot be computed in integers."""
        fmt = mx.activation
        if not isinstance(fmt, MXFormat) or mx.numerics != "exact" or isinstance(mx.transform, Derotated):
            return None
        needs_gradient = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if needs_gradient or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return None
        if (bias is not None and bias.dtype != x.dtype) or obstacle(x, fmt, packed.fmt) is not None:
            return None
        return multiply(self._integer_input(x, mx, fmt, packed.fmt), packed, bias)

    def _integer_input(self, x: Tensor, mx: LinearOperands, fmt: MXFormat, weight: MXFormat) -> IntegerActivation:
        matrices = self.input_transform
        number = None if matrices is None else self._number_of_transform(matrices)

        def encode(x: Tensor, out: Tensor | None) -> IntegerActivation:
            return IntegerActivation.from_float(mx.before_grid(x, matrices=matrices), fmt, weight, out)

        return self.shared.get(x, ("integers", mx.input_kind, weight, number), encode)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        found = {part: state_dict[prefix + name] for part, name in PARTS.items() if prefix + name in state_dict}
        if found:
            description = self._made[1].description()
            check_numbers(MXTensor.from_tensors(found, description, f"{prefix}weight"), f"{prefix}weight")
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self).copy()


class PackedLinear(PackedLayer, MxLinear):
    """A ``torch.nn.Linear`` whose weight is packed."""


class PackedConv1D(PackedLayer, MxConv1D):
    """A ``Conv1D`` of transformers whose weight is packed."""


def pack(layer: QuantizedLayer, name: str) -> None:
    """Turn a quantized layer into one whose weight is packed; its values stay the same, to the last bit.

    Args:
        layer: in evaluation; a frozen weight is taken as it is, another is quantized.
        name: for errors.

    Raises:
        ConversionError: the layer has a format for each phase, one that cannot be packed, or its weight elsewhere.
    """
    fmt = packable_format([{"weight": of.weight} for of in layer.operands.values()], name)
    with torch.no_grad():
        make_packed(layer, _packed_weight(layer, fmt, name))


def _packed_weight(layer: QuantizedLayer, fmt: MXFormat, name: str) -> MXTensor:
    weight, operands, axis = layer.weight.detach(), layer.operands["prefill"], layer.input_axis
    if layer.training or layer.weight.is_meta or layer._is_offloaded:
        raise ConversionError(
            f"{name} cannot be packed: it is in training mode, on the meta device, or offloaded; call eval() and load "
            "the model onto a device first, or use storage='grid'"
        )
    try:
        if layer.frozen.is_frozen(layer.weight):
            return MXTensor.from_values(weight, fmt, axis)
        source = operands.weight_before_grid(operands.transformed(weight, axis))
        values, packed = operands.on_weight(weight, axis), MXTensor.from_float(source, fmt, axis)
        return packed if torch.equal(packed.dequantize(), values) else MXTensor.from_values(values, fmt, axis)
    except FormatError as e:
        raise ConversionError(f"{name} cannot be packed: {e}") from None


def make_packed(layer: Any, packed: MXTensor) -> None:
    """Give a quantized layer a packed weight in place of its parameter."""
    del layer._parameters["weight"]
    layer._is_hf_initialized = True  # or transformers would draw a weight for it
    kind: Any = PackedConv1D if isinstance(layer, Conv1D) else PackedLinear
    layer.__class__ = kind
    vars(layer)["_copies"] = {}
    for part, tensor in packed.tensors().items():
        layer.register_buffer(PARTS[part], tensor)
    vars(layer)["_made"] = None, packed


def shape_of_weight(layer: nn.Linear | Conv1D) -> tuple[int, ...]:
    """Return the shape of a linear layer's weight, without computing values of one that is packed."""
    return layer.packed.shape if isinstance(layer, PackedLayer) else tuple(layer.weight.shape)


def packable_format(formats_by_phase: Iterable[Mapping[str, NumberFormat | None]], name: str) -> MXFormat:
    """Return the one format that a layer's weight is packed in.

    Args:
        formats_by_phase: the formats by role, for each phase.
        name: of the layer, for errors.

    Raises:
        ConversionError: there are several, or one that has no codes.
    """
    formats = {of.get("weight") for of in formats_by_phase}
    fmt = next(iter(formats))
    if len(formats) > 1:
        raise ConversionError(
            f"{name} has weights of {' and '.join(sorted(map(str, formats)))}, one for each phase: they cannot be "
            "packed; give it one format, or use storage='grid'"
        )
    if not isinstance(fmt, MXFormat) or fmt.element_bits > 8 or fmt.scale_rule == "none":
        raise ConversionError(
            f"{name} has weights of {fmt}, which cannot be packed: give it a microscaling format of at most eight "
            "bits, or use storage='grid'"
        )
    return fmt


def check_numbers(weight: MXTensor, name: str) -> None:
    """Raise SourceError where a scale of a weight is not a number."""
    if weight.device.type == "meta":
        return
    bad = int(scale_values(weight.fmt).to(weight.device)[weight.scales.long()].isnan().sum())
    if bad:
        raise SourceError(
            f"{name}: {bad} scales have codes that {weight.fmt} has no number for: the file is damaged; fetch or pack "
            "it again"
        )
