"""GPTQ: quantize a weight one input after the other, making up in the later ones for the error of each.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022,
algorithm 1. Blocks of a microscaling format have scales that are fixed before (:mod:`mxlab.ptq.scales`), so that the
inputs may be taken in any order and the blocks stay where they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxlab.formats import MXFormat
from mxlab.numerics import operators
from mxlab.numerics.kernels import native
from mxlab.ptq.factor import Factor
from mxlab.ptq.scales import rounded

LAZY = 128  # inputs after which the errors are carried to all later ones


def gptq(weight: Tensor, factor: Factor, scales: Tensor, fmt: MXFormat) -> Tensor:
    """Return the weight on the grid that keeps its products with the input, as far as can be.

    Args:
        weight: float32 [out, in].
        factor: of the second moments of the input; says in which order the inputs are taken.
        scales: [out, in], of each element.
        fmt: the format.
    """
    places = factor.places
    # Inputs as rows: what is done to one of them is then contiguous.
    rows = _by_rows(weight.t()[places].contiguous(), factor.upper, scales.t()[places].contiguous(), fmt)
    found = torch.empty_like(rows)
    found[places] = rows
    return found.t().contiguous()


def _by_rows(weight: Tensor, factor: Tensor, scales: Tensor, fmt: MXFormat) -> Tensor:
    """Quantize [in, out] row by row; ``factor`` is upper triangular [in, in]. Overwrites ``weight``."""
    settle = native.settle if _has_kernel(weight, fmt) else settle_in_torch
    for start in range(0, len(weight), LAZY):
        end = min(start + LAZY, len(weight))
        errors = settle(weight[start:end], scales[start:end], factor[start:end, start:end].t().contiguous(), fmt)
        weight[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return weight


def settle_in_torch(weight: Tensor, scales: Tensor, factors: Tensor, fmt: MXFormat) -> Tensor:
    """Quantize the rows of a weight one after the other, carrying the error of each to those behind it.

    The same as :func:`mxlab.numerics.kernels.native.settle`, with the same bits, on every device and for every format.

    Args:
        weight: float32 [inputs, outputs]; overwritten by what is on the grid.
        scales: [inputs, outputs], of each element.
        factors: [inputs, inputs], lower triangular: what each input loses by the errors of those before it.
        fmt: the format.

    Returns:
        The errors [inputs, outputs], each divided by the diagonal of ``factors``.
    """
    errors = torch.empty_like(weight)
    for i in range(len(weight)):
        on_grid = rounded(weight[i], scales[i], fmt)
        errors[i] = (weight[i] - on_grid) / factors[i, i]
        weight[i] = on_grid
        # Not addr_, which rounds the product in some elements and in others not.
        weight[i + 1 :] -= factors[i + 1 :, i, None] * errors[i]
    return errors


def _has_kernel(weight: Tensor, fmt: MXFormat) -> bool:
    return fmt.has_kernels and not fmt.is_random and operators.choose(weight.device.type, "auto") == "native"
