"""Philox4x32-10, a counter-based random generator: the same numbers on every device, in any order of evaluation.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def uniform(shape: torch.Size | tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Draw float32 numbers in [0, 1), multiples of 2^-24, one per element of ``shape``.

    Element i of the flattened tensor gets word i mod 4 of the counter floor(i / 4) under the key ``seed`` (64 bits).
    """
    count = torch.Size(shape).numel()
    index = torch.arange(-(-count // 4), dtype=torch.int64, device=device)
    zero = torch.zeros_like(index)
    words = philox((index & _MASK, index >> 32, zero, zero), (seed & _MASK, (seed >> 32) & _MASK))
    flat = torch.stack(words, -1).flatten()[:count]
    return ((flat >> 8).to(torch.float32) * 2.0**-24).reshape(shape)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Compute ten rounds on 32-bit words held in int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; ``a`` goes in halves, as int64 would overflow."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
