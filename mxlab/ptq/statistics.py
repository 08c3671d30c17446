"""What is kept of a layer's input while a calibration text passes: second moments, and a few rows held out."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mxlab.errors import ConversionError
from mxlab.ptq.factor import Factor, factorized
from mxlab.recipe.algorithms import Order


@dataclass(frozen=True)
class InputStatistics:
    """Second moments of an input, and some of its rows.

    Attributes:
        gram: X̂ᵀX̂ [in, in], float32, X̂ being what the quantized model multiplies by its weight: transformed and
            quantized.
        cross: XᵀX̂ [in, in], X being what the unquantized model multiplies, transformed as well.
        held_out: rows of X̂ [rows, in] that are not in the moments.
        held_out_original: the same rows of X.
    """

    gram: Tensor
    cross: Tensor
    held_out: Tensor
    held_out_original: Tensor
    _factors: dict[tuple[float, Order], Factor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def factor(self, damping: float, order: Order) -> Factor:
        """Return the factor of :func:`~mxlab.ptq.factor.factorized`, made once for all weights that read this input."""
        key = damping, order
        if key not in self._factors:
            self._factors[key] = factorized(self.gram, *key)
        return self._factors[key]


def input_statistics(quantized: Tensor, original: Tensor, held_out: int, name: str) -> InputStatistics:
    """Take the statistics of the input [windows, tokens, in] of the layer called ``name``.

    Args:
        quantized: what the quantized model multiplies.
        original: what the unquantized one does.
        held_out: how many of the last windows are held out.
        name: for errors.

    Raises:
        ConversionError: an input that is NaN or infinite.
    """
    for kind, x in (("quantized", quantized), ("unquantized", original)):
        check_finite(x, f"{name} of the {kind} model", "leave the layer out of the recipe")
    kept = len(quantized) - held_out
    x, y = (t[:kept].reshape(-1, t.shape[-1]).float() for t in (quantized, original))
    rows, others = (t[kept:].reshape(-1, t.shape[-1]).float() for t in (quantized, original))
    return InputStatistics(x.t() @ x, y.t() @ x, rows, others)


def check_finite(x: Tensor, reader: str, remedy: str) -> None:
    """Raise ConversionError at an input of ``reader`` that is NaN or infinite; ``remedy`` is what else can be done."""
    if not torch.isfinite(x.sum()):
        raise ConversionError(
            f"the calibration text gives {reader} inputs that are NaN or infinite: calibrate in float32 (dtype), or "
            f"{remedy}"
        )
