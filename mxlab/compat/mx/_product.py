"""The product of two rounded matrices, forward and backward: what linear, matmul and bmm have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mxlab.compat.mx._operator import aten
from mxlab.compat.mx.elemwise_ops import quantize_elemwise_op
from mxlab.compat.mx.mx_ops import quantize_mx_op
from mxlab.compat.mx.specs import MxSpecs, get_backwards_mx_specs
from mxlab.errors import SpecError


class Step(NamedTuple):
    """The two options that say how an operand is MX-quantized."""

    elem_format: str
    round: str


@dataclass(frozen=True)
class Plan:
    """Which options govern the steps of ``in1 @ in2 + bias`` and of its gradients.

    Forward: every operand is rounded element-wise, ``in1`` and ``in2`` are quantized along the inner dimension and
    multiplied; the product, and the sum with the bias, are rounded element-wise.
    Backward: the gradient ``g`` of the output is rounded element-wise. ``g @ in2ᵀ`` has its operands quantized along
    the columns of the output, ``in1ᵀ @ g`` along its rows; both are rounded element-wise.
    """

    in1: Step
    in2: Step
    in1_backward: Step
    in2_backward: Step
    grad_for_in1: Step
    grad_for_in2: Step
    round_in2: str = "round_output"
    round_grad_in2: str = "round_grad_input"
    # How matrices are multiplied, and whether in1ᵀ @ g sums over the leading dimensions before it is rounded.
    multiply: Callable[[Tensor, Tensor], Tensor] = aten.matmul
    sums_first: bool = False
    # in2 and the bias are rounded already, and cannot be trained.
    prequantized: bool = False


class _Rounder:
    """Rounds as the options of one pass say."""

    def __init__(self, specs: MxSpecs) -> None:
        self.specs = specs

    def elementwise(self, x: Tensor, round: str) -> Tensor:
        return quantize_elemwise_op(x, self.specs, self.specs[round])

    def mx(self, x: Tensor, step: Step, axis: int) -> Tensor:
        elem_format, round = (self.specs[option] for option in step)
        return quantize_mx_op(x, self.specs, elem_format, axes=axis, round=round)


def product(in1: Tensor, in2: Tensor, bias: Tensor | None, specs: MxSpecs, plan: Plan) -> Tensor:
    """Return ``in1 @ in2 + bias`` as ``plan`` says.

    Args:
        in1: (..., M, K); a vector is one row.
        in2: (..., K, N); a vector is one column.
        bias: N values, or None.
        specs: the options.
        plan: which of them govern what.

    Returns:
        (..., M, N), without the row or column that a vector stood for.
    """
    row, column = in1.ndim == 1, in2.ndim == 1
    in1 = in1.unsqueeze(-2) if row else in1
    in2 = in2.unsqueeze(-1) if column else in2
    out: Any = _Product.apply(in1, in2, bias, specs, plan)
    out = out.squeeze(-2) if row else out
    return out.squeeze(-1) if column else out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, in1: Tensor, in2: Tensor, bias: Tensor | None, specs: MxSpecs, plan: Plan) -> Tensor:
        rounder = _Rounder(specs)
        rounded1 = rounder.elementwise(in1, "round_output")
        rounded2 = in2 if plan.prequantized else rounder.elementwise(in2, plan.round_in2)
        ctx.save_for_backward(*((rounded1, rounded2) if specs["quantize_backprop"] else (in1, in2)))
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.specs, ctx.plan = get_backwards_mx_specs(specs), plan

        quantized1 = rounder.mx(rounded1, plan.in1, -1)
        quantized2 = _widened(rounder.mx(rounded2, plan.in2, -2), quantized1.dtype)
        out = rounder.elementwise(plan.multiply(quantized1, quantized2), "round_output")
        if bias is None:
            return out
        bias = bias if plan.prequantized else rounder.elementwise(bias, "round_weight")
        return rounder.elementwise(out + bias, "round_output")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if ctx.plan.prequantized:
            raise SpecError("prequantized weights cannot be trained: leave prequantized_weights out, or use no_grad")
        rounder = _Rounder(ctx.specs)
        grad = rounder.elementwise(grads[0], "round_grad_input")
        in1, in2 = ctx.saved_tensors
        wants_in1, wants_in2, wants_bias, *_ = ctx.needs_input_grad
        # Over dimensions that were broadcast torch sums what is returned here.
        return (
            _grad_in1(grad, in2, rounder, ctx.plan) if wants_in1 else None,
            _grad_in2(grad, in1, rounder, ctx.plan) if wants_in2 else None,
            _grad_bias(grad, rounder).reshape(ctx.bias_shape) if wants_bias else None,
            None,
            None,
        )


def _grad_in1(grad: Tensor, in2: Tensor, rounder: _Rounder, plan: Plan) -> Tensor:
    """Return the gradient of ``in1`` (..., M, K) from that of the product (..., M, N) and ``in2`` (..., K, N)."""
    grad = rounder.mx(grad, plan.grad_for_in1, -1)
    in2 = _widened(rounder.mx(in2, plan.in2_backward, -1), grad.dtype)
    return rounder.elementwise(plan.multiply(grad, in2.mT), "round_grad_input")


def _grad_in2(grad: Tensor, in1: Tensor, rounder: _Rounder, plan: Plan) -> Tensor:
    """Return the gradient of ``in2`` (..., K, N) from that of the product (..., M, N) and ``in1`` (..., M, K)."""
    grad = rounder.mx(grad, plan.grad_for_in2, -2)
    in1 = rounder.mx(in1, plan.in1_backward, -2)
    if plan.sums_first:  # as the gradient of a weight (N, K): the bits of a product depend on which way round it is
        grad, in1 = grad.flatten(0, -2), in1.flatten(0, -2)
        return rounder.elementwise(plan.multiply(grad.mT, in1), plan.round_grad_in2).mT
    return rounder.elementwise(plan.multiply(in1.mT, grad), plan.round_grad_in2)


def _grad_bias(grad: Tensor, rounder: _Rounder) -> Tensor:
    """Return the gradient of the bias (N,) from that of the product (..., N)."""
    return rounder.elementwise(grad.flatten(0, -2).sum(0), "round_grad_weight")


def _widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """bfloat16 as float32 where that is what it meets: prequantized weights may meet float32 inputs."""
    return x.to(dtype) if (x.dtype, dtype) == (torch.bfloat16, torch.float32) else x
