"""The numerics as torch operators, which choose the backend by the device of the tensor.

torch.compile, torch.export and fake tensors see one opaque operator. The choice among the backends is made when the
operator runs; all of them give the same bits.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from mxlab.checks import check_choice
from mxlab.errors import FormatError
from mxlab.formats import (
    NUMERICS,
    ROUNDINGS,
    FormatFamily,
    MXFormat,
    NumberFormat,
    Numerics,
    Rounding,
    elementwise_format,
    parse_format,
)
from mxlab.numerics import families, microxcaling, reference
from mxlab.numerics.kernels import cuda, native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("auto", "reference", "native", "cuda")
_DEVICES = {"native": "cpu", "cuda": "cuda"}  # what a compiled backend computes on
_COMPILED: dict[str, Any] = {"native": native, "cuda": cuda}
logger = logging.getLogger("mxlab")

_library = torch.library.Library("mxlab", "DEF")
_library.define("quantize(Tensor x, str format, int[] axes, str numerics, str backend, int seed) -> Tensor")
_library.define(
    "quantize_out(Tensor x, Tensor(a!) out, str format, int[] axes, str numerics, str backend, int seed) -> ()"
)
_library.define("quantize_(Tensor(a!) x, str format, int[] axes, str numerics, str backend, int seed) -> ()")
_library.define(
    "round_elementwise(Tensor x, int bfloat, int fp, str rounding, bool subnormals, str numerics, str backend, "
    "int seed) -> Tensor"
)
_library.define("transform(Tensor x, Tensor matrices, str backend) -> Tensor")
_library.define(
    "transform_quantize(Tensor x, Tensor matrices, str format, str numerics, str backend, int seed) -> Tensor"
)
_library.define(
    "transform_quantize_out(Tensor x, Tensor matrices, Tensor(a!) out, str format, str numerics, str backend, "
    "int seed) -> ()"
)


def check(x: Tensor, numerics: str, backend: str) -> None:
    """Refuse what no backend computes.

    Raises:
        FormatError: an unsupported dtype, numerics or backend.
    """
    if x.dtype not in DTYPES:
        raise FormatError(f"cannot quantize {x.dtype}: cast the tensor to one of {', '.join(map(str, DTYPES))}")
    if numerics not in NUMERICS or backend not in BACKENDS:  # at once: a token's quantization takes microseconds
        check_choice("numerics", numerics, NUMERICS)
        check_choice("backend", backend, BACKENDS)


def check_matrices(x: Tensor, matrices: Tensor) -> None:
    """Refuse matrices that blocks of the last axis of ``x`` cannot be multiplied by.

    Raises:
        FormatError: a dtype other than float32, or a shape that does not fit.
    """
    length, ndim = x.size(-1) if x.ndim else 0, matrices.ndim
    rows, columns = (matrices.size(-2), matrices.size(-1)) if ndim in (2, 3) else (0, 0)
    fits = rows == columns > 0 and length % columns == 0 and (ndim == 2 or matrices.size(0) * columns == length)
    if not fits or matrices.dtype != torch.float32:
        raise FormatError(
            f"matrices are {matrices.dtype} of shape {tuple(matrices.shape)}: blocks of an axis of {length} take "
            "float32 of [size, size], or [blocks, size, size]"
        )


def parse(fmt: NumberFormat | str, numerics: str, backend: str) -> NumberFormat:
    """Return the format itself, or the one that is spelled.

    Raises:
        FormatError: no such format, or one of :mod:`mxlab.formats` with numerics or a backend that it has not.
    """
    fmt = parse_format(fmt)
    if isinstance(fmt, FormatFamily) and numerics == "microxcaling":
        raise FormatError(f"numerics is 'microxcaling', which does not have the format {fmt}: use 'exact'")
    if backend in _COMPILED and not _has_kernels(fmt):
        raise FormatError(f"backend is {backend!r}, which does not have the format {fmt}: use 'auto' or 'reference'")
    return fmt


def spelled(fmt: NumberFormat | str, numerics: str, backend: str) -> tuple[str, bool]:
    """Return the format's own text, by which an operator takes it, and whether it draws random numbers.

    Raises:
        FormatError: as :func:`parse`.
    """
    return _spelled_text(fmt, numerics, backend) if isinstance(fmt, str) else _spelled(fmt, numerics, backend)


def _spelled(fmt: NumberFormat | str, numerics: str, backend: str) -> tuple[str, bool]:
    parsed = parse(fmt, numerics, backend)
    return str(parsed), parsed.is_random


# torch.compile cannot follow how a text is read.
_spelled_text = torch.compiler.assume_constant_result(_spelled)


def _quantize(x: Tensor, fmt: str, axes: list[int], numerics: Numerics, backend: str, seed: int) -> Tensor:
    check(x, numerics, backend)
    parsed = parse(fmt, numerics, backend)
    if x.numel() == 0:
        return torch.empty_like(x)
    places = tuple(axis % x.ndim for axis in axes)
    if compiled := _compiled(x, parsed, backend):
        return compiled.quantize(x, parsed, places, seed, numerics)
    return _laid_out(x, _eager(numerics, parsed).quantize(x, parsed, places, seed))


def _quantize_in_place(x: Tensor, fmt: str, axes: list[int], numerics: Numerics, backend: str, seed: int) -> None:
    check(x, numerics, backend)
    parsed = parse(fmt, numerics, backend)
    if x.numel() == 0:
        return
    places = tuple(axis % x.ndim for axis in axes)
    if compiled := _compiled(x, parsed, backend):
        compiled.quantize_(x, parsed, places, seed, numerics)
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)  # written behind torch's back
    else:
        x.copy_(_eager(numerics, parsed).quantize(x, parsed, places, seed))


def _check_out(x: Tensor, out: Tensor) -> None:
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise FormatError(
            f"out is {out.dtype} of shape {tuple(out.shape)} on {out.device}: it must be as x is, "
            f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"
        )


def _quantize_out(
    x: Tensor, out: Tensor, fmt: str, axes: list[int], numerics: Numerics, backend: str, seed: int
) -> None:
    check(x, numerics, backend)
    _check_out(x, out)
    parsed = parse(fmt, numerics, backend)
    compiled = _compiled(x, parsed, backend)
    if compiled and len(axes) == 1 and x.numel() and x.is_contiguous() and out.is_contiguous():
        compiled.quantize_out(x, out, parsed, axes[0] % x.ndim, seed, numerics)
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)
    else:
        out.copy_(_quantize(x, fmt, axes, numerics, backend, seed))


def _round_elementwise(
    x: Tensor, bfloat: int, fp: int, rounding: Rounding, subnormals: bool, numerics: Numerics, backend: str, seed: int
) -> Tensor:
    check(x, numerics, backend)
    check_choice("rounding", rounding, ROUNDINGS)
    if numerics == "microxcaling":
        microxcaling.check_rounding(rounding)
    element = _elementwise_format(bfloat, fp)
    if element is None or x.numel() == 0:
        return x.clone()
    if compiled := _COMPILED.get(choose(x.device.type, backend)):
        return compiled.round_elementwise(x, element, rounding, subnormals, seed, numerics)
    return _laid_out(x, _eager(numerics).round_elementwise(x, element, rounding, subnormals, seed))


def _transform(x: Tensor, matrices: Tensor, backend: str) -> Tensor:
    check(x, "exact", backend)
    check_matrices(x, matrices)
    if _transforms(x, matrices, backend):
        return native.transform(x, matrices)
    blocks = x.to(torch.float32).unflatten(-1, (-1, matrices.shape[-1]))  # (..., n_blocks, size)
    made = blocks @ matrices if matrices.ndim == 2 else torch.einsum("...bj,bjk->...bk", blocks, matrices)
    return _laid_out(x, made.flatten(-2).to(x.dtype))


def _transform_quantize(x: Tensor, matrices: Tensor, fmt: str, numerics: Numerics, backend: str, seed: int) -> Tensor:
    check(x, numerics, backend)
    check_matrices(x, matrices)
    parsed = parse(fmt, numerics, backend)
    if _transforms(x, matrices, backend) and isinstance(parsed, MXFormat) and parsed.has_kernels:
        return native.transform_quantize(x, matrices, parsed, seed, numerics)
    return _quantize(_transform(x, matrices, backend), fmt, [-1], numerics, backend, seed)


def _transform_quantize_out(
    x: Tensor, matrices: Tensor, out: Tensor, fmt: str, numerics: Numerics, backend: str, seed: int
) -> None:
    check(x, numerics, backend)
    check_matrices(x, matrices)
    _check_out(x, out)
    parsed = parse(fmt, numerics, backend)
    is_served = _transforms(x, matrices, backend) and x.is_contiguous() and out.is_contiguous()
    if is_served and isinstance(parsed, MXFormat) and parsed.has_kernels:
        native.transform_quantize_out(x, matrices, out, parsed, seed, numerics)
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)
    else:
        out.copy_(_transform_quantize(x, matrices, fmt, numerics, backend, seed))


def _transforms(x: Tensor, matrices: Tensor, backend: str) -> bool:
    """Return whether the native backend transforms: the others leave that to torch, and it the large matrices."""
    is_native = choose(x.device.type, backend) == "native"
    return is_native and x.numel() > 0 and matrices.shape[-1] <= native.LARGEST_MATRIX


def _like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _laid_out(x: Tensor, result: Tensor) -> Tensor:
    """Return ``result`` with the strides that :func:`_like` promises."""
    return result if x.is_contiguous() else torch.empty_like(x).copy_(result)


_library.impl("quantize", _quantize, "CompositeExplicitAutograd")
_library.impl("quantize_out", _quantize_out, "CompositeExplicitAutograd")
_library.impl("quantize_", _quantize_in_place, "CompositeExplicitAutograd")
_library.impl("round_elementwise", _round_elementwise, "CompositeExplicitAutograd")
_library.impl("transform", _transform, "CompositeExplicitAutograd")
_library.impl("transform_quantize", _transform_quantize, "CompositeExplicitAutograd")
_library.impl("transform_quantize_out", _transform_quantize_out, "CompositeExplicitAutograd")
_library.impl("quantize", _like, "Meta")
_library.impl("quantize_out", lambda *_: None, "Meta")
_library.impl("quantize_", lambda *_: None, "Meta")
_library.impl("round_elementwise", _like, "Meta")
_library.impl("transform", _like, "Meta")
_library.impl("transform_quantize", _like, "Meta")
_library.impl("transform_quantize_out", lambda *_: None, "Meta")

quantize = torch.ops.mxlab.quantize.default
quantize_out = torch.ops.mxlab.quantize_out.default
quantize_ = torch.ops.mxlab.quantize_.default
round_elementwise = torch.ops.mxlab.round_elementwise.default
transform = torch.ops.mxlab.transform.default
transform_quantize = torch.ops.mxlab.transform_quantize.default
transform_quantize_out = torch.ops.mxlab.transform_quantize_out.default

_elementwise_format = functools.cache(elementwise_format)


@functools.cache
def choose(device: str, backend: str) -> str:
    """Return the backend that serves a device type: ``native``, ``cuda`` or ``reference``.

    Raises:
        FormatError: the backend asked for cannot serve the device, or is not there.
    """
    if backend in _COMPILED:
        serves, module = _DEVICES[backend], _COMPILED[backend]
        if device != serves:
            where = serves.upper()
            raise FormatError(
                f"backend is {backend!r}, which computes on {where} tensors; the tensor is on {device}: use 'auto'"
            )
        if reason := module.missing():
            raise FormatError(f"backend is {backend!r}, which is not there ({reason}): {module.remedy()}")
        return backend
    fastest = next((name for name, serves in _DEVICES.items() if serves == device), None)
    if backend == "reference" or fastest is None:
        return "reference"
    if reason := _COMPILED[fastest].missing():
        logger.warning(
            "the %s kernels are not there (%s); quantizing in eager torch, slowly: %s",
            fastest, reason, _COMPILED[fastest].remedy(),
        )  # fmt: skip
        return "reference"
    return fastest


def _compiled(x: Tensor, fmt: NumberFormat, backend: str) -> Any:
    """Return the compiled backend that serves the tensor, or None: not every format has kernels."""
    return _COMPILED.get(choose(x.device.type, backend)) if _has_kernels(fmt) else None


def _has_kernels(fmt: NumberFormat) -> bool:
    return isinstance(fmt, MXFormat) and fmt.has_kernels


def _eager(numerics: Numerics, fmt: NumberFormat | None = None) -> Any:
    if isinstance(fmt, FormatFamily):
        return families
    return reference if numerics == "exact" else microxcaling
