"""``linear`` and ``Linear`` with rounded operands, under microxcaling's names and signatures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxlab.compat.mx._operator import Layer, aten
from mxlab.compat.mx._product import Plan, Step, product
from mxlab.compat.mx.elemwise_ops import quantize_elemwise_op
from mxlab.compat.mx.specs import apply_mx_specs, mx_assert_test
from mxlab.errors import SpecError

_LINEAR = Plan(
    in1=Step("a_elem_format", "round_mx_output"),
    in2=Step("w_elem_format", "round_mx_output"),
    in1_backward=Step("a_elem_format_bp", "round_mx_input_grad_weight"),
    in2_backward=Step("w_elem_format_bp", "round_mx_weight_grad_input"),
    grad_for_in1=Step("a_elem_format_bp_os", "round_mx_grad_output_grad_input"),
    grad_for_in2=Step("a_elem_format_bp_ex", "round_mx_grad_output_grad_weight"),
    round_in2="round_weight",
    round_grad_in2="round_grad_weight",
    sums_first=True,
)
_PREQUANTIZED = replace(_LINEAR, prequantized=True)
_PREQUANTIZABLE = {"bfloat": 16, "bfloat_subnorms": True, "round": "even"}


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mx_specs: Mapping[str, Any] | None = None,
    prequantized_weights: bool = False,
    name: str | None = None,
) -> Tensor:
    """``input @ weight.T + bias`` with rounded operands; torch's own linear where ``mx_specs`` is None.

    Args:
        input: (..., in).
        weight: (out, in).
        bias: (out,), or None.
        mx_specs: the options.
        prequantized_weights: weight and bias are bfloat16 and not rounded to it again; no backward pass.
        name: not read.

    Returns:
        (..., out).

    Raises:
        FormatError: as ``quantize_mx_op`` and ``quantize_elemwise_op``.
        SpecError: an unknown option; prequantized weights that are not bfloat16, or that get a gradient.
    """
    mx_assert_test(mx_specs)
    if mx_specs is None:
        return aten.linear(input, weight, bias)
    if prequantized_weights and {weight.dtype, weight.dtype if bias is None else bias.dtype} != {torch.bfloat16}:
        raise SpecError(
            "prequantized_weights is true: weight and bias must be bfloat16, as prequantize_weights() makes"
        )
    plan = _PREQUANTIZED if prequantized_weights else _LINEAR
    return product(input, weight.mT, bias, apply_mx_specs(mx_specs), plan)


class Linear(Layer, torch.nn.Linear):
    """A ``torch.nn.Linear`` that computes as :func:`linear` does; with ``mx_specs`` of None it is torch's.

    ``more`` goes to ``torch.nn.Linear``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        mx_specs: Mapping[str, Any] | None = None,
        name: str | None = None,
        **more: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **more)
        self.prequantized_weights = False
        self.configure(mx_specs, name)

    def prequantize_weights(self) -> None:
        """Round weight and bias to bfloat16, once and for all; the layer then serves evaluation only.

        Raises:
            SpecError: the options do not round to bfloat16, ties to even, subnormals kept.
        """
        if self.mx_none:
            return
        for option, needed in _PREQUANTIZABLE.items():
            if self.mx_specs[option] != needed:
                raise SpecError(f"{option} is {self.mx_specs[option]!r}: to prequantize weights it must be {needed!r}")
        for parameter in self.parameters(recurse=False):
            rounded = quantize_elemwise_op(parameter.detach(), self.mx_specs, self.mx_specs["round_weight"])
            parameter.data = rounded.to(torch.bfloat16)
        self.prequantized_weights = True

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [..., out] of [..., in]."""
        if self.prequantized_weights and self.training:
            raise SpecError("prequantized weights cannot be trained: call eval() first")
        return linear(inputs, self.weight, self.bias, self.given_specs, self.prequantized_weights)
