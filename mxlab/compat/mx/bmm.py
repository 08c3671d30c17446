"""``bmm`` with rounded operands, under microxcaling's name and signature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mxlab.compat.mx._operator import aten
from mxlab.compat.mx._product import product
from mxlab.compat.mx.matmul import PLANS
from mxlab.compat.mx.specs import apply_mx_specs, mx_assert_test

_BMM = replace(PLANS["aa"], multiply=aten.bmm)


def bmm(in1: Tensor, in2: Tensor, mx_specs: Mapping[str, Any] | None = None, name: str | None = None) -> Tensor:
    """Return ``torch.bmm`` of two rounded activations; torch's own where ``mx_specs`` is None.

    Args:
        in1: (B, M, K).
        in2: (B, K, N).
        mx_specs: the options.
        name: not read.

    Returns:
        (B, M, N).

    Raises:
        FormatError: as ``quantize_mx_op`` and ``quantize_elemwise_op``.
        SpecError: an unknown option.
    """
    mx_assert_test(mx_specs)
    if mx_specs is None:
        return aten.bmm(in1, in2)
    return product(in1, in2, None, apply_mx_specs(mx_specs), _BMM)
