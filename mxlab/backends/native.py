"""Both numerics in C++ for the CPU (``csrc/``): the bits of the reference, at about the speed of a copy.

The extension module is built when mxlab is installed; without a C++ compiler it is missing, and :data:`MISSING` says
so. It takes addresses instead of tensors, and so depends on no version of torch.
"""

from __future__ import annotations

import functools
import math
import operator

import torch
from torch import Tensor

from mxlab.backends import microxcaling
from mxlab.backends.blocks import Blocks
from mxlab.backends.reference import block_layout
from mxlab.formats import ROUNDINGS, ElementFormat, MXFormat, Numerics, Rounding

try:
    from mxlab.backends import _native
except ImportError as e:
    MISSING: str | None = str(e)
else:
    MISSING = None

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def quantize(x: Tensor, fmt: MXFormat, axes: tuple[int, ...], seed: int, numerics: Numerics) -> Tensor:
    """``x`` on the CPU rounded to ``fmt`` in blocks along ``axes`` (non-negative); laid out as ``torch.empty_like(x)``.

    Raises:
        FormatError: as :func:`mxlab.backends.microxcaling.quantize`.
    """
    _check(fmt, x, numerics)
    if len(axes) > 1:
        return _quantize_tiles(x, fmt, axes, seed, numerics)
    x, out = _dense(x), torch.empty_like(x)
    _run(x, out, _noise(x, fmt.rounding, seed), fmt, min(axes), numerics)
    return out


def quantize_(x: Tensor, fmt: MXFormat, axes: tuple[int, ...], seed: int, numerics: Numerics) -> None:
    """As :func:`quantize`, in place."""
    if len(axes) == 1 and _is_dense(x):
        _check(fmt, x, numerics)
        _run(x, x, _noise(x, fmt.rounding, seed), fmt, axes[0], numerics)
    else:
        x.copy_(quantize(x, fmt, axes, seed, numerics))


def round_elementwise(
    x: Tensor, element: ElementFormat, rounding: Rounding, subnormals: bool, seed: int, numerics: Numerics
) -> Tensor:
    """Each value of ``x``, on the CPU, rounded to ``element`` on its own; laid out as ``torch.empty_like(x)``."""
    x, out = _dense(x), torch.empty_like(x)
    noise = _noise(x, rounding, seed)
    rounder = _rounder(element, rounding, subnormals, numerics)
    rounder.run(x.data_ptr(), out.data_ptr(), _address(noise), _DTYPES[x.dtype], x.numel(), torch.get_num_threads())
    return out


def uniform(shape: torch.Size | tuple[int, ...], seed: int) -> Tensor:
    """What :func:`mxlab.backends.philox.uniform` gives on the CPU."""
    out = torch.empty(shape, dtype=torch.float32)
    _native.uniform(out.data_ptr(), out.numel(), seed % 2**64, torch.get_num_threads())
    return out


def instruction_set() -> str:
    """The instruction set the kernels use: avx512, avx2 or portable."""
    return _native.instruction_set()


def _check(fmt: MXFormat, x: Tensor, numerics: Numerics) -> None:
    if numerics == "microxcaling":
        microxcaling.check_fits(fmt.element_format, x.dtype)


def _quantize_tiles(x: Tensor, fmt: MXFormat, axes: tuple[int, ...], seed: int, numerics: Numerics) -> Tensor:
    """Joint tiles of several axes: laid out as rows, one tile each."""
    cut: Blocks = block_layout(x, fmt, axes)
    tiles = cut.split(x).contiguous()  # (..., n_tiles, elements)
    noise = _noise(x, fmt.rounding, seed)
    if noise is not None:
        noise = cut.split(noise).contiguous()
    out = torch.empty_like(tiles)
    _run(tiles, out, noise, fmt, tiles.ndim - 1, numerics, block=tiles.shape[-1])
    return torch.empty_like(x).copy_(cut.join(out))


def _run(
    x: Tensor, out: Tensor, noise: Tensor | None, fmt: MXFormat, axis: int, numerics: Numerics, block: int | None = None
) -> None:
    shape = x.shape
    if not x.is_contiguous():
        order = _memory_order(x)
        shape, axis = [shape[i] for i in order], order.index(axis)
    length, inner = shape[axis], math.prod(shape[axis + 1 :])
    if block is None:
        block = 1 if fmt.scale_rule == "none" else min(fmt.block_size or length, length)
    _quantizer(str(fmt), numerics).run(
        x.data_ptr(),
        out.data_ptr(),
        _address(noise),
        _DTYPES[x.dtype],
        x.numel() // (length * inner),
        length,
        inner,
        block,
        torch.get_num_threads(),
    )


def _memory_order(x: Tensor) -> list[int]:
    """The axes of ``x`` from the largest stride to the smallest."""
    return sorted(range(x.ndim), key=x.stride().__getitem__, reverse=True)


def _is_dense(x: Tensor) -> bool:
    """Whether ``x`` fills its memory without gaps or overlaps, its axes in some order."""
    return x.is_contiguous() or x.permute(_memory_order(x)).is_contiguous()


def _dense(x: Tensor) -> Tensor:
    """``x``, or a copy without gaps or overlaps whose axes have the same order in memory."""
    return x if _is_dense(x) else torch.empty_like(x).copy_(x)


def _address(noise: Tensor | None) -> int:
    return 0 if noise is None else noise.data_ptr()


def _noise(x: Tensor, rounding: Rounding, seed: int) -> Tensor | None:
    """A number for each element, by its logical index, but in the order in memory of ``x``, which is dense."""
    if rounding != "dither":
        return None
    noise = uniform(x.shape, seed)
    return noise if x.is_contiguous() else torch.empty_like(x, dtype=torch.float32).copy_(noise)


@functools.cache
def _quantizer(fmt: str, numerics: Numerics) -> _native.Quantizer:
    parsed = MXFormat.parse(fmt)
    return _native.Quantizer(
        _element(parsed.element_format),
        parsed.scale_emax,
        parsed.flush_fp32_subnorms,
        ROUNDINGS.index(parsed.rounding),
        numerics == "microxcaling",
    )


@functools.cache
def _rounder(element: ElementFormat, rounding: Rounding, subnormals: bool, numerics: Numerics) -> _native.Rounder:
    return _native.Rounder(_element(element), ROUNDINGS.index(rounding), subnormals, numerics == "microxcaling")


def _element(element: ElementFormat) -> _native.Element:
    numbers = operator.attrgetter("mantissa_bits", "emax", "min_normal", "max", "is_int")(element)
    return _native.Element(*numbers)
