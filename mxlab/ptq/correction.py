"""Aim at what the unquantized model computes, although the layer sees the quantized model's input.

Minimising |W X - Q X̂|² over Q is plain GPTQ of W* = W + W (G - H)(H + λ)⁻¹, with H = X̂X̂ᵀ and G = XX̂ᵀ: what remains
of the error lies in the space that H weighs. Sources: Li et al., "GPTAQ", 2025; Zhang et al., "Qronos", 2025.
"""

from __future__ import annotations

from torch import Tensor

from mxlab.ptq.factor import Factor
from mxlab.ptq.statistics import InputStatistics


def correct(weight: Tensor, statistics: InputStatistics, factor: Factor) -> Tensor:
    """Return the weight [out, in] that computes of the quantized input what ``weight`` does of the unquantized one.

    ``factor`` is that of the statistics, which says how they are damped.
    """
    assert statistics.cross is not None
    return weight + factor.divided(weight @ (statistics.cross - statistics.gram))
