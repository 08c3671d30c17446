"""The one door to the numerics: :func:`quantize` and :func:`round_elementwise`.

``exact`` is the OCP specification; ``microxcaling`` is what the published emulator computes. Both run on every device.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import SupportsIndex

import torch
from torch import Tensor

from mxlab.backends import microxcaling, reference
from mxlab.errors import FormatError
from mxlab.formats import (
    NUMERICS,
    ROUNDINGS,
    ElementFormat,
    MXFormat,
    Numerics,
    Rounding,
    check_choice,
    elementwise_format,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("auto", "reference")
_NUMERICS: dict[str, ModuleType] = {"exact": reference, "microxcaling": microxcaling}


def quantize(
    x: Tensor,
    fmt: MXFormat | str,
    *,
    axis: int | Sequence[int] = -1,
    numerics: Numerics = "exact",
    backend: str = "auto",
    seed: int | None = None,
) -> Tensor:
    """Round ``x`` to a microscaling format.

    Args:
        x: float32, bfloat16 or float16, any shape.
        fmt: the format, or its spelling (``"fp4_e2m1@32"``).
        axis: the axis along which blocks lie; several axes form joint tiles of ``block_size`` a side.
        numerics: ``exact`` or ``microxcaling``.
        backend: ``reference`` (eager torch), or ``auto`` for the fastest there is.
        seed: of ``dither`` rounding; None draws one from torch's global generator. Ignored by the other roundings.

    Returns:
        A new tensor of the same shape and dtype. Its gradient passes straight through.

    Raises:
        FormatError: an unsupported dtype, format, axis, numerics or backend.

    Source: OCP Microscaling Formats (MX) v1.0, section 6.3.
    """
    fmt = MXFormat.parse(fmt)
    axes = _axes(x, axis)
    module = _module(x, numerics, backend)
    seed = _seed(fmt.rounding, seed)
    return _straight_through(x, lambda t: module.quantize(t, fmt, axes, seed))


def round_elementwise(
    x: Tensor,
    *,
    bfloat: int = 0,
    fp: int = 0,
    rounding: Rounding = "nearest",
    subnormals: bool = True,
    numerics: Numerics = "exact",
    seed: int | None = None,
) -> Tensor:
    """Round every element of ``x`` on its own to a ``bfloat``- or ``fp``-bit floating-point number.

    Args:
        x: float32, bfloat16 or float16, any shape.
        bfloat: total bits of a format with 8 exponent bits, 10 to 32 (32 changes nothing); 0 for none.
        fp: total bits of a format with 5 exponent bits, 7 to 29; 0 for none.
        rounding: as in :class:`~mxlab.formats.MXFormat`.
        subnormals: whether numbers below the smallest normal one are kept, or become zero.
        numerics: ``exact`` or ``microxcaling``.
        seed: as in :func:`quantize`.

    Returns:
        A new tensor of the same shape and dtype; what overflows becomes infinite. Its gradient passes straight through.

    Raises:
        FormatError: an unsupported dtype, width, rounding or numerics; ``bfloat`` together with ``fp``.
    """
    element = elementwise_format(bfloat, fp)
    check_choice("rounding", rounding, ROUNDINGS)
    module = _module(x, numerics)
    if element is None:
        return x.clone()
    seed = _seed(rounding, seed)
    return _straight_through(x, lambda t: module.round_elementwise(t, element, rounding, subnormals, seed))


def is_lossless(element: ElementFormat, dtype: torch.dtype) -> bool:
    """Whether every finite value of ``dtype`` is a value of ``element``, subnormals included."""
    info = torch.finfo(dtype)
    smallest = element.min_normal * 2.0**-element.mantissa_bits
    return info.max <= element.max and info.eps >= 2.0**-element.mantissa_bits and info.tiny * info.eps >= smallest


def scale_clamps(x: Tensor, fmt: MXFormat, axis: int | Sequence[int] = -1) -> dict[str, int]:
    """How many blocks of ``x`` want a shared exponent outside the range of ``scale_bits``.

    Returns:
        ``blocks``: those that are not all zero, NaN or infinite; ``clamped``: of these, how many are raised to the
        smallest scale; ``overflowed``: how many become NaN because their scale is too large.
    """
    cut = reference.block_layout(x, fmt, _axes(x, axis))
    amax = cut.split(x.detach().to(torch.float32)).abs().amax(-1)
    exponent = reference.unclamped_exponent(amax, fmt)[(amax > 0) & amax.isfinite()]
    return {
        "blocks": exponent.numel(),
        "clamped": int((exponent < -fmt.scale_emax).sum()),
        "overflowed": int((exponent > fmt.scale_emax).sum()),
    }


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx, *grad: Tensor) -> tuple[Tensor, None]:
        return grad[0], None


def _straight_through(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    if x.numel() == 0:
        return x.clone()
    if x.requires_grad and torch.is_grad_enabled():
        return _StraightThrough.apply(x, function)  # pyright: ignore[reportReturnType]
    return function(x)


def _axes(x: Tensor, axis: int | Sequence[int]) -> tuple[int, ...]:
    """The axes as ascending non-negative numbers; a tile does not depend on the order they are named in."""
    named = tuple(axis) if isinstance(axis, Iterable) else (axis,)
    if x.ndim == 0:
        raise FormatError("a 0-dimensional tensor has no axis to quantize along: reshape it to (1,)")
    if not named or any(
        isinstance(a, bool) or not isinstance(a, SupportsIndex) or not -x.ndim <= a < x.ndim for a in named
    ):
        raise FormatError(f"axis is {axis!r}: a tensor of shape {tuple(x.shape)} has axes {-x.ndim} to {x.ndim - 1}")
    axes = tuple(sorted(operator.index(a) % x.ndim for a in named))
    if len(set(axes)) < len(axes):
        raise FormatError(f"axis is {axis!r}: it names an axis of the shape {tuple(x.shape)} twice")
    return axes


def _module(x: Tensor, numerics: str, backend: str = "auto") -> ModuleType:
    if x.dtype not in DTYPES:
        raise FormatError(f"cannot quantize {x.dtype}: cast the tensor to one of {', '.join(map(str, DTYPES))}")
    check_choice("numerics", numerics, NUMERICS)
    check_choice("backend", backend, BACKENDS)
    return _NUMERICS[numerics]


def _seed(rounding: str, seed: int | None) -> int:
    if rounding != "dither":
        return 0
    return int(torch.randint(2**63 - 1, ())) if seed is None else seed
