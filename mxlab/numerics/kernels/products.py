"""Products of activations with packed weights in integers (``csrc/dot.h``), on the CPU.

Elements of few bits are integers times a unit, so that the sum over a block is exact in integers, and costs one
multiply-add by the two scales. The result is the product in exact arithmetic, but for the float32 sums over blocks,
whose order is fixed: the bits are those of any instruction set, number of threads and number of rows.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from mxlab.formats import MXFormat
from mxlab.numerics.codes import element_values
from mxlab.numerics.kernels import native
from mxlab.numerics.kernels.compiled import address

_ALIGNMENT = 64  # of its memory
_LARGEST_INTEGER = 127  # of an operand; a weight that is fixed-point may be -128
_MOST_CODES = 1536  # that are unpacked at once: MOST_CODES in dot.h; as 16-bit words half of it


@functools.cache
def obstacle(weight: MXFormat, activation: MXFormat) -> str | None:
    """Return why two formats cannot be multiplied in integers; None where they can."""
    if native.MISSING:
        return f"the native kernels are missing ({native.MISSING})"
    if weight.elements_per_scale != activation.elements_per_scale:
        return f"the blocks of {weight} and {activation} have different sizes"
    block = weight.elements_per_scale
    if block % 4 or not 4 <= block <= 1024 or math.lcm(block, 32) > _MOST_CODES // 2:
        return f"blocks of {block} elements cannot be cut into fours, or are too long"
    for fmt in (weight, activation):
        if integers(fmt) is None:
            return f"elements of {fmt} are no integers of eight bits"
    if activation.is_random:
        return f"{activation} draws random numbers"
    if not activation.has_kernels:
        return f"{activation} has no kernels"
    return None


@functools.cache
def integers(fmt: MXFormat) -> Tensor | None:
    """Return what each code of an element is as a multiple of the smallest one, int16; None where that is too large."""
    if fmt.element_bits > 8:
        return None
    values = element_values(fmt.grid, fmt.element_bits) / fmt.grid.min
    fits = bool((values <= _LARGEST_INTEGER).all()) and bool((values >= -_LARGEST_INTEGER - fmt.grid.is_int).all())
    return values.to(torch.int16) if fits else None


class IntegerProduct:
    """Multiplies activations of one format by weights of another."""

    def __init__(self, weight: MXFormat, activation: MXFormat) -> None:
        whole = integers(weight)
        assert whole is not None
        largest = max(map(abs, activation.limits)) / activation.grid.min
        self._plan = native.product_plan(activation, int(largest), weight, whole.tolist())

    def encode(self, x: Tensor, memory: Tensor | None = None, rounder: Any = None) -> Tensor:
        """Return a contiguous activation [..., inputs] as integers and scales: bytes that :meth:`multiply` takes.

        They are put into ``memory``, contiguous, if that is given and large enough. With what
        :func:`mxlab.numerics.kernels.native.round_plan` gives, each value is rounded first.
        """
        inputs = x.shape[-1]
        rows = x.numel() // inputs
        size = self._plan.bytes(rows, inputs) + _ALIGNMENT
        if memory is None or memory.nbytes < size:
            memory = torch.empty(size, dtype=torch.uint8)
        start = memory.data_ptr()
        self._plan.encode(
            x.data_ptr(),
            native.DTYPES[x.dtype],
            rows,
            inputs,
            rounder,
            start + -start % _ALIGNMENT,
            torch.get_num_threads(),
        )
        return memory

    def multiply(
        self,
        coded: Tensor,
        rows: int,
        inputs: int,
        weight: PackedRows,
        bias: Tensor | None,
        out: Tensor,
        rounder: Any = None,
    ) -> bool:
        """Write the product [rows, outputs] into ``out``.

        Args:
            coded: what :meth:`encode` gave for an activation [rows, inputs].
            rows: of it.
            inputs: of it.
            weight: the weight.
            bias: [outputs], of the dtype of ``out``, contiguous, or None.
            out: contiguous; float32, bfloat16 or float16.
            rounder: with it, each result is rounded.

        Returns:
            Whether it was done: not where a product of two scales might be no normal number of float32.
        """
        start = coded.data_ptr()
        return self._plan.multiply(
            start + -start % _ALIGNMENT,
            rows,
            inputs,
            *weight.arguments,
            out.data_ptr(),
            address(bias),
            native.DTYPES[out.dtype],
            rounder,
            torch.get_num_threads(),
        )


class PackedRows:
    """A packed weight [outputs, inputs] as the kernels take it; good as long as its tensors stay where they are.

    Args:
        elements: uint8 [outputs, bytes], contiguous: packed codes.
        scales: uint8 [outputs, blocks], contiguous: codes.
        scale_of: float32 [256], what each stands for, times the smallest element.
        ends: the smallest and the largest of them that a block has which is not all zeros.
        unit: those are 2^(code - 127) times this; 0 where they are not.
    """

    def __init__(
        self, elements: Tensor, scales: Tensor, scale_of: Tensor, ends: tuple[float, float], unit: float
    ) -> None:
        self._kept = elements, scales, scale_of
        addresses = elements.data_ptr(), scales.data_ptr(), scale_of.data_ptr()
        outputs, row_bytes = elements.shape
        self.arguments = (*addresses, unit, outputs, row_bytes, *ends)


@functools.cache
def integer_product(weight: MXFormat, activation: MXFormat) -> IntegerProduct | None:
    """Return what multiplies the two formats; None where there is an :func:`obstacle`."""
    return None if obstacle(weight, activation) else IntegerProduct(weight, activation)
