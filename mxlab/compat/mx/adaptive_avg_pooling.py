"""Adaptive average pooling in rounded steps, under microxcaling's names and signatures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mxlab.compat.mx._operator import Gradients, Layer, Operator, aten
from mxlab.compat.mx.specs import mx_assert_test
from mxlab.compat.mx.vector_ops import Vector
from mxlab.errors import SpecError

Size = int | tuple[int | None, int | None] | None


class _Pool(Operator):
    """Each element of the output is the mean over its window of the input; windows may overlap."""

    def __init__(self, shape: torch.Size, size: tuple[int, int]) -> None:
        self.shape, self.size = shape, size

    def forward(self, v: Vector, x: Tensor) -> tuple[Tensor, tuple[()]]:
        y = x.new_empty(*x.shape[:2], *self.size)
        for row, column, window in self._windows():
            y[:, :, row, column] = v.mean(x[window], [2, 3])
        return y, ()

    def backward(self, v: Vector, saved: tuple[()], grad: Tensor) -> Gradients:
        found = torch.zeros(self.shape, device=grad.device)  # float32: many windows may meet in an element
        for row, column, window in self._windows():
            height, width = found[window].shape[2:]
            share = grad[:, :, row, column].float() / height / width
            found[window] = v.add(found[window], share[:, :, None, None])
        return (found.to(grad.dtype),)

    def _windows(self) -> Iterator[tuple[int, int, tuple[slice, ...]]]:
        """Yield row and column of each element of the output, and the index of its window of the input."""
        rows, columns = (_spans(n, into) for n, into in zip(self.shape[2:], self.size, strict=True))
        for row, vertical in enumerate(rows):
            for column, horizontal in enumerate(columns):
                yield row, column, (slice(None), slice(None), vertical, horizontal)


def _spans(length: int, count: int) -> list[slice]:
    """Return ``count`` slices that cover ``length`` elements: from the floor of each boundary to the ceiling."""
    return [slice(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]


def adaptive_avg_pool2d(
    input: Tensor, output_size: Size, mx_specs: Mapping[str, Any] | None = None, name: str | None = None
) -> Tensor:
    """Return the means over ``output_size`` windows; torch's own where ``mx_specs`` is None.

    Args:
        input: (N, C, H, W).
        output_size: (H', W'), or one number for both; None keeps a dimension as it is.
        mx_specs: the options.
        name: not read.

    Returns:
        (N, C, H', W').

    Raises:
        FormatError: as ``quantize_elemwise_op``.
        SpecError: an input or an output size of other dimensions, or an unknown option.
    """
    mx_assert_test(mx_specs)
    given = tuple(output_size) if isinstance(output_size, tuple | list) else (output_size, output_size)
    if len(given) != 2 or (mx_specs is not None and input.ndim != 4):
        raise SpecError(
            f"adaptive_avg_pool2d: input has {input.ndim} dimensions and output_size is {output_size!r}: it takes "
            "(N, C, H, W) and (H, W)"
        )
    height, width = (n if n is not None else there for n, there in zip(given, input.shape[-2:], strict=True))
    if mx_specs is None:
        return aten.adaptive_avg_pool2d(input, [height, width])
    return _Pool(input.shape, (height, width))(mx_specs, input)


class AdaptiveAvgPool2d(Layer, torch.nn.Module):
    """:func:`adaptive_avg_pool2d` as a layer."""

    def __init__(self, output_size: Size, mx_specs: Mapping[str, Any] | None = None, name: str | None = None) -> None:
        super().__init__()
        self.output_size = output_size
        self.configure(mx_specs, name)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (N, C, H', W') of (N, C, H, W)."""
        return adaptive_avg_pool2d(inputs, self.output_size, self.given_specs)
