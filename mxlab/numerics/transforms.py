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
        matrices: float32 [size, size], or [n / size, size, size]; no gradient is computed for them.
        backend: as in :func:`mxlab.numerics.quantize`.

    Returns:
        A new tensor laid out as ``torch.empty_like(x)``, computed in float32 and rounded to the dtype of ``x``.

    Raises:
        FormatError: an unsupported dtype or backend; matrices that do not fit.
    """
    check(x, "exact", backend)
    operators.check_matrices(x, matrices)
    if x.requires_grad and torch.is_grad_enabled():
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
    if x.requires_grad and torch.is_grad_enabled():
        made = transform(x, matrices, backend=backend)
        return quantize(made, fmt, numerics=numerics, backend=backend, seed=seed, out=out)
    text, is_random = operators.spelled(fmt, numerics, backend)
    settings = text, numerics, backend, drawn_seed(is_random, seed)
    if out is None:
        return operators.transform_quantize(x, matrices, *settings)
    operators.transform_quantize_out(x, matrices, out, *settings)
    return out


class _Transform(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: Tensor, backend: str) -> Tensor:
        ctx.matrices, ctx.backend = matrices, backend
        return operators.transform(x, matrices, backend)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        return _Transform.apply(grad[0], ctx.matrices.mT.contiguous(), ctx.backend), None, None
