"""What is kept of a layer's input while a calibration text passes: second moments, and a few rows held out."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mxlab.errors import ConversionError
from mxlab.ptq.factor import Factor, factorized
from mxlab.recipe.algorithms import Order

_MOST = 100.0  # by which a row is multiplied, so that noise is not


@dataclass(frozen=True)
class InputStatistics:
    """Second moments of an input, and some of its rows.

    Attributes:
        gram: X̂ᵀX̂ [in, in], float32, X̂ being what the quantized model multiplies by its weight, transformed and
            quantized; each row is divided by its size.
        cross: XᵀX̂ [in, in], X being what the unquantized model multiplies, transformed as well; None where it is not
            asked for.
        held_out: rows of X̂ [rows, in] that are not in the moments.
        held_out_original: the same rows of X, divided by the same.
    """

    gram: Tensor
    cross: Tensor | None
    held_out: Tensor
    held_out_original: Tensor
    _factors: dict[tuple[float, Order], Factor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def factor(self, damping: float, order: Order) -> Factor:
        """Return the factor of :func:`~mxlab.ptq.factor.factorized`, made once for all weights that read this input."""
        key = damping, order
        if key not in self._factors:
            self._factors[key] = factorized(self.gram, *key)
        return self._factors[key]


def input_statistics(
    quantized: Tensor, original: Tensor, held_out: float, name: str, with_cross: bool = True
) -> InputStatistics:
    """Take the statistics of the input [..., in] of the layer called ``name``, windows of text one after the other.

    Every token counts alike, whatever the size of its input. The inputs of some, such as the first of a text, are a
    hundred times larger than those of others (Sun et al., "Massive Activations in Large Language Models", 2024): what
    fits these few would be fitted to nothing else.

    Args:
        quantized: what the quantized model multiplies.
        original: what the unquantized one does; without ``with_cross`` the rows held out are enough.
        held_out: the share of the rows that are held out, which are the last.
        name: for errors.
        with_cross: whether to take the moments of both together.

    Raises:
        ConversionError: an input that is NaN or infinite.
    """
    for kind, x in (("quantized", quantized), ("unquantized", original)):
        check_finite(x, f"{name} of the {kind} model", "leave the layer out of the recipe")
    x, y = (t.flatten(0, -2).float() for t in (quantized, original))
    weights = _weights(x)
    (x, rows), y = apart(x * weights, held_out), y * weights[len(weights) - len(y) :]
    cross = y[: len(x)].t() @ x if with_cross else None
    return InputStatistics(x.t() @ x, cross, rows.clone(), y[len(y) - len(rows) :].clone())  # not views of all rows


def _weights(rows: Tensor) -> Tensor:
    """Return what makes the rows [rows, in] as large as the middle one, [rows, 1]; very small ones stay smaller."""
    size = rows.square().mean(-1, keepdim=True).sqrt()
    positive = size[size > 0]
    middle = positive.median() if len(positive) else torch.ones((), device=size.device)
    return middle / size.clamp(min=float(middle) / _MOST)


def apart(x: Tensor, held_out: float) -> tuple[Tensor, Tensor]:
    """Return the rows of an input [..., in], and the last of them, a share that is held out."""
    rows = x.flatten(0, -2)
    first = len(rows) - round(len(rows) * held_out)
    return rows[:first], rows[first:]


def check_finite(x: Tensor, reader: str, remedy: str) -> None:
    """Raise ConversionError at an input of ``reader`` that is NaN or infinite; ``remedy`` is what else can be done."""
    if not torch.isfinite(x.sum()):
        raise ConversionError(
            f"the calibration text gives {reader} inputs that are NaN or infinite: calibrate in float32 (dtype), or "
            f"{remedy}"
        )
