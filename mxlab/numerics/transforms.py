"""Multiply the blocks of a tensor's last axis by matrices, alone or right before they are quantized.

On the CPU both are done in C++ for matrices of up to 128 x 128, a few rows at a time; elsewhere, and for larger ones,
torch multiplies. A sum there may be added up in another order, so that its last bit may differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxlab.formats import NumberFormat, Numerics
from mxlab.numerics import operators
from mxlab.numerics.quantization import check, drawn_seed, quantize


def transform(x: Tensor, matrices: Tensor, *, backend: str = "auto") -> Tensor:
    """Multiply blocks of the last axis by matrices: each block, as a row, by its own or all by one.

    Args:
        x: float32, bfloat16 or float16 [..., n].
        matrices: float32 [size, size], or [n / size, size, size].
        backend: as in :func:`mxlab.numerics.quantize`.

    Returns:
        A new tensor laid out as ``torch.empty_like(x)``, computed in float32 and rounded to the dtype of ``x``.

    Raises:
        FormatError: an unsupported dtype or backend; matrices that do not fit.
    """
    check(x, "exact", backend)
    operators.check_matrices(x, matrices)
    if torch.is_grad_enabled() and (x.requires_grad or matrices.requires_grad):
        return _Transform.apply(x, matrices, backend)  # pyright: ignore[reportReturnType]
    return operators.transform(x, matrices, backend)


def transform_quantize(
    x: Tensor,
    matrices: Tensor,
    fmt: NumberFormat | str,
    *,
    numerics: Numerics = "exact",
    backend: str = "auto",
    seed: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Quantize, along the last axis, what :func:`transform` returns: in one pass over the tensor, with the same bits.

    Args:
        x: as in :func:`transform`.
        matrices: as in :func:`transform`.
        fmt: as in :func:`mxlab.numerics.quantize`, and so are the others.
        numerics: of the quantization.
        backend: of both.
        seed: of a format that draws random numbers.
        out: where to write the result.

    Raises:
        FormatError: as :func:`transform` and :func:`mxlab.numerics.quantize`.
    """
    check(x, numerics, backend)
    operators.check_matrices(x, matrices)
    if torch.is_grad_enabled() and (x.requires_grad or matrices.requires_grad):
        made = transform(x, matrices, backend=backend)
        return quantize(made, fmt, numerics=numerics, backend=backend, seed=seed, out=out)
    text, is_random = operators.spelled(fmt, numerics, backend)
    settings = text, numerics, backend, drawn_seed(is_random, seed)
    if out is None:
        return operators.transform_quantize(x, matrices, *settings)
    operators.transform_quantize_out(x, matrices, out, *settings)
    return out


def inverse_transposed(matrices: Tensor) -> Tensor:
    """Return the matrices [blocks, size, size] by which the other operand is transformed, float32.

    Where rows x are multiplied by M, rows w by the inverse of its transpose, their products stay the same.
    """
    return torch.linalg.inv(matrices.double()).mT.float().contiguous()


class _Transform(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(x if matrices.requires_grad else None, matrices)
        ctx.backend = backend
        return operators.transform(x, matrices, backend)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        [grad], (x, matrices) = grads, ctx.saved_tensors
        of_x = _Transform.apply(grad, matrices.mT.contiguous(), ctx.backend) if ctx.needs_input_grad[0] else None
        return of_x, None if x is None else _gradient_of_matrices(x, grad, matrices), None


def _gradient_of_matrices(x: Tensor, grad: Tensor, matrices: Tensor) -> Tensor:
    """Return the sum over all rows of x, transposed, times the gradient of the product, like ``matrices``."""
    size = matrices.shape[-1]
    rows, of_rows = (t.reshape(-1, t.shape[-1] // size, size).transpose(0, 1).float() for t in (x, grad))
    found = rows.mT @ of_rows
    return found if matrices.ndim == 3 else found.sum(0)
