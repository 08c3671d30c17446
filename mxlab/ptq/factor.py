"""The inverse of an input's second moments, as the triangular factor that GPTQ takes from it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from mxlab.errors import ConversionError
from mxlab.recipe.algorithms import Order

_RAISES = 6  # how often a damping that is too small is multiplied by ten

logger = logging.getLogger("mxlab")


@dataclass(frozen=True)
class Factor:
    """The inverse of damped second moments, the inputs in the order in which they are quantized.

    Attributes:
        upper: float32 [in, in], upper triangular: the inverse of the moments in that order is upperᵀ upper.
        places: [in], the input that comes first, second, ...
    """

    upper: Tensor
    places: Tensor

    def divided(self, rows: Tensor) -> Tensor:
        """Return rows [..., in] times the inverse of the damped moments, both in the order of the input."""
        found = torch.empty_like(rows)
        found[..., self.places] = rows[..., self.places] @ self.upper.t() @ self.upper
        return found


def factorized(gram: Tensor, damping: float, order: Order) -> Factor:
    """Factorize the inverse of second moments.

    Args:
        gram: float32 [in, in], the second moments of the input.
        damping: added to the diagonal of ``gram``, as parts of its mean.
        order: in which the inputs are quantized.

    Raises:
        ConversionError: ``gram`` is not positive definite, whatever is added.
    """
    diagonal = gram.diagonal()
    if order == "activation":
        places = torch.argsort(diagonal, descending=True, stable=True)
    else:
        places = torch.arange(len(gram), device=gram.device)
    return Factor(inverse_factor(gram[places][:, places], damping), places)


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped ``gram``: the inverse is its transpose times it.

    It is the inverse of a Cholesky factor that begins with the last input, so that ``gram`` itself is not inverted.

    Raises:
        ConversionError: as :func:`factorized`.
    """
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    size = gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    # An input that is always zero: its weights do not matter, and the matrix would be singular.
    gram = gram + torch.diag((gram.diagonal() <= 0).to(gram.dtype) * size)
    for _ in range(_RAISES):
        lower, failed = torch.linalg.cholesky_ex((gram + damping * size * identity).flip(0, 1))
        if not failed:
            return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
        damping *= 10
        logger.warning("the second moments of an input are not positive definite: damping is raised to %g", damping)
    raise ConversionError("the second moments of an input are not positive definite: calibrate with more tokens")
