"""How the operands of an attention are quantized: K, V, the query and what else has a role."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxlab.errors import ConversionError, FormatError
from mxlab.formats import NumberFormat, Numerics
from mxlab.numerics import hadamard, quantize
from mxlab.packed import MXTensor


@dataclass(frozen=True, eq=False)
class StateGrid:
    """Quantizes one operand of an attention, (batch, heads, tokens, head_dim).

    Attributes:
        attention: its name, for errors.
        fmt: the format.
        numerics: ``exact`` or ``microxcaling``.
        size: of the Hadamard transform along head_dim before quantizing, which is undone afterwards; 0 for all of
            head_dim, None for no transform.
        offset: [heads, 1, head_dim], taken off before that, and added again at the end; None for none.
    """

    attention: str
    fmt: NumberFormat
    numerics: Numerics
    size: int | None = None
    offset: Tensor | None = None

    def quantize(self, x: Tensor, axis: int = -1) -> Tensor:
        """Return the operand as the attention computes with it, same shape and dtype.

        Args:
            x: the operand.
            axis: that of head_dim.
        """
        shifted = self._shifted(x, axis)
        if self.size is None:
            on_grid = quantize(shifted, self.fmt, axis=axis, numerics=self.numerics)
        else:
            on_grid = hadamard.transform_quantize(shifted, self.size, self.fmt, axis, numerics=self.numerics)
        return self.restored(on_grid, axis)

    def restored(self, on_grid: Tensor, axis: int = -1) -> Tensor:
        """Return what is on the grid as the attention computes with it: without the transform, and with the offset."""
        y = on_grid if self.size is None else hadamard.transform(on_grid, self.size, axis, inverse=True)
        return y if self.offset is None else y + self._of_shape(self.offset, y, axis)

    def transformed(self, x: Tensor) -> Tensor:
        """Return ``x`` with the transform: of another operand the product with what is on the grid stays the same."""
        return x if self.size is None else hadamard.transform(x, self.size)

    def products_with_offset(self, queries: Tensor) -> Tensor | None:
        """Return what the offset adds to the products with queries, (batch, heads, rows, 1); None without one."""
        if self.offset is None:
            return None
        return (queries * self._of_shape(self.offset, queries, -1)).sum(-1, keepdim=True)

    def encode(self, x: Tensor) -> MXTensor:
        """Return what is on the grid, in codes. Raises ConversionError where these cannot be told from the values."""
        given = self.transformed(self._shifted(x, -1))
        if self.numerics == "exact":
            return MXTensor.from_float(given, str(self.fmt))
        try:
            return MXTensor.from_values(quantize(given, self.fmt, numerics=self.numerics), str(self.fmt))
        except FormatError as e:
            raise ConversionError(
                f"{self.attention} cannot keep its K or V packed in {given.dtype}: {e}; use storage='grid'"
            ) from None

    def is_like(self, other: StateGrid) -> bool:
        """Return whether codes mean the same to both."""
        same_format = self.fmt == other.fmt and self.numerics == other.numerics
        return same_format and self.size == other.size and _are_equal(self.offset, other.offset)

    def _shifted(self, x: Tensor, axis: int) -> Tensor:
        return x if self.offset is None else x - self._of_shape(self.offset, x, axis)

    def _of_shape(self, offset: Tensor, x: Tensor, axis: int) -> Tensor:
        """Return the offset as it is taken off ``x``, whose heads may come several times over."""
        heads = x.shape[-3]
        if x.shape[axis] != offset.shape[-1] or heads % len(offset):
            raise ConversionError(
                f"the keys of {self.attention} are {tuple(x.shape)}, and their offset is for {len(offset)} heads of "
                f"{offset.shape[-1]}: leave k_offset out for it"
            )
        repeated = offset.to(x).repeat_interleave(heads // len(offset), dim=0)
        return repeated if axis in (-1, x.ndim - 1) else repeated.mT


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other.to(one.device)))
