"""MX quantization under microxcaling's names and signatures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from torch import Tensor

from mxlab.checks import check_choice, check_int
from mxlab.compat.mx.elemwise_ops import numerics_of
from mxlab.compat.mx.formats import row
from mxlab.compat.mx.specs import mx_assert_test, resolved
from mxlab.errors import FormatError
from mxlab.formats import MXFormat, Rounding
from mxlab.numerics import quantize
from mxlab.recipe.mx_specs import SHARED_EXP_METHODS


def quantize_mx_op(
    A: Tensor,
    mx_specs: Mapping[str, Any] | None,
    elem_format: str | Enum | None = None,
    block_size: int | None = None,
    axes: int | Sequence[int] | None = None,
    round: Rounding = "nearest",
    expand_and_reshape: bool = False,
) -> Tensor:
    """Round ``A`` to an MX format, in its own dtype; return ``A`` itself where ``elem_format`` is None.

    Args:
        A: float32, bfloat16 or float16, any shape.
        mx_specs: the options; read are ``scale_bits``, ``shared_exp_method``, ``mx_flush_fp32_subnorms``,
            ``custom_cuda`` and, where it is not given here, ``block_size``.
        elem_format: the element format, by name or as a member of ``mx.formats.ElemFormat``.
        block_size: elements that share a scale; 0 for the whole axis.
        axes: the axis along which blocks lie; several form joint tiles.
        round: the rounding of the elements.
        expand_and_reshape: not read, as in microxcaling.

    Returns:
        A tensor like ``A``, whose gradient passes straight through.

    Raises:
        FormatError: a format, block size, axis, rounding or dtype that does not exist or does not fit.
        SpecError: no options.
    """
    mx_assert_test(mx_specs)
    if elem_format is None:
        return A
    specs = resolved(mx_specs)
    return _quantize_mx(
        A,
        specs["scale_bits"] or 8,
        elem_format,
        specs["shared_exp_method"],
        axes,
        specs["block_size"] if block_size is None else block_size,
        round,
        specs["mx_flush_fp32_subnorms"],
        specs["custom_cuda"],
    )


def _quantize_mx(
    A: Tensor,
    scale_bits: int,
    elem_format: str | Enum | None,
    shared_exp_method: str = "max",
    axes: int | Sequence[int] | None = None,
    block_size: int = 0,
    round: Rounding = "nearest",
    flush_fp32_subnorms: bool = False,
    custom_cuda: bool = False,
) -> Tensor:
    """Quantize as :func:`quantize_mx_op`, each option an argument."""
    if elem_format is None:
        return A
    if axes is None:
        raise FormatError("axes is None: name the axis along which blocks lie, such as axes=[-1]")
    check_int("scale_bits", scale_bits, 1, 8, "1 to 8")
    check_choice("shared_exp_method", shared_exp_method, tuple(SHARED_EXP_METHODS))
    fmt = MXFormat(
        row(elem_format).name,
        block_size,
        scale_bits=scale_bits,
        scale_rule=SHARED_EXP_METHODS[shared_exp_method],
        rounding=round,
        flush_fp32_subnorms=flush_fp32_subnorms,
    )
    return quantize(A, fmt, axis=axes, numerics=numerics_of(custom_cuda))
