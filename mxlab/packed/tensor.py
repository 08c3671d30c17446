"""A tensor in the bits of a microscaling format: packed codes, a byte for each scale, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxlab.errors import FormatError, SourceError
from mxlab.formats import MXFormat
from mxlab.numerics.blocks import Blocks
from mxlab.numerics.codes import Codes, check_codes, decode, encode, scale_values
from mxlab.numerics.kernels import packing
from mxlab.numerics.kernels.products import PackedRows
from mxlab.numerics.operators import DTYPES, check
from mxlab.numerics.recovered import codes_of_values
from mxlab.numerics.reference import block_layout, layout_of_shape
from mxlab.packed.bits import pack, packed_length, unpack

LAYOUT = 1  # of what :meth:`MXTensor.tensors` returns
_PARTS = ("elements", "scales", "tensor_scale")


@dataclass(frozen=True)
class MXTensor:
    """A quantized tensor, stored in the bits of its format.

    Attributes:
        fmt: the format.
        shape: of the tensor.
        axis: along which its blocks lie, not negative.
        dtype: of the tensor that was quantized, and of what :meth:`dequantize` returns.
        elements: uint8 [other axes..., bytes], the codes along ``axis`` packed (:mod:`mxlab.packed.bits`).
        scales: uint8 [other axes..., blocks].
        tensor_scale: float32 of no dimension; 1 where the format has none. Of a tensor that was quantized in pieces, of
            a shape that multiplies [other axes..., blocks, 1].
    """

    fmt: MXFormat
    shape: tuple[int, ...]
    axis: int
    dtype: torch.dtype
    elements: Tensor
    scales: Tensor
    tensor_scale: Tensor

    @classmethod
    def from_float(cls, x: Tensor, fmt: MXFormat | str, axis: int = -1, seed: int = 0) -> MXTensor:
        """Quantize a tensor in blocks along one axis.

        Args:
            x: float32, bfloat16 or float16.
            fmt: the format, or its spelling.
            axis: along which the blocks lie.
            seed: of ``dither`` rounding.

        Raises:
            FormatError: a dtype, an axis or a format that cannot be.
        """
        parsed = MXFormat.parse(fmt)
        check(x, "exact", "auto")
        if not -x.ndim <= axis < x.ndim:
            raise FormatError(f"axis is {axis}: a tensor of shape {tuple(x.shape)} has {x.ndim}; give one of them")
        axis %= x.ndim
        check_codes(parsed)
        if packing.can_pack(x, parsed):
            parts = packing.pack(x.detach().movedim(axis, -1).contiguous(), parsed)
            return cls(parsed, tuple(x.shape), axis, x.dtype, *parts)
        parts = _packed_parts(encode(x.detach(), parsed, (axis,), seed), parsed, x.shape[axis])
        return cls(parsed, tuple(x.shape), axis, x.dtype, *parts)

    @classmethod
    def from_values(cls, values: Tensor, fmt: MXFormat | str, axis: int = -1) -> MXTensor:
        """Store values that are on the grid of a format already, such as :func:`mxlab.quantize` or GPTQ gives them.

        Scales are found anew (:mod:`mxlab.numerics.recovered`), so that :meth:`dequantize` gives these values.

        Args:
            values: float32, bfloat16 or float16.
            fmt: the format, or its spelling; its scale rule and rounding do not matter.
            axis: along which the blocks lie.

        Raises:
            FormatError: values that are not on the grid, or scales that cannot be found, as of NVFP4 in bfloat16,
                whose values have been rounded once more.
        """
        made = cls.from_float(values, fmt, axis)
        codes = None if made._has(values) else codes_of_values(values.detach(), made.fmt, (made.axis,))
        if codes is not None:
            parts = _packed_parts(codes, made.fmt, values.shape[axis])
            made = cls(made.fmt, made.shape, made.axis, made.dtype, *parts)
        if not made._has(values):
            raise FormatError(
                f"a tensor of shape {made.shape} does not hold values of {made.fmt} along axis {made.axis}, or its "
                "scales cannot be told from them: pack what is quantized, by MXTensor.from_float"
            )
        return made

    def _has(self, values: Tensor) -> bool:
        return torch.equal(torch.nan_to_num(self.dequantize()), torch.nan_to_num(values.detach()))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the values, contiguous: what :func:`mxlab.quantize` gives, bit for bit, in the tensor's own dtype."""
        length, wanted = self.shape[self.axis], dtype or self.dtype
        if packing.can_unpack(self.elements, self.fmt) and not self.tensor_scale.ndim:
            codes = self.elements.contiguous(), self.scales.contiguous(), self.tensor_scale
            return packing.unpack(*codes, self.fmt, length, wanted).movedim(-1, self.axis).contiguous()
        elements = unpack(self.elements, self.fmt.element_bits, length)
        blocks = block_layout(elements, self.fmt, (elements.ndim - 1,)).split(elements)
        return decode(Codes(blocks, self.scales, self.tensor_scale), self.fmt, self._cut, wanted)

    @property
    def _cut(self) -> Blocks:
        return layout_of_shape(self.shape, self.fmt, (self.axis,))

    @cached_property
    def rows(self) -> PackedRows:
        """The tensor as the kernels of products take it."""
        fmt, elements, scales = self.fmt, self.elements.contiguous(), self.scales.contiguous()
        scale_of = scale_values(fmt).to(self.device) * self.tensor_scale * fmt.grid.min
        found = scale_of[scales[self.holds_numbers()].unique().long()]
        found = found[found > 0]
        ends = (float(found.min()), float(found.max())) if found.numel() else (1.0, 1.0)
        is_shift = not fmt.scale_format.is_float and fmt.scale_bits == 8
        return PackedRows(elements, scales, scale_of, ends, fmt.grid.min if is_shift else 0.0)

    def holds_numbers(self) -> Tensor:
        """Return, for each block, whether one of its codes is not 0: bool, of the shape of the scales."""
        bits = self._cut.block_size * self.fmt.element_bits
        if bits and bits % 8 == 0:
            codes = F.pad(self.elements, (0, self.scales.shape[-1] * (bits // 8) - self.elements.shape[-1]))
        else:
            codes = unpack(self.elements, self.fmt.element_bits, self.shape[self.axis])
            size = self._cut.block_size or codes.shape[-1]
            codes = F.pad(codes, (0, self.scales.shape[-1] * size - codes.shape[-1]))
        return codes.unflatten(-1, (self.scales.shape[-1], -1)).amax(-1) > 0

    @property
    def nbytes(self) -> int:
        """Bytes that the codes and the scales take."""
        unit = self.tensor_scale.nbytes if self.fmt.tensor_bits else 0
        return self.elements.nbytes + self.scales.nbytes + unit

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.elements.device

    def to(self, device: torch.device | str) -> MXTensor:
        """Return the same on another device."""
        parts = {name: getattr(self, name).to(device) for name in _PARTS}
        return replace(self, **parts)

    def recast(self, fmt: MXFormat | str) -> MXTensor:
        """Return the same values in the codes of another format.

        Raises:
            FormatError: that format does not hold them all; the message says how many are lost, and how far off the
                nearest ones are.
        """
        values, parsed = self.dequantize(), MXFormat.parse(fmt)
        try:
            return MXTensor.from_values(values, parsed, self.axis)
        except FormatError:
            error = (MXTensor.from_float(values, parsed, self.axis).dequantize().float() - values.float()).abs()
            share = float(error.norm() / values.float().norm())
            raise FormatError(
                f"{parsed} does not hold {int((error > 0).sum())} of {error.numel()} values of {self.fmt}: quantized "
                f"to it, they would be off by {share:.2e} of their norm; quantize what they were made from"
            ) from None

    def narrow(self, axis: int, start: int, length: int) -> MXTensor:
        """Return a part along an axis, which shares the memory; not along that of the blocks.

        Raises:
            FormatError: the axis of the blocks, or a part that is not there.
        """
        axis %= len(self.shape)
        if axis == self.axis:
            raise FormatError(f"axis {axis} is that of the blocks, which cannot be cut: take another, or dequantize")
        if not 0 <= start <= start + length <= self.shape[axis]:
            raise FormatError(
                f"{start} to {start + length} is not within the {self.shape[axis]} elements of axis {axis}: "
                "give a part of them"
            )
        place = axis - (axis > self.axis)  # the axis of the blocks comes last in the codes
        shape = tuple(length if i == axis else n for i, n in enumerate(self.shape))
        parts = {name: getattr(self, name).narrow(place, start, length) for name in _PARTS[:2]}
        return replace(self, shape=shape, **parts)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored, by name: for a state dict or a safetensors file."""
        names = _PARTS if self.fmt.tensor_bits else _PARTS[:2]
        return {name: getattr(self, name) for name in names}

    def description(self) -> dict[str, Any]:
        """Return what else :meth:`from_tensors` needs, as plain values."""
        return {
            "layout": LAYOUT,
            "format": str(self.fmt),
            "shape": list(self.shape),
            "axis": self.axis,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], description: Mapping[str, Any], name: str = "") -> MXTensor:
        """Return the tensor that was stored.

        Args:
            tensors: what :meth:`tensors` gave.
            description: what :meth:`description` gave.
            name: for errors.

        Raises:
            SourceError: a layout that is not known, a part that is missing, or one of another dtype or shape.
        """
        made = cls._described(description, {part: tensors.get(part, torch.ones(())) for part in _PARTS}, name)
        made.check_parts(tensors, name)
        return made

    @classmethod
    def empty(cls, description: Mapping[str, Any], name: str = "", device: torch.device | str = "cpu") -> MXTensor:
        """Return a tensor of that description whose codes are yet to come.

        Raises:
            SourceError: a layout that is not known, or a description that is none.
        """
        made = cls._described(description, dict.fromkeys(_PARTS, torch.ones(())), name)
        wanted = made._wanted()
        parts = {part: torch.empty(shape, dtype=dtype, device=device) for part, (dtype, shape) in wanted.items()}
        return replace(made, **parts)

    @classmethod
    def _described(cls, description: Mapping[str, Any], parts: Mapping[str, Tensor], name: str) -> MXTensor:
        if description.get("layout") != LAYOUT:
            raise SourceError(
                f"{name} has the layout {description.get('layout')!r}, and this version of mxlab reads {LAYOUT}: "
                "update mxlab, or pack the model again"
            )
        try:
            fmt, shape = MXFormat.parse(description["format"]), tuple(map(int, description["shape"]))
            axis, dtype = int(description["axis"]), getattr(torch, description["dtype"])
            if not 0 <= axis < len(shape) or dtype not in DTYPES or min(shape) < 0:
                raise ValueError(f"axis {axis}, shape {shape}, {dtype}")
        except (AttributeError, KeyError, TypeError, ValueError, FormatError) as e:
            raise SourceError(
                f"{name} is described as {dict(description)}, which is no packed tensor ({e}): the file is damaged; "
                "fetch or pack it again"
            ) from None
        return cls(fmt, shape, axis, dtype, **parts)

    def _wanted(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return the dtype and the shape of each part."""
        rest = tuple(n for i, n in enumerate(self.shape) if i != self.axis)
        length, size = self.shape[self.axis], self._cut.block_size
        blocks = -(-length // size) if size else min(length, 1)
        wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "elements": (torch.uint8, (*rest, packed_length(length, self.fmt.element_bits))),
            "scales": (torch.uint8, (*rest, blocks)),
        }
        return wanted | ({"tensor_scale": (torch.float32, ())} if self.fmt.tensor_bits else {})

    def check_parts(self, tensors: Mapping[str, Tensor], name: str, are_all: bool = True) -> None:
        """Raise SourceError where a part of such a tensor has another dtype or shape, or (``are_all``) is missing."""
        for part, (dtype, shape) in self._wanted().items():
            found = tensors.get(part)
            if found is None and not are_all:
                continue
            if found is None or (found.dtype, tuple(found.shape)) != (dtype, shape):
                has = "is missing" if found is None else f"is {found.dtype} {tuple(found.shape)}"
                raise SourceError(
                    f"{name}: {part} {has}, and {self.fmt} of shape {self.shape} wants {dtype} {shape}: the file is "
                    "damaged, or of another model; fetch or pack it again"
                )


def _packed_parts(codes: Codes, fmt: MXFormat, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes of rows of a length as they are stored."""
    elements = codes.elements.flatten(-2)[..., :length]
    return pack(elements, fmt.element_bits), codes.scales, codes.tensor_scale
