"""What microxcaling has and :mod:`mxlab.compat.mx` does not, and what to use instead."""

from __future__ import annotations

from mxlab.errors import CompatError

# microxcaling's modules, and what serves instead.
REMEDIES = {
    "custom_extensions": "custom_cuda=True needs no extension here",
    "matmul_precision": "products are torch's, at the precision that torch.set_float32_matmul_precision sets",
}


def check(name: str) -> None:
    """Raise CompatError where ``name`` is a part of microxcaling that is not provided."""
    if name in REMEDIES:
        raise CompatError(f"mxlab's mx has no {name}: {REMEDIES[name]}", name=f"mx.{name}")
