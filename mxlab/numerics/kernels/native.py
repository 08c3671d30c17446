"""Both numerics in C++ for the CPU (``csrc/``): the bits of the reference, at about the speed of a copy.

The extension module is built when mxlab is installed; without a C++ compiler it is missing, and :data:`MISSING` says
so. It takes addresses instead of tensors, and so depends on no version of torch.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from mxlab.formats import ROUNDINGS, ElementFormat, MXFormat, Numerics, Rounding
from mxlab.numerics.kernels.compiled import SCALINGS, Compiled, Layout, address, carry, scaling

try:
    from mxlab.numerics.kernels import _native
except ImportError as e:
    MISSING: str | None = str(e)
else:
    MISSING = None
    for _runtime in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        _native.adopt_openmp(str(_runtime))

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Native(Compiled):
    def uniform(self, shape: torch.Size | tuple[int, ...], seed: int, device: torch.device) -> Tensor:
        return uniform(shape, seed)

    def _run(
        self, x: Tensor, out: Tensor, noise: Tensor | None, fmt: MXFormat, numerics: Numerics, layout: Layout
    ) -> None:
        addresses = x.data_ptr(), out.data_ptr(), address(noise)
        _quantizer(str(fmt), numerics).run(*addresses, _DTYPES[x.dtype], *layout, torch.get_num_threads())

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
        rounder = _rounder(element, rounding, subnormals, numerics)
        rounder.run(*addresses, _DTYPES[x.dtype], x.numel(), torch.get_num_threads())


_backend = _Native()
quantize, quantize_out, quantize_ = _backend.quantize, _backend.quantize_out, _backend.quantize_
round_elementwise = _backend.round_elementwise


def missing() -> str | None:
    """Why the backend is not there; None where it is."""
    return MISSING


def remedy() -> str:
    """What to do where the kernels are missing."""
    return "install a C++ compiler, then mxlab again"


def uniform(shape: torch.Size | tuple[int, ...], seed: int) -> Tensor:
    """What :func:`mxlab.numerics.philox.uniform` gives on the CPU."""
    out = torch.empty(shape, dtype=torch.float32)
    _native.uniform(out.data_ptr(), out.numel(), seed % 2**64, torch.get_num_threads())
    return out


def instruction_set() -> str:
    """The instruction set the kernels use: avx512, avx2 or portable."""
    return _native.instruction_set()


@functools.cache
def _quantizer(fmt: str, numerics: Numerics) -> _native.Quantizer:
    parsed = MXFormat.parse(fmt)
    kernel_format = _native.Format(
        _element(parsed.grid, parsed.limits[1]),
        parsed.scale_emax,
        parsed.flush_fp32_subnorms,
        carry(parsed),
        _element(parsed.scale_grid),
        parsed.scale_format.tensor_bits > 0,
    )
    rounding = ROUNDINGS.index(parsed.rounding)
    return _native.Quantizer(kernel_format, SCALINGS.index(scaling(parsed)), rounding, numerics == "microxcaling")


@functools.cache
def _rounder(element: ElementFormat, rounding: Rounding, subnormals: bool, numerics: Numerics) -> _native.Rounder:
    return _native.Rounder(_element(element), ROUNDINGS.index(rounding), subnormals, numerics == "microxcaling")


def _element(element: ElementFormat, largest: float | None = None) -> _native.Element:
    numbers = element.mantissa_bits, element.emax, element.min_normal
    return _native.Element(*numbers, element.max if largest is None else largest, element.is_int)
