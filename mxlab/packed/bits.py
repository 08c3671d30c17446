"""Codes of a few bits, one after the other in bytes.

Code i of a row takes the bits from i * bits on, counted from the lowest bit of the first byte: the first of two codes
of four bits is the lower half of a byte. A row ends with its last byte; what is left of that is 0.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_length(codes: int, bits: int) -> int:
    """Return how many bytes a row of codes takes."""
    return -(-codes * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes [..., codes], uint8, below 2^bits, as bytes [..., bytes], uint8; ``bits`` is 1 to 8."""
    if bits == 8:
        return codes.contiguous()
    group = 8 // math.gcd(bits, 8)  # codes that fill whole bytes
    length = codes.shape[-1]
    padded = F.pad(codes, (0, -length % group)).unflatten(-1, (-1, group)).long()
    words = (padded << _places(group, bits, codes.device)).sum(-1, keepdim=True)  # at most 56 bits
    found = (words >> _places(group * bits // 8, 8, codes.device)) & 0xFF
    return found.flatten(-2)[..., : packed_length(length, bits)].to(torch.uint8)


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Return the ``length`` codes [..., length] of rows that :func:`pack` gave."""
    if bits == 8:
        return packed
    group = 8 // math.gcd(bits, 8)
    size = group * bits // 8
    padded = F.pad(packed, (0, -packed.shape[-1] % size)).unflatten(-1, (-1, size)).long()
    words = (padded << _places(size, 8, packed.device)).sum(-1, keepdim=True)
    found = (words >> _places(group, bits, packed.device)) & (2**bits - 1)
    return found.flatten(-2)[..., :length].to(torch.uint8)


def _places(count: int, bits: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device) * bits
