"""Element-wise rounding under microxcaling's names and signatures."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, get_args

import torch
from torch import Tensor

from mxlab.checks import check_choice
from mxlab.compat.mx.formats import _get_format_params, _get_max_norm
from mxlab.compat.mx.specs import resolved
from mxlab.errors import FormatError
from mxlab.formats import MICROXCALING_ROUNDINGS, ElementFormat, Numerics, Rounding, elementwise_format
from mxlab.formats.elements import Specials
from mxlab.numerics import microxcaling, operators, reference, round_elementwise


def numerics_of(custom_cuda: bool) -> Numerics:
    """microxcaling's kernels compute the ``exact`` numerics; its torch path is the ``microxcaling`` numerics."""
    return "exact" if custom_cuda else "microxcaling"


def quantize_elemwise_op(A: Tensor, mx_specs: Mapping[str, Any] | None, round: Rounding | None = None) -> Tensor:
    """``A`` rounded to what ``bfloat`` or ``fp`` says, in its own dtype; ``A`` itself where that is nothing.

    Args:
        A: float32, bfloat16 or float16, any shape.
        mx_specs: the options; None rounds nothing.
        round: the rounding; None takes the option ``round``.

    Returns:
        A tensor like ``A``, whose gradient passes straight through.

    Raises:
        FormatError: a width that does not exist, ``bfloat`` with ``fp``, an unknown rounding or dtype.
    """
    if mx_specs is None:
        return A
    specs = resolved(mx_specs)
    if elementwise_format(specs["bfloat"], specs["fp"]) is None:
        return A
    return round_elementwise(
        A,
        bfloat=specs["bfloat"],
        fp=specs["fp"],
        rounding=round or specs["round"],
        subnormals=specs["bfloat_subnorms"],
        numerics=numerics_of(specs["custom_cuda"]),
    )


def _quantize_bfloat(
    A: Tensor, bfloat: int, round: Rounding = "nearest", custom_cuda: bool = False, allow_denorm: bool = True
) -> Tensor:
    """Round ``A`` to 8 exponent bits and ``bfloat`` bits in all; 0 and 32 leave it unchanged."""
    if bfloat in (0, 32):
        return A
    return _quantize_elemwise_core(
        A, bfloat - 7, 8, _get_max_norm(8, bfloat - 7), round, allow_denorm=allow_denorm, custom_cuda=custom_cuda
    )


def _quantize_fp(
    A: Tensor,
    exp_bits: int | None = None,
    mantissa_bits: int | None = None,
    round: Rounding = "nearest",
    custom_cuda: bool = False,
    allow_denorm: bool = True,
) -> Tensor:
    """Round ``A`` to an IEEE format; ``mantissa_bits`` are the explicit ones."""
    if exp_bits is None or mantissa_bits is None:
        return A
    max_norm = _get_max_norm(exp_bits, mantissa_bits + 2)
    return _quantize_elemwise_core(
        A, mantissa_bits + 2, exp_bits, max_norm, round, allow_denorm=allow_denorm, custom_cuda=custom_cuda
    )


def _quantize_elemwise(
    A: Tensor,
    elem_format: str | Enum | None,
    round: Rounding = "nearest",
    custom_cuda: bool = False,
    saturate_normals: bool = False,
    allow_denorm: bool = True,
) -> Tensor:
    """Round ``A`` to an element format, without a scale."""
    if elem_format is None:
        return A
    exp_bits, bits, _, max_norm, _ = _get_format_params(elem_format)
    return _quantize_elemwise_core(A, bits, exp_bits, max_norm, round, saturate_normals, allow_denorm, custom_cuda)


def _quantize_elemwise_core(
    A: Tensor,
    bits: int,
    exp_bits: int,
    max_norm: float,
    round: Rounding = "nearest",
    saturate_normals: bool = False,
    allow_denorm: bool = True,
    custom_cuda: bool = False,
) -> Tensor:
    """Return each value of ``A`` rounded on its own; no gradient.

    Args:
        A: float32, bfloat16 or float16, any shape.
        bits: mantissa bits, the sign and the leading one included.
        exp_bits: exponent bits; 0 for integers.
        max_norm: the largest number.
        round: the rounding.
        saturate_normals: whether finite values beyond ``max_norm`` become it, as integers always do, or infinite.
        allow_denorm: whether subnormals are kept, or become zero.
        custom_cuda: ``exact`` numerics instead of ``microxcaling``.

    Raises:
        FormatError: an unknown rounding or dtype, or no format with these bits reaches ``max_norm``.
    """
    element = _element(bits, exp_bits, max_norm)
    numerics = numerics_of(custom_cuda)
    operators.check(A, numerics, "reference")
    check_choice("round", round, MICROXCALING_ROUNDINGS)
    seed = int(torch.randint(2**63 - 1, ())) if round == "dither" else 0
    backend = reference if custom_cuda else microxcaling
    with torch.no_grad():
        y = backend.round_elementwise(A, element, round, allow_denorm or element.is_int, seed)
        if saturate_normals or element.is_int:
            y = torch.where(A.isinf(), A, y.clamp(-max_norm, max_norm))
    return y


def _element(bits: int, exp_bits: int, max_norm: float) -> ElementFormat:
    rows = [ElementFormat(f"e{exp_bits}m{bits - 2}", exp_bits, bits - 2, specials) for specials in get_args(Specials)]
    for row in rows:
        if row.max == max_norm:
            return row
    reached = ", ".join(f"{row.max:g}" for row in rows)
    raise FormatError(
        f"max_norm is {max_norm:g}: {exp_bits} exponent bits and {bits} bits of mantissa reach one of {reached}"
    )
