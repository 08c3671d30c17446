"""Treat the operands of a product: round and quantize them, and show them to observers first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mxlab.errors import ConversionError
from mxlab.formats import MXFormat, NumberFormat, Numerics, Rounding, elementwise_format
from mxlab.model.nn.products import unseen
from mxlab.numerics import DTYPES, hadamard, is_lossless, quantize, round_elementwise, transforms
from mxlab.recipe import Elementwise, Phase
from mxlab.recipe.transform import Derotated, Hadamard, Transform, Wush

# Told of an operand before it is quantized: its role, the tensor, and the axis of its blocks.
Observer = Callable[[str, Tensor, int], None]


_FITTED = (
    "a transform that is fitted by calibration (wush) is asked for, and the weights were not quantized with it: use "
    "mxlab quantize, and load what it saves"
)


class Observable:
    """Shows operands to observers, one for each site: the one hook point of :func:`mxlab.model.observe.observe`.

    ``acted`` are the phases in which it has computed, by the site's parameter; compiled code is not seen.
    """

    _observers: ClassVar[dict[str, Observer]] = {}  # by the site's parameter; an instance that is observed has its own
    acted: ClassVar[frozenset[tuple[str, Phase]]] = frozenset()

    def _note(self, parameter: str, phase: Phase) -> None:
        """Remember that the site with that parameter computes in ``phase``."""
        if not torch.compiler.is_compiling() and (parameter, phase) not in self.acted:
            object.__setattr__(self, "acted", self.acted | {(parameter, phase)})

    def set_observer(self, parameter: str, observer: Observer | None) -> None:
        """Show the operands of the site with that parameter to ``observer``; None: to nobody any more."""
        others = {name: o for name, o in self._observers.items() if name != parameter}
        observers = others if observer is None else {**others, parameter: observer}
        object.__setattr__(self, "_observers", observers)

    def _show(self, parameter: str, role: str, x: Tensor, axis: int = -1) -> None:
        if self._observers and (observer := self._observers.get(parameter)):
            with unseen():  # what an observer multiplies is none of an attention's products
                observer(role, x, axis)


@dataclass(frozen=True)
class LinearOperands:
    """The formats of a linear layer's roles in one phase; None leaves a role unchanged.

    A transform comes first: of the weight and of the input, along the dimension that the product sums over; one that
    is derotated is of the input alone, and is undone once that is quantized. Then the order is microxcaling's: round
    element-wise, quantize along the inner dimension, multiply, round the result, add the rounded bias, round again;
    then the output is quantized along its last axis. Without element-wise rounding the bias is added by the matmul
    itself, as in torch.
    """

    weight: NumberFormat | None = None
    activation: NumberFormat | None = None
    bias: NumberFormat | None = None
    output: NumberFormat | None = None
    elementwise: Elementwise = field(default_factory=Elementwise)
    numerics: Numerics = "exact"
    transform: Transform | None = None
    # The dtypes that element-wise rounding leaves unchanged.
    untouched: tuple[torch.dtype, ...] = field(init=False)
    # Equal where the same input, or weight, becomes the same; short, as they are compared at every call.
    input_kind: str = field(init=False)
    weight_kind: str = field(init=False)

    def __post_init__(self) -> None:
        e = self.elementwise
        object.__setattr__(self, "input_kind", f"{self.transform} {self.activation} {self.numerics} {e}")
        object.__setattr__(self, "weight_kind", f"{self.weight_transform} {self.weight} {self.numerics} {e}")
        element = elementwise_format(e.bfloat, e.fp)
        exactly = self.numerics == "exact" and e.subnormals
        untouched = tuple(t for t in DTYPES if element is None or (exactly and is_lossless(element, t)))
        object.__setattr__(self, "untouched", untouched)

    def on_weight(self, weight: Tensor, axis: int = -1) -> Tensor:
        """Return the weight as the matmul sees it, same shape and dtype; ``axis`` is the one that it sums over.

        Of experts' weights [experts, ..., ...] each matrix is a tensor of its own, as in a checkpoint that has a layer
        for each: a scale of a whole tensor is that of one expert.
        """
        if weight.ndim == 3 and self.weight is not None and self.weight.tensor_bits:
            return torch.stack([self.on_weight(matrix, axis) for matrix in weight])
        if isinstance(self.transform, Wush):
            raise ConversionError(_FITTED)
        return self.on_transformed_weight(self.transformed(weight, axis), axis)

    def on_transformed_weight(self, weight: Tensor, axis: int = -1) -> Tensor:
        """Return a weight that is in the basis of the transform already as the matmul sees it."""
        return self._quantized(self.weight_before_grid(weight), self.weight, axis)

    def weight_before_grid(self, weight: Tensor) -> Tensor:
        """Return a weight in the basis of the transform as it is quantized: rounded element-wise."""
        return self._rounded(weight, self.elementwise.weight_rounding)

    def on_activation(
        self, x: Tensor, out: Tensor | None = None, axis: int = -1, matrices: Tensor | None = None
    ) -> Tensor:
        """Return the input [..., in] as the matmul sees it; in ``out``, if that is given and x is quantized."""
        transform, fmt = self.transform, self.activation
        if isinstance(transform, Derotated) and fmt is not None:
            rotated = self._rounded(hadamard.transform(x, transform.size, axis), self.elementwise.output_rounding)
            on_grid = self._quantized(rotated, fmt, axis)
            return hadamard.transform(on_grid, transform.size, axis, inverse=True)
        if isinstance(transform, Hadamard | Wush) and fmt is not None and x.dtype in self.untouched:
            return self._transformed_and_quantized(x, transform, fmt, axis, matrices, out)
        return self._quantized(self.before_grid(x, axis, matrices), self.activation, axis, out)

    def before_grid(self, x: Tensor, axis: int = -1, matrices: Tensor | None = None) -> Tensor:
        """Return the input [..., in] as it is quantized: transformed, and rounded element-wise."""
        return self._rounded(self.transformed(x, axis, matrices), self.elementwise.output_rounding)

    def on_bias(self, bias: Tensor) -> Tensor:
        """Return the bias [out] as it is added."""
        return self._quantized(self._rounded(bias, self.elementwise.weight_rounding), self.bias)

    def on_product(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """Round the result [..., out] of the matmul, and add the bias [out] that the matmul did not add."""
        y = self._rounded(y, self.elementwise.output_rounding)
        if bias is not None:
            y = self._rounded(y + self.on_bias(bias), self.elementwise.output_rounding)
        return y

    def on_output(self, y: Tensor) -> Tensor:
        """Return the layer's output [..., out], quantized along its last axis."""
        return self._quantized(y, self.output)

    @property
    def adds_bias_apart(self) -> bool:
        """Whether the bias is added to the rounded result rather than by the matmul."""
        return bool(self.elementwise.bfloat or self.elementwise.fp)

    @property
    def weight_is_idempotent(self) -> bool:
        """Whether quantizing a quantized weight once more leaves it unchanged."""
        fmt = self.weight
        is_stable = fmt is None or (isinstance(fmt, MXFormat) and fmt.is_idempotent)
        return is_stable and self.numerics == "exact" and self.weight_transform is None

    @property
    def weight_transform(self) -> Transform | None:
        """What the weight is transformed by; None where it stays in its own basis."""
        return None if isinstance(self.transform, Derotated) else self.transform

    @property
    def shares_input(self) -> bool:
        """Whether layers with equal operands may share one quantized input: not if each draws its own noise."""
        draws = self.activation is not None and self.activation.is_random
        return not draws and self.elementwise.output_rounding != "dither"

    def transformed(self, x: Tensor, axis: int, matrices: Tensor | None = None) -> Tensor:
        """Return an operand in the basis of the product, before it is rounded or quantized.

        Args:
            x: the operand.
            axis: along which it is transformed.
            matrices: of a transform that was fitted, [blocks, size, size]: those of the activation, or of the weight.
        """
        if self.transform is None or isinstance(self.transform, Derotated):
            return x
        if isinstance(self.transform, Hadamard):
            return hadamard.transform(x, self.transform.size, axis)
        assert matrices is not None
        return transforms.transform(x.movedim(axis, -1), matrices.float()).movedim(-1, axis).contiguous()

    def _transformed_and_quantized(
        self, x: Tensor, transform: Transform, fmt: NumberFormat, axis: int, matrices: Tensor | None, out: Tensor | None
    ) -> Tensor:
        """Return the input transformed and quantized, in one pass where that can be."""
        if isinstance(transform, Hadamard):
            return hadamard.transform_quantize(x, transform.size, fmt, axis, numerics=self.numerics, out=out)
        assert matrices is not None
        if axis in (-1, x.ndim - 1):
            return transforms.transform_quantize(x, matrices.float(), fmt, numerics=self.numerics, out=out)
        return self._quantized(self.transformed(x, axis, matrices), fmt, axis, out)

    def _quantized(self, x: Tensor, fmt: NumberFormat | None, axis: int = -1, out: Tensor | None = None) -> Tensor:
        return x if fmt is None else quantize(x, fmt, axis=axis, numerics=self.numerics, out=out)

    def _rounded(self, x: Tensor, rounding: Rounding) -> Tensor:
        if x.dtype in self.untouched:
            return x
        e = self.elementwise
        return round_elementwise(
            x, bfloat=e.bfloat, fp=e.fp, rounding=rounding, subnormals=e.subnormals, numerics=self.numerics
        )
