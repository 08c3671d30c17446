"""Comparing tensors bit for bit."""

import torch
from torch import Tensor


def same(got: Tensor, expected: Tensor) -> None:
    """Assert that bits are the same, the sign of zero included; NaN equals NaN."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    as_bits = {2: torch.int16, 4: torch.int32}[got.element_size()]
    differ = got.contiguous().view(as_bits) != expected.contiguous().view(as_bits)
    wrong = differ & ~(got.isnan() & expected.isnan())
    assert not wrong.any(), f"{int(wrong.sum())} differ, first {got[wrong][0]!r}, not {expected[wrong][0]!r}"
