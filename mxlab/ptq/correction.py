"""Aim at what the unquantized model computes, although the layer sees the quantized model's input.

Minimising |W X - Q X̂|² over Q is plain GPTQ of W* = W + W (G - H)(H + λ)⁻¹, with H = X̂X̂ᵀ and G = XX̂ᵀ: what remains
of the error lies in the space that H weighs. Sources: Li et al., "GPTAQ", 2025; Zhang et al., "Qronos", 2025.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxlab.ptq.statistics import InputStatistics


def correct(weight: Tensor, statistics: InputStatistics, damping: float) -> Tensor:
    """Return the weight [out, in] that computes of the quantized input what ``weight`` does of the unquantized one."""
    gram = statistics.gram
    size = gram.diagonal().mean()
    damped = gram + damping * size * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    lost = weight @ (statistics.cross - gram)
    return weight + torch.linalg.solve(damped, lost.t()).t()
