"""``matmul`` with rounded operands, under microxcaling's name and signature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mxlab.compat.mx._operator import aten
from mxlab.compat.mx._product import Plan, Step, product
from mxlab.compat.mx.specs import apply_mx_specs, mx_assert_test
from mxlab.errors import SpecError


def _plan(first: str, second: str) -> Plan:
    """Return the plan for operands that are an activation (``a``) or a weight (``w``)."""
    gradient = Step("a_elem_format_bp_os", "round_mx_grad_output_grad_input")
    return Plan(
        in1=Step(f"{first}_elem_format", "round_mx_output"),
        in2=Step(f"{second}_elem_format", "round_mx_output"),
        in1_backward=Step(f"{first}_elem_format_bp", "round_mx_input_grad_input"),
        in2_backward=Step(f"{second}_elem_format_bp", "round_mx_input_grad_input"),
        grad_for_in1=gradient,
        grad_for_in2=gradient,
    )


PLANS = {mode: _plan(*mode) for mode in ("aa", "aw", "wa")}


def matmul(
    in1: Tensor,
    in2: Tensor,
    bias: Tensor | None = None,
    mx_specs: Mapping[str, Any] | None = None,
    name: str | None = None,
    mode_config: str = "aa",
) -> Tensor:
    """Return ``in1 @ in2 + bias`` with rounded operands; torch's own where ``mx_specs`` is None.

    Args:
        in1: (..., M, K).
        in2: (..., K, N); leading dimensions broadcast.
        bias: N values, or None.
        mx_specs: the options.
        name: not read.
        mode_config: ``aa``, ``aw`` or ``wa``: whether each operand takes the format of activations or of weights.

    Returns:
        (..., M, N).

    Raises:
        FormatError: as ``quantize_mx_op`` and ``quantize_elemwise_op``.
        SpecError: an unknown option or mode.
    """
    mx_assert_test(mx_specs)
    if mx_specs is None:
        return _plain(in1, in2, bias)
    if mode_config not in PLANS:
        raise SpecError(f"mode_config is {mode_config!r}: it must be one of {', '.join(PLANS)}")
    return product(in1, in2, bias, apply_mx_specs(mx_specs), PLANS[mode_config])


def _plain(in1: Tensor, in2: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None and in1.ndim == in2.ndim == 2:
        return aten.addmm(bias, in1, in2)
    out = aten.matmul(in1, in2)
    return out if bias is None else out + bias
