"""Plan which CUDA kernels compute something: their names, numbers of threads and arguments.

No GPU is needed to plan; :mod:`mxlab.numerics.kernels.cuda` compiles and launches.
"""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

import torch

from mxlab.formats import ElementFormat, MXFormat, Numerics, Rounding
from mxlab.numerics.kernels.compiled import Layout, carry, scaling

THREADS = 256  # of a thread block: kernels.cu
_AT_ONCE = 2  # vectors of a thread in quantize_vectors
_READ_AT_ONCE = 32  # elements of a thread in find_largest_finite
PAIR = 16  # bytes of two words in sum_words
_SUMMING_BLOCKS = 8  # thread blocks for a tensor in sum_words
_STORAGE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# A longer block takes two kernels: first its largest magnitude, then its elements. Along the last axis, and another.
_LONG, _LONG_COLUMN = 4096, 512
_PIECE, _PIECE_OF_COLUMN = 1024, 64


class Launch(NamedTuple):
    """A kernel, as a name expression of ``kernels.cu``; the number of threads it needs; its arguments, all integers."""

    kernel: str
    threads: int
    arguments: tuple[int, ...]


def plan(
    addresses: tuple[int, int, int], dtype: torch.dtype, fmt: MXFormat, numerics: Numerics, layout: Layout, scratch: int
) -> list[Launch]:
    """Return the kernels that quantize a tensor, in order.

    Args:
        addresses: of source, target (which may be the source) and noise, in memory of the device; noise may be 0.
        dtype: of source and target.
        fmt: the format.
        numerics: ``exact`` or ``microxcaling``.
        layout: of source and target, not empty.
        scratch: address of :func:`scratch_words` zeros of 32 bits; anything if there are none.
    """
    is_aligned = not (addresses[0] | addresses[1]) % 16
    if not fmt.scale_format.tensor_bits:
        return [step.launch(addresses, scratch, 0) for step in _steps(dtype, fmt, numerics, layout, is_aligned)]
    count = layout.outer * layout.axis * layout.inner
    kernel, threads = f"find_largest_finite<{_storage(dtype)}>", -(-count // _READ_AT_ONCE)
    largest = Launch(kernel, threads, (addresses[0], scratch, count))
    steps = _steps(dtype, fmt, numerics, layout, is_aligned)
    return [largest, *(step.launch(addresses, scratch + 4, scratch) for step in steps)]


class _Step(NamedTuple):
    """A launch without its addresses."""

    kernel: str
    threads: int
    sizes: tuple[int, ...]
    reads_amax: bool = False  # the largest magnitudes of long blocks, between the addresses and the sizes
    packed: tuple[int, int, int] | None = None  # the format; None where magnitudes are only looked for

    def launch(self, addresses: tuple[int, int, int], amax: int, tensor: int) -> Launch:
        """Return the launch with the addresses of :func:`plan`, of magnitudes of long blocks, and of the tensor's."""
        if self.packed is None:
            return Launch(self.kernel, self.threads, (addresses[0], amax, *self.sizes))
        between = (amax,) if self.reads_amax else ()
        return Launch(self.kernel, self.threads, (*addresses, *between, *self.sizes, *self.packed, tensor))


@functools.lru_cache(maxsize=1024)
def _steps(
    dtype: torch.dtype, fmt: MXFormat, numerics: Numerics, layout: Layout, is_aligned: bool
) -> tuple[_Step, ...]:
    """Return what quantizes the blocks of a tensor whose largest magnitude, if that matters, is known."""
    outer, axis, inner, block = layout = _simplified(layout)
    op, packed = _operation(dtype, fmt, numerics), _packed_format(fmt)
    vector = 16 // dtype.itemsize
    if is_aligned and _in_vectors(layout, vector):
        count = outer * axis // vector
        return (_Step(f"quantize_vectors<{op}, {block}>", -(-count // _AT_ONCE), (count,), packed=packed),)
    if not _is_long(fmt, layout):
        lanes = 1 if scaling(fmt) == "searched" else _lanes(layout)
        threads = outer * -(-axis // block) * inner * lanes
        return (_Step(f"quantize_blocks<{op}>", threads, (*layout, lanes), packed=packed),)
    piece, lanes = (_PIECE, 32) if inner == 1 else (_PIECE_OF_COLUMN, 1)
    threads = outer * -(-axis // block) * -(-block // piece) * inner * lanes
    sizes = (*layout, piece, lanes)
    return (
        _Step(f"find_largest<{_storage(dtype)}>", threads, sizes),
        _Step(f"quantize_pieces<{op}>", threads, sizes, reads_amax=True, packed=packed),
    )


@functools.lru_cache(maxsize=1024)
def scratch_words(fmt: MXFormat, layout: Layout) -> int:
    """Return how many largest magnitudes are kept between two kernels: of the tensor, and of long blocks."""
    outer, axis, inner, block = layout = _simplified(layout)
    blocks = outer * -(-axis // block) * inner if _is_long(fmt, layout) else 0
    return blocks + (fmt.scale_format.tensor_bits > 0)


def plan_elementwise(
    addresses: tuple[int, int, int],
    dtype: torch.dtype,
    count: int,
    element: ElementFormat,
    rounding: Rounding,
    subnormals: bool,
    numerics: Numerics,
) -> Launch:
    """Return the kernel that rounds ``count`` elements on their own; addresses as in :func:`plan`."""
    op = _expression("Exact" if numerics == "exact" else "Microxcaling", dtype, rounding)
    aligned = not (addresses[0] | addresses[1]) % 16
    arguments = (*addresses, count, int(aligned), int(subnormals), *_packed(element))
    return Launch(f"round_alone<{op}>", -(-count * dtype.itemsize // 16), arguments)


def plan_uniform(target: int, count: int, seed: int) -> Launch:
    """Return the kernel that draws ``count`` random numbers."""
    seed = (seed + 2**63) % 2**64 - 2**63  # 64 bits as a signed integer, the only kind of integer cuda-core passes
    return Launch("uniform_numbers", -(-count // 4), (target, count, seed))


def plan_sums(table: int, sums: int, tensors: int) -> Launch:
    """Return the kernel that adds up the memory of many tensors; addresses as ``sum_words`` of kernels.cu has them."""
    return Launch("sum_words", tensors * _SUMMING_BLOCKS * THREADS, (table, sums))


def _simplified(layout: Layout) -> Layout:
    """Return the layout as one row, where every element is a block or blocks fill the rows; else unchanged."""
    outer, axis, inner, block = layout
    if block == 1 or (inner == 1 and axis % block == 0):
        return Layout(1, outer * axis * inner, 1, block)
    return layout


def _in_vectors(layout: Layout, vector: int) -> bool:
    """Return whether a block is one element, or as many whole vectors as some threads of a warp can share."""
    outer, axis, inner, block = layout
    whole = block == 1 or (block % vector == 0 and block // vector in (1, 2, 4, 8, 16, 32))
    return whole and inner == 1 and axis % block == 0 and outer * axis % vector == 0


def _is_long(fmt: MXFormat, layout: Layout) -> bool:
    """Return whether blocks are cut into pieces. A search adds up errors in order: it gives a block to one thread."""
    return scaling(fmt) != "searched" and layout.block > (_LONG if layout.inner == 1 else _LONG_COLUMN)


def _lanes(layout: Layout) -> int:
    """Return how many neighbouring threads share a block: about one per 4 elements, if these are neighbours, too."""
    return 1 if layout.inner > 1 else min(32, 1 << (-(-layout.block // 4) - 1).bit_length())


_OPERATIONS = {"power": "Exact", "asymmetric": "Asymmetric", "searched": "Searched", "floating": "Floating"}


@functools.cache
def _operation(dtype: torch.dtype, fmt: MXFormat, numerics: Numerics) -> str:
    if numerics == "exact":
        return _expression(_OPERATIONS[scaling(fmt)], dtype, fmt.rounding)
    simple = _is_simple(fmt.element_format, dtype)
    return _expression("SimpleMicroxcaling" if simple else "Microxcaling", dtype, fmt.rounding)


def _expression(operation: str, dtype: torch.dtype, rounding: Rounding) -> str:
    return f"mx::device::{operation}<{_storage(dtype)}, mx::Rounding::{rounding}>"


def _storage(dtype: torch.dtype) -> str:
    return f"mx::device::{_STORAGE[dtype]}"


def _is_simple(element: ElementFormat, dtype: torch.dtype) -> bool:
    """Return whether the format meets the conditions of ``round_scaled_simply`` in microxcaling.h."""
    fits = element.mantissa_bits <= 7 and -64 <= element.emin <= 0 and element.emax <= 32
    return fits and dtype != torch.float16


@functools.cache
def _packed(element: ElementFormat) -> tuple[int, int]:
    """Return the two words from which ``unpacked`` of kernels.cu reads an element format."""
    return _word("3B5x", element.mantissa_bits, element.emax, element.is_int), _limits(element.min_normal, element.max)


@functools.cache
def _packed_format(fmt: MXFormat) -> tuple[int, int, int]:
    """Return the three words from which ``unpacked`` of kernels.cu reads a format."""
    grid, scale = fmt.grid, fmt.scale_grid
    small = (grid.mantissa_bits, grid.emax, grid.is_int, fmt.scale_emax, fmt.flush_fp32_subnorms)
    is_float = fmt.scale_format.is_float
    return (
        _word("7Bx", *small, scale.mantissa_bits, scale.emax),
        _limits(grid.min_normal, fmt.limits[1]),
        _limits(scale.min_normal, scale.max) if is_float else carry(fmt),
    )


def _limits(smallest_normal: float, largest: float) -> int:
    return _word("2f", smallest_normal, largest)


def _word(layout: str, *values: float) -> int:
    """Pack values into 64 bits; ``layout`` as in :mod:`struct`."""
    return int.from_bytes(struct.pack(f"<{layout}", *values), "little")
