"""GPTQ: quantize a weight one input after the other, making up in the later ones for the error of each.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022,
algorithm 1. Blocks of a microscaling format have scales that are fixed before (:mod:`mxlab.ptq.scales`), so that the
inputs may be taken in any order and the blocks stay where they are.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from mxlab.errors import ConversionError
from mxlab.formats import MXFormat
from mxlab.ptq.scales import rounded
from mxlab.recipe.algorithms import Order

LAZY = 128  # inputs after which the errors are carried to all later ones
_RAISES = 6  # how often a damping that is too small is multiplied by ten

logger = logging.getLogger("mxlab")


def gptq(weight: Tensor, gram: Tensor, scales: Tensor, fmt: MXFormat, damping: float, order: Order) -> Tensor:
    """Return the weight on the grid that keeps its products with the input, as far as can be.

    Args:
        weight: float32 [out, in].
        gram: [in, in], the second moments of the input.
        scales: [out, in], of each element.
        fmt: the format.
        damping: added to the diagonal of ``gram``, as parts of its mean.
        order: of the inputs.

    Raises:
        ConversionError: ``gram`` is not positive definite, whatever is added.
    """
    diagonal = gram.diagonal()
    places = torch.argsort(diagonal, descending=True, stable=True) if order == "activation" else None
    if places is not None:
        weight, scales, gram = weight[:, places], scales[:, places], gram[places][:, places]
    # Inputs as rows: what is done to one of them is then contiguous.
    found = _by_rows(weight.t().contiguous(), inverse_factor(gram, damping), scales.t().contiguous(), fmt)
    if places is None:
        return found.t().contiguous()
    in_place = torch.empty_like(found)
    in_place[places] = found
    return in_place.t().contiguous()


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped ``gram``.

    Raises:
        ConversionError: as :func:`gptq`.
    """
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    size = gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    # An input that is always zero: its weights do not matter, and the matrix would be singular.
    gram = gram + torch.diag((gram.diagonal() <= 0).to(gram.dtype) * size)
    for _ in range(_RAISES):
        factor, failed = torch.linalg.cholesky_ex(gram + damping * size * identity)
        if not failed:
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return inverse
        damping *= 10
        logger.warning("the second moments of an input are not positive definite: damping is raised to %g", damping)
    raise ConversionError("the second moments of an input are not positive definite: calibrate with more tokens")


def _by_rows(weight: Tensor, factor: Tensor, scales: Tensor, fmt: MXFormat) -> Tensor:
    """Quantize [in, out] row by row; ``factor`` is upper triangular [in, in]. Overwrites ``weight``."""
    for start in range(0, len(weight), LAZY):
        end = min(start + LAZY, len(weight))
        part, errors = weight[start:end], torch.empty_like(weight[start:end])
        local = factor[start:end, start:end]
        for i in range(end - start):
            on_grid = rounded(part[i], scales[start + i], fmt)
            errors[i] = (part[i] - on_grid) / local[i, i]
            part[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
            part[i] = on_grid
        weight[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return weight
