"""The one door to the numerics: :func:`quantize` and :func:`round_elementwise`.

``exact`` is the OCP specification; ``microxcaling`` is what the published emulator computes. Both run on every device,
through torch custom operators (:mod:`mxlab.numerics.operators`), so that torch.compile and torch.export see them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from mxlab.checks import check_choice
from mxlab.errors import FormatError
from mxlab.formats import ROUNDINGS, ElementFormat, MXFormat, NumberFormat, Numerics, Rounding, elementwise_format
from mxlab.numerics import microxcaling, operators, reference

DTYPES = operators.DTYPES


def quantize(
    x: Tensor,
    fmt: NumberFormat | str,
    *,
    axis: int | Sequence[int] = -1,
    numerics: Numerics = "exact",
    backend: str = "auto",
    seed: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Round ``x`` to a microscaling format, or to one of :mod:`mxlab.formats`.

    Args:
        x: float32, bfloat16 or float16, any shape.
        fmt: the format, or its spelling (``"fp4_e2m1@32"``, ``"integer,width=8,frac=4"``).
        axis: the axis along which blocks lie, or means are taken; several axes form joint tiles of ``block_size`` a
            side.
        numerics: ``exact`` or ``microxcaling``; the quantizers have ``exact`` only.
        backend: ``native`` (C++, CPU), ``cuda`` (CUDA C++, NVIDIA GPUs), ``reference`` (eager torch, every device),
            or ``auto`` for the fastest there is. All give the same bits. The quantizers, and the scale rules
            ``four_thirds`` and ``quest``, have ``reference`` only.
        seed: of ``dither`` rounding and of stochastic signs; None draws one from torch's global generator. Ignored by
            all else.
        out: where to write the result, a tensor of the shape, dtype and device of ``x``.

    Returns:
        A new tensor laid out as ``torch.empty_like(x)``, whose gradient passes straight through; or ``out``, which
        carries no gradient.

    Raises:
        FormatError: an unsupported dtype, format, axis, numerics or backend; an ``out`` that does not fit, or with an
            ``x`` that requires a gradient.

    A format with a scale for the tensor (``scale=e4m3``) takes that from all of ``x``, whatever the axis. In the
    ``exact`` numerics no finite block becomes infinite: what the dtype of ``x`` cannot hold becomes its largest value.

    Source: OCP Microscaling Formats (MX) v1.0, section 6.3; :mod:`mxlab.formats.scales` for the other rules and scales.
    """
    check(x, numerics, backend)
    text, is_random = operators.spelled(fmt, numerics, backend)
    axes = _axes(x, axis)
    if out is not None:
        if x.requires_grad and torch.is_grad_enabled():
            raise FormatError("x requires a gradient, which cannot pass through out: leave out away, or use no_grad")
        operators.quantize_out(x, out, text, axes, numerics, backend, drawn_seed(is_random, seed))
        return out
    if x.numel() == 0:
        return x.clone()
    seed = drawn_seed(is_random, seed)
    return _straight_through(operators.quantize, x, text, axes, numerics, backend, seed)


def quantize_(
    x: Tensor,
    fmt: NumberFormat | str,
    *,
    axis: int | Sequence[int] = -1,
    numerics: Numerics = "exact",
    backend: str = "auto",
    seed: int | None = None,
) -> Tensor:
    """Quantize as :func:`quantize`, in place: ``x`` itself is overwritten and returned.

    Raises:
        FormatError: as :func:`quantize`; or ``x`` requires a gradient, which cannot pass through what is overwritten.
    """
    check(x, numerics, backend)
    text, is_random = operators.spelled(fmt, numerics, backend)
    axes = _axes(x, axis)
    if x.requires_grad and torch.is_grad_enabled():
        raise FormatError("x requires a gradient: quantize it in place under torch.no_grad(), or use quantize")
    if x.numel():
        operators.quantize_(x, text, axes, numerics, backend, drawn_seed(is_random, seed))
    return x


def round_elementwise(
    x: Tensor,
    *,
    bfloat: int = 0,
    fp: int = 0,
    rounding: Rounding = "nearest",
    subnormals: bool = True,
    numerics: Numerics = "exact",
    backend: str = "auto",
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
        backend: as in :func:`quantize`.
        seed: as in :func:`quantize`.

    Returns:
        A new tensor laid out as ``torch.empty_like(x)``; what overflows the format becomes infinite, what only the
        dtype cannot hold saturates. Its gradient passes straight through.

    Raises:
        FormatError: an unsupported dtype, width, rounding, numerics or backend; ``bfloat`` together with ``fp``.
    """
    element = elementwise_format(bfloat, fp)
    check_choice("rounding", rounding, ROUNDINGS)
    if not isinstance(subnormals, bool):
        raise FormatError(f"subnormals is {subnormals!r}: it must be true or false")
    check(x, numerics, backend)
    if numerics == "microxcaling":
        microxcaling.check_rounding(rounding)
    if element is None or x.numel() == 0:
        return x.clone()
    seed = drawn_seed(rounding == "dither", seed)
    return _straight_through(operators.round_elementwise, x, bfloat, fp, rounding, subnormals, numerics, backend, seed)


def is_lossless(element: ElementFormat, dtype: torch.dtype) -> bool:
    """Return whether every finite value of ``dtype`` is a value of ``element``, subnormals included."""
    info = torch.finfo(dtype)
    smallest = element.min_normal * 2.0**-element.mantissa_bits
    return info.max <= element.max and info.eps >= 2.0**-element.mantissa_bits and info.tiny * info.eps >= smallest


def scale_clamps(x: Tensor, fmt: MXFormat, axis: int | Sequence[int] = -1) -> dict[str, int]:
    """Return how many blocks of ``x`` want a scale outside the range of its format.

    Returns:
        ``blocks``: those that are not all zero, NaN or infinite; ``clamped``: of these, how many are raised to the
        smallest scale; ``overflowed``: how many want a larger scale than there is. These become NaN where the scale is
        a power of two, and saturate at the largest where it is a floating-point number.
    """
    cut = reference.block_layout(x, fmt, _axes(x, axis))
    if x.numel() == 0:
        return {"blocks": 0, "clamped": 0, "overflowed": 0}
    counted = reference.out_of_range(cut.split(x.detach().to(torch.float32)), fmt)
    return dict(zip(("blocks", "clamped", "overflowed"), (int(c.sum()) for c in counted), strict=True))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Any, x: Tensor, *settings: Any) -> Tensor:
        return function(x, *settings)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        return None, grad[0], *[None] * (len(ctx.needs_input_grad) - 2)


def _straight_through(function: Any, x: Tensor, *settings: Any) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return _StraightThrough.apply(function, x, *settings)  # pyright: ignore[reportReturnType]
    return function(x, *settings)


def _axes(x: Tensor, axis: int | Sequence[int]) -> tuple[int, ...]:
    """Return the axes as ascending non-negative numbers; a tile does not depend on the order they are named in."""
    if (
        isinstance(axis, int) and axis == -1 and x.ndim
    ):  # the usual case, at once: a token's quantization takes microseconds
        return (x.ndim - 1,)
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


def check(x: Tensor, numerics: str, backend: str) -> None:
    """Raise FormatError for what is no dense tensor of a dtype that can be quantized, and as the operators do."""
    if not isinstance(x, Tensor):
        raise FormatError(f"x is a {type(x).__name__}: make it a tensor first, with torch.as_tensor")
    if x.layout != torch.strided:
        raise FormatError(f"the layout of x is {x.layout}: quantize x.to_dense()")
    operators.check(x, numerics, backend)


def drawn_seed(is_random: bool, seed: int | None) -> int:
    """Return the seed as an operator takes it, drawn from torch's generator where it is needed and not given."""
    if not is_random:
        return 0
    if seed is None:
        return int(torch.randint(2**63 - 1, ()))
    try:
        seed = operator.index(seed)
    except TypeError:
        raise FormatError(f"seed is {seed!r}: it must be a whole number, or None") from None
    return (seed + 2**63) % 2**64 - 2**63  # the 64 bits that count, as the operator's signed integer
