"""Linear layers whose weights are stored in the bits of their format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mxlab.errors import ConversionError, FormatError, SourceError
from mxlab.formats import MXFormat, NumberFormat, elementwise_format
from mxlab.model.nn.linear import MxConv1D, MxLinear, QuantizedLayer
from mxlab.model.nn.operands import LinearOperands
from mxlab.model.nn.weights import TensorVersion
from mxlab.numerics.codes import scale_values
from mxlab.numerics.kernels import native
from mxlab.numerics.kernels.products import IntegerProduct, integer_product
from mxlab.packed import MXTensor
from mxlab.packed.matmul import obstacle
from mxlab.recipe.transform import Derotated

PARTS = {"elements": "weight_elements", "scales": "weight_scales", "tensor_scale": "weight_tensor_scale"}


class PackedLayer(QuantizedLayer):
    """A quantized layer whose weight is kept as an :class:`~mxlab.packed.MXTensor`, in buffers; made by :func:`pack`.

    The layer has no parameter ``weight`` any more; the attribute of that name computes its values, each time. Products
    are computed in integers where the activation's format and the device allow it, and else with these values.
    """

    weight_elements: Tensor
    weight_scales: Tensor
    _name: str
    _made: tuple[tuple[int, ...], MXTensor]  # what the buffers were when it was made, and it
    _ways: dict[tuple[int, torch.dtype], _Way | None]

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
        versions, made = self._made
        elements, scales = self._buffers["weight_elements"], self._buffers["weight_scales"]
        if made.elements is not elements or made.scales is not scales or versions != _versions(elements, scales):
            made = MXTensor.from_tensors(self._parts(), made.description(), type(self).__name__)
            self._made = _versions(elements, scales), made
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

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter; raises ConversionError for the weight, which has been packed."""
        if name == "weight":
            raise ConversionError("the weight is packed: load the unquantized model to change it")
        super().register_parameter(name, param)

    def versions(self) -> list[tuple[TensorVersion, Tensor]]:
        """Return nothing: there is no parameter that others could write to."""
        return []

    def _parts(self) -> dict[str, Tensor]:
        return {part: tensor for part, name in PARTS.items() if (tensor := self._buffers.get(name)) is not None}

    def _computed(self, x: Tensor, mx: LinearOperands) -> Tensor:
        way, bias = self._way(x, mx), self.bias
        is_apart = bias is not None and mx.adds_bias_apart
        if way is None or is_apart or (way.rounder is None and x.dtype not in mx.untouched):
            return super()._computed(x, mx)
        y = self._integer_product(x, mx, way, None if bias is None else mx.on_bias(bias))
        return super()._computed(x, mx) if y is None else y

    def _quantized_product(self, x: Tensor, mx: LinearOperands, bias: Tensor | None) -> Tensor:
        way = self._way(x, mx)
        if way is not None and (y := self._integer_product(x, mx, way._replace(rounder=None), bias)) is not None:
            return y
        return self._product(self._quantized_input(x, mx), self.packed.dequantize(x.dtype), bias)

    def _way(self, x: Tensor, mx: LinearOperands) -> _Way | None:
        """Return how the product is computed in integers; None where it cannot be."""
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return None
        # Attributes of a module are found slowly, and this is called for every layer and token.
        weight, elements, bias = self._made[1], self._buffers["weight_elements"], self._parameters["bias"]
        if not x.is_cpu or elements is None or not elements.is_cpu:
            return None
        if x.ndim < 1 or x.shape[-1] != weight.shape[weight.axis]:
            return None  # torch says what is wrong
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return None
        if not x.numel() or (bias is not None and bias.dtype != x.dtype):
            return None
        kind = id(mx), x.dtype
        if kind not in self._ways:
            self._ways[kind] = _way(mx, weight.fmt, x)
        return self._ways[kind]

    def _integer_product(self, x: Tensor, mx: LinearOperands, way: _Way, bias: Tensor | None) -> Tensor | None:
        """Return the product; None where a product of two scales might be no normal number of float32."""
        matrices, packed = self.input_transform, self.packed
        number = None if matrices is None else self._number_of_transform(matrices)

        def encode(x: Tensor, out: Tensor | None) -> Tensor:
            given = mx.before_grid(x, matrices=matrices) if way.rounder is None else mx.transformed(x, -1, matrices)
            return way.product.encode(given.contiguous(), out, way.rounder)

        coded = self.shared.get(x, (way.kind, number), encode)
        y = torch.empty(*x.shape[:-1], packed.elements.shape[0], dtype=x.dtype)
        inputs = x.shape[-1]
        is_done = way.product.multiply(coded, x.numel() // inputs, inputs, packed.rows, bias, y, way.rounder)
        return y if is_done else None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        found = {part: state_dict[prefix + name] for part, name in PARTS.items() if prefix + name in state_dict}
        made = self._made[1]
        # transformers 4 loads a layer by itself, without a prefix: one that lacks a tensor, with memory as it is.
        name = prefix.removesuffix(".") or self._name
        made.check_parts(found, name, are_all=False)  # torch itself misses what is not there
        if "scales" in found:
            check_numbers(made.fmt, found["scales"], name)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_ways": {}}


class PackedLinear(PackedLayer, MxLinear):
    """A ``torch.nn.Linear`` whose weight is packed."""


class PackedConv1D(PackedLayer, MxConv1D):
    """A ``Conv1D`` of transformers whose weight is packed."""


class _Way(NamedTuple):
    """How a layer's product is computed in integers."""

    product: IntegerProduct
    rounder: Any  # what rounds element-wise in the kernels; None where nothing is rounded, or they cannot
    kind: str  # equal where the same input becomes the same integers


def _way(mx: LinearOperands, weight: MXFormat, x: Tensor) -> _Way | None:
    fmt = mx.activation
    if not isinstance(fmt, MXFormat) or mx.numerics != "exact" or isinstance(mx.transform, Derotated):
        return None
    product = None if obstacle(x, fmt, weight) else integer_product(weight, fmt)
    return None if product is None else _Way(product, _rounder(mx, fmt, x.dtype), f"{mx.input_kind} for {weight}")


def _rounder(mx: LinearOperands, fmt: MXFormat, dtype: torch.dtype) -> Any:
    used = mx.elementwise
    element = elementwise_format(used.bfloat, used.fp)
    if element is None or dtype in mx.untouched or fmt.tensor_bits or used.output_rounding == "dither":
        return None
    return native.round_plan(element, used.output_rounding, used.subnormals, "exact")


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if x is None or x.is_inference() else x._version for x in tensors)


def pack(layer: QuantizedLayer, name: str) -> None:
    """Turn a quantized layer into one whose weight is packed; its values stay the same, to the last bit.

    Args:
        layer: in evaluation; a frozen weight is taken as it is, another is quantized.
        name: for errors.

    Raises:
        ConversionError: the layer has a format for each phase, one that cannot be packed, or its weight elsewhere.
    """
    fmt = packable_format([{"weight": of.weight} for of in layer.operands.values()], name, "weight")
    with torch.no_grad():
        make_packed(layer, _packed_weight(layer, fmt, name), name)


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
        values = operands.on_weight(weight, axis)
        packed = MXTensor.from_float(operands.weight_before_grid(operands.transformed(weight, axis)), fmt, axis)
        return packed if torch.equal(packed.dequantize(), values) else MXTensor.from_values(values, fmt, axis)
    except FormatError as e:
        raise ConversionError(f"{name} cannot be packed: {e}") from None


def make_packed(layer: Any, packed: MXTensor, name: str) -> None:
    """Give a quantized layer a packed weight in place of its parameter; errors call it ``name``."""
    del layer._parameters["weight"]
    layer._is_hf_initialized = True  # or transformers would draw a weight for it
    kind: Any = PackedConv1D if isinstance(layer, Conv1D) else PackedLinear
    layer.__class__ = kind
    vars(layer)["_copies"] = {}
    for part, tensor in packed.tensors().items():
        layer.register_buffer(PARTS[part], tensor)
    vars(layer)["_name"] = name
    vars(layer)["_ways"] = {}
    vars(layer)["_made"] = _versions(packed.elements, packed.scales), packed


def shape_of_weight(layer: nn.Linear | Conv1D) -> tuple[int, ...]:
    """Return the shape of a linear layer's weight, without computing values of one that is packed."""
    return layer.packed.shape if isinstance(layer, PackedLayer) else tuple(layer.weight.shape)


def packable_format(formats_by_phase: Iterable[Mapping[str, NumberFormat | None]], name: str, role: str) -> MXFormat:
    """Return the one format that the weight of a layer, or K or V of an attention, is packed in.

    Args:
        formats_by_phase: the formats by role, for each phase.
        name: of the module, for errors.
        role: whose format is asked for.

    Raises:
        ConversionError: there are several, or one that has no codes.
    """
    formats = {of.get(role) for of in formats_by_phase}
    fmt = next(iter(formats))
    if len(formats) > 1:
        raise ConversionError(
            f"{name} has {role} of {' and '.join(sorted(map(str, formats)))}, one for each phase: it cannot be packed; "
            "give it one format, or use storage='grid'"
        )
    if not isinstance(fmt, MXFormat) or fmt.element_bits > 8 or fmt.scale_rule == "none":
        raise ConversionError(
            f"{name} has {role} of {fmt}, which cannot be packed: give it a microscaling format of at most eight bits, "
            "or use storage='grid'"
        )
    return fmt


def check_numbers(fmt: MXFormat, scales: Tensor, name: str) -> None:
    """Raise SourceError where a scale of a weight is not a number."""
    if scales.device.type == "meta":
        return
    bad = int(scale_values(fmt).to(scales.device)[scales.long()].isnan().sum())
    if bad:
        raise SourceError(
            f"{name}: {bad} scales have codes that {fmt} has no number for: the file is damaged; fetch or pack it again"
        )
