"""Linear transforms of the blocks of an axis, each by a matrix of its own."""

from __future__ import annotations

import torch
from torch import Tensor


def transform_blocks(x: Tensor, matrices: Tensor, axis: int = -1) -> Tensor:
    """Multiply each block along an axis, as a row, by its matrix.

    Args:
        x: floating-point, any shape; the axis is ``blocks * size`` long.
        matrices: [blocks, size, size].
        axis: along which the blocks lie.

    Returns:
        A new contiguous tensor of the shape and dtype of ``x``, computed in float32.
    """
    count, size, _ = matrices.shape
    last = x.movedim(axis, -1)
    rows = last.reshape(-1, count, size).float()
    product = torch.bmm(rows.transpose(0, 1), matrices.float()).transpose(0, 1)
    return product.reshape(last.shape).to(x.dtype).movedim(-1, axis).contiguous()


def inverse_transposed(matrices: Tensor) -> Tensor:
    """Return the matrices [blocks, size, size] by which the other operand is transformed, float32.

    Where rows x are multiplied by M, rows w by the inverse of its transpose, their products stay the same.
    """
    return torch.linalg.inv(matrices.double()).mT.float().contiguous()
