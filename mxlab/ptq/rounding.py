"""Round a weight by GPTQ under every setting that the options leave open, and keep the best of them."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from mxlab.errors import ConversionError
from mxlab.formats import MXFormat
from mxlab.numerics.reference import block_layout
from mxlab.ptq.correction import correct
from mxlab.ptq.gptq import gptq
from mxlab.ptq.scales import block_scales
from mxlab.ptq.statistics import InputStatistics
from mxlab.recipe.algorithms import Gptq

logger = logging.getLogger("mxlab")


def best_rounding(
    name: str, weight: Tensor, statistics: InputStatistics, fmt: MXFormat, options: Gptq
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the quantized weight [out, in] that leaves the smallest error on the rows held out.

    With it come the scales of its blocks [out, blocks, 1], and what was rounded [out, in].

    Args:
        name: of the layer, for the log.
        weight: [out, in], in the basis of its transform.
        statistics: of the input, in the same basis.
        fmt: of the weight.
        options: dampings and corrections.

    Raises:
        ConversionError: no error is finite.
    """
    wanted = statistics.held_out_original @ weight.t()
    cut = block_layout(weight, fmt, (1,))
    least, best, chosen = torch.inf, (weight, weight, weight), (0.0, 0.0)
    for damping in options.damping:
        factor = statistics.factor(damping, options.order)
        corrected = correct(weight, statistics, factor) if options.corrects else weight
        for share in options.correction:
            target = torch.lerp(weight, corrected, share)
            scales = block_scales(target, fmt, statistics.gram.diagonal(), options.search)
            found = gptq(target, factor, scales, fmt)
            error = float((statistics.held_out @ found.t() - wanted).square().sum())
            if error < least:
                least, best, chosen = error, (found, cut.split(scales)[..., :1].clone(), target), (damping, share)
    if least == torch.inf:
        raise ConversionError(f"{name}: no setting leaves a finite error of its output: quantize in float32 (--dtype)")
    loss = least / float(wanted.square().sum().clamp(min=1e-30))
    logger.debug("%s: %.4f of the output held out is lost, damping %g, correction %g", name, loss, *chosen)
    return best
