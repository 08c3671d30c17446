"""GPTQ as MASE has it: all inputs of a block are rounded at once, and only the later blocks make up for the error.

The error of a block is (W - Q) / diag(U), U being the upper Cholesky factor of the inverse of the damped second
moments; it is carried to later blocks by the rows of U. Plain GPTQ (:mod:`mxlab.ptq.gptq`) also carries it to the later
inputs of the same block, which is what its formula assumes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mxlab.formats import MXFormat
from mxlab.numerics import reference
from mxlab.ptq.factor import inverse_factor
from mxlab.ptq.scales import rounded

# Of the magnitudes in a block: each is taken for the largest, of which the scale is made; those above it are clamped.
QUANTILES = (1.0, 0.995, 0.99, 0.97, 0.95, 0.93, 0.90, 0.80, 0.70, 0.60, 0.50)
# Rules that make a power of two from the largest magnitude alone.
SEARCHED_RULES = ("floor", "ceil", "even", "rceil", "mase_int")

# Returns a part [out, inputs] of a weight on the grid, given the first of its inputs.
RoundBlock = Callable[[Tensor, int], Tensor]
# Returns the error [out] of a difference [out, inputs] in a part of a weight, given the first of its inputs.
Judge = Callable[[Tensor, int], Tensor]


def block_gptq(weight: Tensor, gram: Tensor, block_size: int, damping: float, round_block: RoundBlock) -> Tensor:
    """Return a weight on the grid, one block of inputs after the other.

    Args:
        weight: float32 or float64 [out, in].
        gram: [in, in], the second moments of the input.
        block_size: inputs that are rounded at once.
        damping: added to the diagonal of ``gram``, as parts of its mean.
        round_block: rounds the inputs of a block.

    Raises:
        ConversionError: ``gram`` is not positive definite, whatever is added.
    """
    factor = inverse_factor(gram, damping)
    weight, on_grid = weight.clone(), torch.empty_like(weight)
    weight[:, gram.diagonal() == 0] = 0  # an input that is always zero
    for start in range(0, weight.shape[1], block_size):
        block = slice(start, start + block_size)
        on_grid[:, block] = round_block(weight[:, block], start)
        error = (weight[:, block] - on_grid[:, block]) / factor.diagonal()[block]
        weight[:, start + block_size :] -= error @ factor[block, start + block_size :]
    return on_grid


def round_to_nearest(part: Tensor, fmt: MXFormat) -> Tensor:
    """Return one block of inputs [out, block] on the grid of the format's own scales."""
    return rounded(part, reference.scales(part[:, None], fmt, part.dtype)[:, 0], fmt)


def round_by_quantiles(part: Tensor, fmt: MXFormat, error_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Return one block of inputs on the grid of those scales, of the quantiles of its magnitudes, that lose least.

    Args:
        part: float32 [out, block].
        fmt: a format with one of :data:`SEARCHED_RULES`.
        error_of: returns the error [out] of a difference [out, block].
    """
    largest = torch.quantile(part.abs(), part.new_tensor(QUANTILES), dim=1)  # [quantiles, out]
    exponents = reference.unclamped_exponent(part, largest[..., None], fmt).clamp(-fmt.scale_emax, fmt.scale_emax)
    best, least = part, part.new_full((len(part),), torch.inf)
    for scale in reference.power_scale(exponents, fmt):  # [out, 1]
        found = rounded(part, scale, fmt)
        error = error_of(found - part)
        is_better = error < least
        best, least = torch.where(is_better[:, None], found, best), torch.where(is_better, error, least)
    return best


def weight_error(difference: Tensor) -> Tensor:
    """Return the norm [out] of a difference [out, block]."""
    return difference.norm(dim=1)


def output_judge(x: Tensor, batch: int) -> Judge:
    """Return what judges differences by the outputs that they lead to: norms over ``batch`` windows each, added up.

    Args:
        x: the input [windows, tokens, in].
        batch: windows of one norm.
    """
    batches: Sequence[Tensor] = [windows.flatten(0, -2).float() for windows in x.split(batch)]

    def judge(difference: Tensor, start: int) -> Tensor:
        block = slice(start, start + difference.shape[1])
        return torch.stack([(rows[:, block] @ difference.t()).norm(dim=0) for rows in batches]).sum(0)

    return judge
