"""microxcaling's import surface: its functions, layers and options, on mxlab's numerics.

``custom_cuda=False`` computes what microxcaling's torch path does, ``custom_cuda=True`` the ``exact`` numerics of its
kernels; both on every device. :func:`mxlab.compat.enable` lets ``import mx`` find this package.

Source: microsoft/microxcaling, its README and tests; written from what it does, not from its code.
"""

from typing import Any

from mxlab.compat import missing
from mxlab.compat.mx.bmm import bmm
from mxlab.compat.mx.elemwise_ops import quantize_elemwise_op
from mxlab.compat.mx.linear import Linear, linear
from mxlab.compat.mx.matmul import matmul
from mxlab.compat.mx.mx_ops import quantize_mx_op
from mxlab.compat.mx.specs import (
    MxSpecs,
    add_mx_args,
    apply_mx_specs,
    finalize_mx_specs,
    get_backwards_mx_specs,
    get_mx_specs,
)

__all__ = [
    "Linear",
    "MxSpecs",
    "add_mx_args",
    "apply_mx_specs",
    "bmm",
    "finalize_mx_specs",
    "get_backwards_mx_specs",
    "get_mx_specs",
    "linear",
    "matmul",
    "quantize_elemwise_op",
    "quantize_mx_op",
]


def __getattr__(name: str) -> Any:
    missing.check(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
