"""What a linear layer does to its operands and to its result."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mxlab.formats import MXFormat, NumberFormat, Numerics, Rounding, elementwise_format
from mxlab.numerics import DTYPES, is_lossless, quantize, round_elementwise
from mxlab.recipe import Elementwise


@dataclass(frozen=True)
class LinearQuantizer:
    """The formats of a linear layer's roles; None leaves a role as it is.

    The order is microxcaling's: round element-wise, quantize along the inner dimension, multiply, round the result,
    add the rounded bias, round again; then the output is quantized along its last axis. Without element-wise rounding
    the bias is added by the matmul itself, as in torch.
    """

    weight: NumberFormat | None = None
    activation: NumberFormat | None = None
    bias: NumberFormat | None = None
    output: NumberFormat | None = None
    elementwise: Elementwise = field(default_factory=Elementwise)
    numerics: Numerics = "exact"
    # The dtypes that element-wise rounding leaves as they are.
    untouched: tuple[torch.dtype, ...] = field(init=False)
    # Equal where the same input, or weight, becomes the same; short, as they are compared at every call.
    input_kind: str = field(init=False)
    weight_kind: str = field(init=False)

    def __post_init__(self) -> None:
        e = self.elementwise
        object.__setattr__(self, "input_kind", f"{self.activation} {self.numerics} {e}")
        object.__setattr__(self, "weight_kind", f"{self.weight} {self.numerics} {e}")
        element = elementwise_format(e.bfloat, e.fp)
        exactly = self.numerics == "exact" and e.subnormals
        untouched = tuple(t for t in DTYPES if element is None or (exactly and is_lossless(element, t)))
        object.__setattr__(self, "untouched", untouched)

    def on_weight(self, weight: Tensor, axis: int = -1) -> Tensor:
        """The weight as the matmul sees it; ``axis`` is the one it sums over."""
        return self._quantized(self._rounded(weight, self.elementwise.weight_rounding), self.weight, axis)

    def on_activation(self, x: Tensor, out: Tensor | None = None, axis: int = -1) -> Tensor:
        """The input [..., in] as the matmul sees it; in ``out``, where one is given and there is something to write."""
        return self._quantized(self._rounded(x, self.elementwise.output_rounding), self.activation, axis, out)

    def on_bias(self, bias: Tensor) -> Tensor:
        """The bias [out] as it is added."""
        return self._quantized(self._rounded(bias, self.elementwise.weight_rounding), self.bias)

    def on_product(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """The output [..., out] from the result of the matmul and the bias that it did not add."""
        y = self._rounded(y, self.elementwise.output_rounding)
        if bias is not None:
            y = self._rounded(y + self.on_bias(bias), self.elementwise.output_rounding)
        return self._quantized(y, self.output)

    @property
    def adds_bias_apart(self) -> bool:
        """Whether the bias is added to the rounded result rather than by the matmul."""
        return bool(self.elementwise.bfloat or self.elementwise.fp)

    @property
    def weight_is_idempotent(self) -> bool:
        """Whether a weight that is on the grid stays as it is when it is quantized once more."""
        fmt = self.weight
        is_stable = fmt is None or (isinstance(fmt, MXFormat) and fmt.scale == "e8m0" and fmt.scale_rule != "mase_int")
        return is_stable and self.numerics == "exact"

    @property
    def shares_input(self) -> bool:
        """Whether layers with equal quantizers may share one quantized input: not if each draws its own noise."""
        draws = self.activation is not None and self.activation.is_random
        return not draws and self.elementwise.output_rounding != "dither"

    def _quantized(self, x: Tensor, fmt: NumberFormat | None, axis: int = -1, out: Tensor | None = None) -> Tensor:
        return x if fmt is None else quantize(x, fmt, axis=axis, numerics=self.numerics, out=out)

    def _rounded(self, x: Tensor, rounding: Rounding) -> Tensor:
        if x.dtype in self.untouched:
            return x
        e = self.elementwise
        return round_elementwise(
            x, bfloat=e.bfloat, fp=e.fp, rounding=rounding, subnormals=e.subnormals, numerics=self.numerics
        )
