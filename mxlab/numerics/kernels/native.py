"""Compute both numerics in C++ on the CPU (``csrc/``), with the bits of the reference, at about the speed of a copy.

The extension module is built when mxlab is installed; without a C++ compiler it is missing, and :data:`MISSING` says
why. It takes addresses instead of tensors, and so does not depend on the version of torch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxlab.formats import ElementFormat, MXFormat, Numerics, Rounding
from mxlab.numerics.kernels.compiled import Compiled, Layout, address, carry, dense_rows, scaling

try:
    from mxlab.numerics.kernels import _native
except ImportError as e:
    MISSING: str | None = str(e)
else:
    MISSING = None
    for _runtime in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        _native.adopt_openmp(str(_runtime))

LARGEST_MATRIX = 128  # that :func:`transform` multiplies by

# Passed as integers: converting an enum takes time in every call.
DTYPES = {} if MISSING else {getattr(torch, dtype.name): dtype.value for dtype in _native.Dtype}


class _Native(Compiled):
    def uniform(self, shape: torch.Size | tuple[int, ...], seed: int, device: torch.device) -> Tensor:
        out = torch.empty(shape, dtype=torch.float32)
        _native.uniform(out.data_ptr(), out.numel(), seed % 2**64, torch.get_num_threads())
        return out

    def _run(
        self, x: Tensor, out: Tensor, noise: Tensor | None, fmt: MXFormat, numerics: Numerics, layout: Layout
    ) -> None:
        addresses = x.data_ptr(), out.data_ptr(), address(noise)
        _quantize_plan(str(fmt), numerics).run(*addresses, DTYPES[x.dtype], *layout, torch.get_num_threads())

    def _run_elementwise(
        self,
        x: Tensor,
        out: Tensor,
        noise: Tensor | None,
        element: ElementFormat,
        rounding: Rounding,
        subnormals: bool,
        numerics: Numerics,
    ) -> None:
        addresses = x.data_ptr(), out.data_ptr(), address(noise)
        plan = round_plan(element, rounding, subnormals, numerics)
        plan.run(*addresses, DTYPES[x.dtype], x.numel(), torch.get_num_threads())

    def transform(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Return the blocks of rows times matrices, as :func:`mxlab.numerics.transforms.transform`; x is not empty."""
        rows = dense_rows(x)
        out, matrices = torch.empty_like(rows), matrices.contiguous()
        size, length = matrices.shape[-1], x.shape[-1]
        addresses = rows.data_ptr(), out.data_ptr(), matrices.data_ptr()
        shape = rows.numel() // length, length
        _native.transform(*addresses, DTYPES[x.dtype], size, matrices.ndim == 2, *shape, torch.get_num_threads())
        return out if rows is x else torch.empty_like(x).copy_(out)

    def transform_quantize(self, x: Tensor, matrices: Tensor, fmt: MXFormat, seed: int, numerics: Numerics) -> Tensor:
        """Return what :meth:`transform` does, quantized to ``fmt`` along the last axis."""
        rows = dense_rows(x)
        out = torch.empty_like(rows)
        self.transform_quantize_out(rows, matrices, out, fmt, seed, numerics)
        return out if rows is x else torch.empty_like(x).copy_(out)

    def transform_quantize_out(
        self, x: Tensor, matrices: Tensor, out: Tensor, fmt: MXFormat, seed: int, numerics: Numerics
    ) -> None:
        """Write that into ``out``, which is laid out as ``x``, whose rows are dense."""
        layout, matrices = self._checked_layout(x, fmt, numerics), matrices.contiguous()
        noise = self._noise(x, fmt.rounding, seed)
        addresses = x.data_ptr(), out.data_ptr(), address(noise), matrices.data_ptr()
        shape = layout.outer, layout.axis, layout.block
        _quantize_plan(str(fmt), numerics).run_transformed(
            *addresses, DTYPES[x.dtype], matrices.shape[-1], matrices.ndim == 2, *shape, torch.get_num_threads()
        )


_backend = _Native()
quantize, quantize_out, quantize_ = _backend.quantize, _backend.quantize_out, _backend.quantize_
round_elementwise, uniform = _backend.round_elementwise, _backend.uniform
transform, transform_quantize = _backend.transform, _backend.transform_quantize
transform_quantize_out = _backend.transform_quantize_out


def settle(weight: Tensor, scales: Tensor, factors: Tensor, fmt: MXFormat) -> Tensor:
    """Quantize inputs of a weight one after the other: :func:`mxlab.ptq.gptq.settle_in_torch` in C++, bit for bit.

    Args:
        weight: float32 [inputs, outputs], contiguous, at most 128 inputs; overwritten by what is on the grid.
        scales: float32 [inputs, outputs], contiguous.
        factors: float32 [inputs, inputs], contiguous.
        fmt: a format that has kernels and does not draw random numbers.
    """
    errors = torch.empty_like(weight)
    addresses = weight.data_ptr(), scales.data_ptr(), factors.data_ptr(), errors.data_ptr()
    inputs, outputs = weight.shape
    lowest, largest = fmt.limits
    element, rounding = _element(fmt.grid, largest), _native.Rounding[fmt.rounding]
    _native.settle(*addresses, inputs, outputs, element, -lowest, rounding, torch.get_num_threads())
    return errors


def missing() -> str | None:
    """Return why the backend is missing; None where it is there."""
    return MISSING


def remedy() -> str:
    """Return what to do where the kernels are missing."""
    return "install a C++ compiler, then mxlab again"


def instruction_set() -> str:
    """Return the instruction set that the kernels use: avx512, avx2 or portable."""
    return _native.instruction_set()


def dot_element(fmt: MXFormat, integers: Sequence[int] = ()) -> _native.DotElement:
    """Return what the codes of a format are for the kernels of packed weights.

    Args:
        fmt: the format.
        integers: what each code is as a multiple of the smallest element; none where those are too large.
    """
    offset = -min(integers, default=0)
    return _native.DotElement(fmt.element_bits, fmt.grid.is_int, offset, [i + offset for i in integers])


def product_plan(
    activation: MXFormat, largest_input: int, weight: MXFormat, integers: Sequence[int]
) -> _native.ProductPlan:
    """Return what multiplies activations by packed weights: see :mod:`mxlab.numerics.kernels.products`.

    Args:
        activation: the format of the activation.
        largest_input: the largest magnitude of its elements, as a multiple of the smallest.
        weight: the format of the weight.
        integers: what each code of it is, as a multiple of the smallest element.
    """
    return _native.ProductPlan(
        _format(activation),
        _native.Scaling[scaling(activation)],
        _native.Rounding[activation.rounding],
        largest_input,
        dot_element(weight, integers),
        max(map(abs, integers)),
        weight.elements_per_scale,
    )


def packed_heads(*arguments: Any) -> _native.PackedHeads:
    """Return the kernels' view of packed keys or values: see :mod:`mxlab.numerics.kernels.attention`."""
    return _native.PackedHeads(*arguments)


def pack(
    x: Tensor, fmt: MXFormat, elements: Tensor, scales: Tensor, shape: tuple[int, int, int, int], nan_scale: int
) -> float:
    """Quantize rows and pack their codes: see :mod:`mxlab.numerics.kernels.packing`.

    Args:
        x: contiguous, rows of the length.
        fmt: a format that has kernels, of at most eight bits, and does not draw random numbers.
        elements: where the codes go, uint8.
        scales: where the scales go, uint8.
        shape: rows, length, elements of a block, bytes of a row.
        nan_scale: the code of a scale that is not a number.

    Returns:
        The scale of the tensor, 1 where the format has none.
    """
    rules = _format(fmt), _native.Scaling[scaling(fmt)], _native.Rounding[fmt.rounding]
    addresses = elements.data_ptr(), scales.data_ptr()
    return _native.pack(
        x.data_ptr(), DTYPES[x.dtype], *addresses, *shape, fmt.element_bits, nan_scale, *rules, torch.get_num_threads()
    )


def unpack(
    elements: Tensor,
    scales: Tensor,
    scale_of: Tensor,
    out: Tensor,
    shape: tuple[int, int, int],
    element: _native.DotElement,
    values: Tensor | None,
) -> None:
    """Write the values of packed codes into ``out``, rows of the length, contiguous.

    Args:
        elements: uint8 [rows, bytes], contiguous.
        scales: uint8 [rows, blocks], contiguous.
        scale_of: float32 [256], what each code of a scale stands for; for integers, times the smallest element.
        out: float32, bfloat16 or float16.
        shape: rows, length, elements of a block.
        element: what :func:`dot_element` gave.
        values: float32 [256], what each code is where it has no integers; else None.
    """
    addresses = elements.data_ptr(), scales.data_ptr(), scale_of.data_ptr()
    codes = elements.shape[-1], element, address(values)
    _native.unpack(*addresses, *shape, *codes, out.data_ptr(), DTYPES[out.dtype], torch.get_num_threads())


@functools.cache
def _quantize_plan(fmt: str, numerics: Numerics) -> _native.QuantizePlan:
    parsed = MXFormat.parse(fmt)
    return _native.QuantizePlan(
        _format(parsed),
        _native.Scaling[scaling(parsed)],
        _native.Rounding[parsed.rounding],
        _native.Numerics[numerics],
    )


def _format(fmt: MXFormat) -> _native.Format:
    return _native.Format(
        _element(fmt.grid, fmt.limits[1]),
        fmt.scale_emax,
        fmt.flush_fp32_subnorms,
        carry(fmt),
        _element(fmt.scale_grid),
        fmt.scale_format.tensor_bits > 0,
    )


@functools.cache
def round_plan(element: ElementFormat, rounding: Rounding, subnormals: bool, numerics: Numerics) -> _native.RoundPlan:
    """Return what rounds values one by one."""
    return _native.RoundPlan(_element(element), _native.Rounding[rounding], subnormals, _native.Numerics[numerics])


def _element(element: ElementFormat, largest: float | None = None) -> _native.Element:
    numbers = element.mantissa_bits, element.emax, element.min_normal
    return _native.Element(*numbers, element.max if largest is None else largest, element.is_int)
