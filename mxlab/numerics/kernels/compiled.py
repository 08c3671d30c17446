"""Turn tensors into the dense buffers and layouts that the kernels of the compiled backends take.

A kernel sees a contiguous tensor of shape (outer, axis, inner) whose blocks lie along the axis. A tensor whose axes
have another order in memory is processed in that order; one with gaps or overlaps is copied first.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mxlab.formats import ElementFormat, MXFormat, Numerics, Rounding
from mxlab.numerics import microxcaling
from mxlab.numerics.blocks import Blocks
from mxlab.numerics.reference import block_layout


class Layout(NamedTuple):
    """A contiguous tensor of shape (outer, axis, inner), in blocks of at most ``axis`` elements along the axis."""

    outer: int
    axis: int
    inner: int
    block: int


Scaling = Literal["power", "asymmetric", "searched", "floating"]

_BY_RULE: dict[str, Scaling] = {"mase_int": "asymmetric", "mse": "searched", "max": "floating"}
_MANTISSA = 2**23 - 1  # of a float32


def scaling(fmt: MXFormat) -> Scaling:
    """Return how the kernels choose and apply the scales of the format.

    ``power``: a power of two; ``asymmetric``: the same for elements in [-1, 1); ``searched``: the better of two powers
    of two; ``floating``: a floating-point number.
    """
    return _BY_RULE.get(fmt.scale_rule, "power")


def carry(fmt: MXFormat) -> int:
    """Return what to add to the 23 mantissa bits of a block's largest magnitude before taking its exponent.

    The power-of-two rules differ only in which mantissas carry into the exponent: none (``floor``); all but 0
    (``ceil``); from half a unit of the element's mantissa below the next power of two (``even``); all above the
    mantissa of the largest element (``rceil``).
    """
    element = fmt.element_format
    largest = int(element.max * 2.0 ** (23 - element.emax)) & _MANTISSA
    by_rule = {
        "ceil": _MANTISSA,
        "mase_int": _MANTISSA,
        "even": 2 ** (22 - element.mantissa_bits),
        "rceil": _MANTISSA - largest,
    }
    return by_rule.get(fmt.scale_rule, 0)


class Compiled(ABC):
    """A backend whose kernels take dense tensors; its results have the bits of the reference."""

    def quantize(self, x: Tensor, fmt: MXFormat, axes: tuple[int, ...], seed: int, numerics: Numerics) -> Tensor:
        """Return ``x`` quantized to ``fmt`` in blocks along ``axes``.

        Args:
            x: float32, bfloat16 or float16, any non-empty shape.
            fmt: the format.
            axes: non-negative; several form joint tiles.
            seed: 64 bits, used by dither rounding only.
            numerics: ``exact`` or ``microxcaling``.

        Returns:
            A new tensor laid out as ``torch.empty_like(x)``.

        Raises:
            FormatError: a format that microxcaling does not have; see :func:`mxlab.numerics.microxcaling.check`.
        """
        _check(fmt, x, numerics)
        if len(axes) != 1:
            return self._quantize_tiles(x, fmt, axes, seed, numerics)
        x, out = _dense(x), torch.empty_like(x)
        self._run(x, out, self._noise(x, fmt.rounding, seed), fmt, numerics, _layout(x, fmt, axes[0]))
        return out

    def quantize_out(self, x: Tensor, out: Tensor, fmt: MXFormat, axis: int, seed: int, numerics: Numerics) -> None:
        """Write what :meth:`quantize` returns for one axis into ``out``; both tensors are contiguous."""
        _check(fmt, x, numerics)
        self._run(x, out, self._noise(x, fmt.rounding, seed), fmt, numerics, _layout(x, fmt, axis))

    def quantize_(self, x: Tensor, fmt: MXFormat, axes: tuple[int, ...], seed: int, numerics: Numerics) -> None:
        """Quantize ``x`` in place; otherwise as :meth:`quantize`."""
        if len(axes) == 1 and _is_dense(x):
            _check(fmt, x, numerics)
            self._run(x, x, self._noise(x, fmt.rounding, seed), fmt, numerics, _layout(x, fmt, axes[0]))
        else:
            x.copy_(self.quantize(x, fmt, axes, seed, numerics))

    def round_elementwise(
        self, x: Tensor, element: ElementFormat, rounding: Rounding, subnormals: bool, seed: int, numerics: Numerics
    ) -> Tensor:
        """Return each value of ``x`` rounded to ``element`` on its own, laid out as ``torch.empty_like(x)``."""
        x, out = _dense(x), torch.empty_like(x)
        self._run_elementwise(x, out, self._noise(x, rounding, seed), element, rounding, subnormals, numerics)
        return out

    @staticmethod
    def _checked_layout(x: Tensor, fmt: MXFormat, numerics: Numerics) -> Layout:
        """Return the layout of the blocks along the last axis."""
        _check(fmt, x, numerics)
        return _layout(x, fmt, x.ndim - 1)

    @abstractmethod
    def uniform(self, shape: torch.Size | tuple[int, ...], seed: int, device: torch.device) -> Tensor:
        """Return the float32 numbers that :func:`mxlab.numerics.philox.uniform` draws."""

    @abstractmethod
    def _run(
        self, x: Tensor, out: Tensor, noise: Tensor | None, fmt: MXFormat, numerics: Numerics, layout: Layout
    ) -> None:
        """Quantize ``x`` into ``out``, which may be ``x``. All three tensors have the same order in memory."""

    @abstractmethod
    def _run_elementwise(
        self,
        x: Tensor,
        out: Tensor,
        noise: Tensor | None,
        element: ElementFormat,
        rounding: Rounding,
        subnormals: bool,
        numerics: Numerics,
    ) -> None:
        """Round the elements of ``x`` into ``out``, which may be ``x``."""

    def _quantize_tiles(self, x: Tensor, fmt: MXFormat, axes: tuple[int, ...], seed: int, numerics: Numerics) -> Tensor:
        """Quantize joint tiles of several axes, copied to rows of one tile each."""
        cut: Blocks = block_layout(x, fmt, axes)
        tiles = cut.split(x).contiguous()  # (..., n_tiles, elements)
        noise = self._noise(x, fmt.rounding, seed)
        if noise is not None:
            noise = cut.split(noise).contiguous()
        out = torch.empty_like(tiles)
        elements = tiles.shape[-1]
        self._run(tiles, out, noise, fmt, numerics, Layout(tiles.numel() // elements, elements, 1, elements))
        return torch.empty_like(x).copy_(cut.join(out))

    def _noise(self, x: Tensor, rounding: Rounding, seed: int) -> Tensor | None:
        """Return a random number for each element, drawn by logical index, in the memory order of the dense ``x``."""
        if rounding != "dither":
            return None
        noise = self.uniform(x.shape, seed, x.device)
        return noise if x.is_contiguous() else torch.empty_like(x, dtype=torch.float32).copy_(noise)


def address(x: Tensor | None) -> int:
    """Return the address of the tensor's data; 0 for None."""
    return 0 if x is None else x.data_ptr()


def dense_rows(x: Tensor) -> Tensor:
    """Return ``x``, or a copy: without gaps or overlaps, and the last axis is the innermost in memory."""
    return x if x.is_contiguous() or (_is_dense(x) and _memory_order(x)[-1] == x.ndim - 1) else x.contiguous()


def _check(fmt: MXFormat, x: Tensor, numerics: Numerics) -> None:
    if numerics == "microxcaling":
        microxcaling.check(fmt, x.dtype)


def _layout(x: Tensor, fmt: MXFormat, axis: int) -> Layout:
    block_size = 1 if fmt.scale_rule == "none" else fmt.block_size
    if x.is_contiguous():
        return _contiguous(x.shape, block_size, axis)
    order = _memory_order(x)
    return _contiguous(torch.Size(x.shape[i] for i in order), block_size, order.index(axis))


@functools.lru_cache(maxsize=1024)
def _contiguous(shape: torch.Size, block_size: int, axis: int) -> Layout:
    length, inner = shape[axis], math.prod(shape[axis + 1 :])
    return Layout(math.prod(shape[:axis]), length, inner, min(block_size or length, length))


def _memory_order(x: Tensor) -> list[int]:
    """Return the axes of ``x``, from the largest stride to the smallest."""
    return sorted(range(x.ndim), key=x.stride().__getitem__, reverse=True)


def _is_dense(x: Tensor) -> bool:
    """Return whether ``x`` fills its memory without gaps or overlaps, its axes in some order."""
    return x.is_contiguous() or x.permute(_memory_order(x)).is_contiguous()


def _dense(x: Tensor) -> Tensor:
    """Return ``x``, or a copy without gaps or overlaps whose axes have the same order in memory."""
    return x if _is_dense(x) else torch.empty_like(x).copy_(x)
