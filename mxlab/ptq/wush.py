"""WUSH: the linear transform of each block of inputs that balances weights against activations.

For a block, let WᵀW / out = L Lᵀ and XᵀX / n = K Kᵀ, and U S Vᵀ the singular value decomposition of LᵀK. Inputs are
transformed as rows by M = L U S^-½ Hᵀ, weights by the inverse of Mᵀ. Both then have the second moments H S Hᵀ: the
Hadamard matrix H spreads what S has in its large values over the block.

Source: "WUSH: Near-Optimal Adaptive Transforms for LLM Quantization", 2025 (arXiv 2512.00956).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxlab.numerics import hadamard

_DAMPING = 1e-2  # of the second moments, in parts of their mean diagonal


def fit(weights: Sequence[Tensor], x: Tensor, size: int) -> Tensor:
    """Return the matrices that transform the input, float32 [blocks, size, size] with values of bfloat16.

    In bfloat16 they are stored and cast without loss; the matrices of the weights are inverted from these.

    Args:
        weights: of the layers that share the input, [out, in] each.
        x: the input [..., in].
        size: of the blocks.

    Raises:
        FormatError: there is no Hadamard matrix of that size.
    """
    left = _factors(torch.cat([w.reshape(-1, w.shape[-1]) for w in weights]), size)
    right = _factors(x.reshape(-1, x.shape[-1]), size)
    u, s, _ = torch.linalg.svd(left.mT @ right)
    spread = hadamard.matrix(size).to(u)
    found = left @ u @ (s.rsqrt().unsqueeze(-1) * spread.t())
    return found.bfloat16().float().contiguous()


def _factors(rows: Tensor, size: int) -> Tensor:
    """Return the lower Cholesky factors of the mean second moments of each block, float64 [blocks, size, size]."""
    blocks = rows.float().unflatten(-1, (-1, size)).transpose(0, 1)
    moments = (blocks.mT @ blocks).double() / len(rows)
    size_of = moments.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    # A block that is always zero gets the identity: whatever it is transformed by, it stays zero.
    floor = torch.where(size_of > 0, _DAMPING * size_of, 1.0)
    return torch.linalg.cholesky(moments + torch.diag_embed(floor.expand(moments.shape[:-1])))
