"""Hadamard matrices of every size that Sylvester's and Paley's constructions give, and the transform by them.

A Hadamard matrix has elements ±1 and orthogonal rows. Sylvester: H of 2n is [[H, H], [H, -H]], so that H of 2^k m is a
Kronecker product with H of m. Paley: for a prime q, one of order q + 1 where q = 3 mod 4, and one of order 2 (q + 1)
where q = 1 mod 4 (R. E. A. C. Paley, "On orthogonal matrices", 1933).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from mxlab.errors import FormatError
from mxlab.formats import NumberFormat, Numerics
from mxlab.numerics import transforms
from mxlab.numerics.kernels.native import LARGEST_MATRIX
from mxlab.numerics.quantization import DTYPES, quantize


def transform(x: Tensor, size: int, axis: int = -1, *, inverse: bool = False) -> Tensor:
    """Multiply blocks of ``size`` elements along an axis by the normalised Hadamard matrix of that size.

    Args:
        x: floating-point, any shape; the length of the axis is a multiple of ``size``.
        size: as :func:`sizes_below` lists them; 0 for the whole axis.
        axis: along which the blocks lie.
        inverse: multiply by the transposed matrix, which undoes the transform.

    Returns:
        A new tensor of the shape and dtype of ``x``, computed in float32 at least: up to size 128 by
        :func:`mxlab.numerics.transforms.transform`, beyond by torch with two factors of the matrix.

    Raises:
        FormatError: no such matrix, or a length that is not a multiple of its size.
    """
    length = x.shape[axis]
    check_size(size, length)
    if _is_one_product(x, size or length):
        matrices = _on_the_right(x, size or length, inverse)
        if axis in (-1, x.ndim - 1):
            return transforms.transform(x, matrices)
        return transforms.transform(x.movedim(axis, -1), matrices).movedim(-1, axis).contiguous()
    left, right = (factor.to(x.device, _wide(x.dtype)) for factor in _factors(size or length))
    if inverse:
        left, right = left.t(), right.t()
    blocks = x.movedim(axis, -1).to(_wide(x.dtype))
    shape = blocks.shape
    blocks = blocks.reshape(*shape[:-1], -1, len(left), len(right)) @ right.t()
    if len(left) > 1:
        blocks = left @ blocks
    return blocks.reshape(shape).to(x.dtype).movedim(-1, axis).contiguous()


def transform_quantize(
    x: Tensor, size: int, fmt: NumberFormat, axis: int = -1, *, numerics: Numerics = "exact", out: Tensor | None = None
) -> Tensor:
    """Quantize what :func:`transform` returns along the same axis; into ``out``, if that is given.

    Raises:
        FormatError: as :func:`transform` and :func:`mxlab.numerics.quantize`.
    """
    length = x.shape[axis]
    check_size(size, length)
    if axis in (-1, x.ndim - 1) and _is_one_product(x, size or length):
        matrices = _on_the_right(x, size or length, False)
        return transforms.transform_quantize(x, matrices, fmt, numerics=numerics, out=out)
    return quantize(transform(x, size, axis), fmt, axis=axis, numerics=numerics, out=out)


def _is_one_product(x: Tensor, size: int) -> bool:
    """Return whether blocks are multiplied by the whole matrix, rather than by its two factors one after the other."""
    return size <= LARGEST_MATRIX and x.dtype in DTYPES


@torch.compiler.assume_constant_result
def check_size(size: int, length: int) -> None:
    """Raise FormatError unless an axis of that length can be transformed in blocks of ``size`` (0: as a whole)."""
    if (size and length % size) or _odd_order(size or length) is None:
        fitting = ", ".join(str(n) for n in sizes_below(length + 1) if length % n == 0)
        raise FormatError(
            f"no Hadamard transform of size {size or length} fits an axis of {length}: sizes that do are "
            f"{fitting or 'none'}"
        )


def matrix(size: int) -> Tensor:
    """Return the normalised matrix, float32 [size, size]. Raises FormatError where there is none."""
    check_size(size, size)
    return torch.kron(*_factors(size))


def _on_the_right(x: Tensor, size: int, inverse: bool) -> Tensor:
    """Return what blocks of ``x`` are multiplied by as rows: the transposed matrix, or for the inverse the matrix."""
    if torch.compiler.is_compiling():
        return torch.ops.mxlab.hadamard(x.detach(), size, inverse)
    return _matrix_on_the_right(size, inverse, x.device)


@functools.cache
def _matrix_on_the_right(size: int, inverse: bool, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return (matrix(size) if inverse else matrix(size).t().contiguous()).to(device)


# Compiled code cannot call a cached function, nor take several tensors from one that is assumed constant. It may write
# to what an operator returns, which is therefore a copy.
_library = torch.library.Library("mxlab", "FRAGMENT")
_library.define("hadamard(Tensor like, int size, bool inverse) -> Tensor")
_library.impl(
    "hadamard",
    lambda like, size, inverse: _matrix_on_the_right(size, inverse, like.device).clone(),
    "CompositeExplicitAutograd",
)
_library.impl("hadamard", lambda like, size, inverse: like.new_empty((size, size), dtype=torch.float32), "Meta")


def sizes_below(limit: int) -> list[int]:
    """Return all sizes of 2 and more, below ``limit``, that there is a matrix of."""
    return [size for size in range(2, limit) if _odd_order(size) is not None]


@functools.cache
def _factors(size: int) -> tuple[Tensor, Tensor]:
    """Return two normalised matrices of about equal size, whose Kronecker product is that of ``size``; float32."""
    order = _odd_order(size)
    assert order is not None
    doublings = (size // order).bit_length() - 1
    if size <= 64:  # one product with a small matrix takes less time than two
        return torch.ones(1, 1), torch.kron(_paley(order), _sylvester(doublings)) / math.sqrt(size)
    split = min(range(doublings + 1), key=lambda k: order * 2**k + 2 ** (doublings - k))
    left = torch.kron(_paley(order), _sylvester(split))
    right = _sylvester(doublings - split)
    return left / math.sqrt(len(left)), right / math.sqrt(len(right))


@functools.cache
def _odd_order(size: int) -> int | None:
    """Return the order of the matrix that Sylvester's construction doubles up to ``size``; None where there is none."""
    if size < 1:
        return None
    odd = size // (size & -size)
    if odd == 1:
        return 1
    order = 4 * odd
    while size % order == 0:
        if _paley_prime(order) is not None:
            return order
        order *= 2
    return None


def _paley_prime(order: int) -> int | None:
    """Return the prime from which Paley's first or second construction makes a matrix of ``order``."""
    if _is_prime(order - 1) and (order - 1) % 4 == 3:
        return order - 1
    half = order // 2 - 1
    return half if order % 2 == 0 and _is_prime(half) and half % 4 == 1 else None


def _paley(order: int) -> Tensor:
    if order == 1:
        return torch.ones(1, 1)
    prime = _paley_prime(order)
    assert prime is not None
    residues = {i * i % prime for i in range(1, prime)}
    symbols = torch.tensor([0.0 if i == 0 else 1.0 if i in residues else -1.0 for i in range(prime)])
    index = torch.arange(prime)
    bordered = torch.zeros(prime + 1, prime + 1)
    bordered[1:, 1:] = symbols[(index[:, None] - index[None]) % prime]
    bordered[0, 1:] = 1.0
    if prime % 4 == 3:
        bordered[1:, 0] = -1.0
        return torch.eye(prime + 1) + bordered
    bordered[1:, 0] = 1.0
    plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(bordered, plus) + torch.kron(torch.eye(prime + 1), minus)


def _sylvester(doublings: int) -> Tensor:
    made = torch.ones(1, 1)
    for _ in range(doublings):
        made = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), made)
    return made


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
