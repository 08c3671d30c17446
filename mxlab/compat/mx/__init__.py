"""microxcaling's import surface: its functions, layers and options, on mxlab's numerics.

``custom_cuda=False`` computes what microxcaling's torch path does, ``custom_cuda=True`` the ``exact`` numerics of its
kernels; both on every device. :func:`mxlab.compat.enable` lets ``import mx`` find this package.

Source: microsoft/microxcaling, its README and tests; written from what it does, not from its code.
"""

import sys
from typing import Any

from mxlab.compat import missing
from mxlab.compat.mx.activations import (
    GELU,
    LeakyReLU,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Tanh,
    gelu,
    leaky_relu,
    relu,
    relu6,
    sigmoid,
    silu,
    tanh,
)
from mxlab.compat.mx.adaptive_avg_pooling import AdaptiveAvgPool2d, adaptive_avg_pool2d
from mxlab.compat.mx.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from mxlab.compat.mx.bmm import bmm
from mxlab.compat.mx.convolution import Conv1d, Conv2d, Conv3d, conv1d, conv2d, conv3d
from mxlab.compat.mx.elemwise_ops import quantize_elemwise_op
from mxlab.compat.mx.groupnorm import GroupNorm
from mxlab.compat.mx.layernorm import LayerNorm, RMSNorm, layer_norm
from mxlab.compat.mx.linear import Linear, linear
from mxlab.compat.mx.matmul import matmul
from mxlab.compat.mx.mx_mapping import inject_pyt_ops
from mxlab.compat.mx.mx_ops import quantize_mx_op
from mxlab.compat.mx.quantize import quantize_bfloat
from mxlab.compat.mx.rnn import LSTM
from mxlab.compat.mx.simd_ops import (
    simd_add,
    simd_div,
    simd_exp,
    simd_log,
    simd_mul,
    simd_norm,
    simd_reduce_mean,
    simd_reduce_sum,
    simd_split,
    simd_sqrt,
    simd_square,
    simd_sub,
)
from mxlab.compat.mx.softmax import Softmax, softmax
from mxlab.compat.mx.specs import (
    MxSpecs,
    add_mx_args,
    apply_mx_specs,
    finalize_mx_specs,
    get_backwards_mx_specs,
    get_mx_specs,
)
from mxlab.compat.mx.transpose_convolution import ConvTranspose2d

__all__ = [
    "GELU",
    "LSTM",
    "AdaptiveAvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose2d",
    "GroupNorm",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "MxSpecs",
    "RMSNorm",
    "ReLU",
    "ReLU6",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Tanh",
    "adaptive_avg_pool2d",
    "add_mx_args",
    "apply_mx_specs",
    "bmm",
    "conv1d",
    "conv2d",
    "conv3d",
    "finalize_mx_specs",
    "gelu",
    "get_backwards_mx_specs",
    "get_mx_specs",
    "inject_pyt_ops",
    "layer_norm",
    "leaky_relu",
    "linear",
    "matmul",
    "quantize_bfloat",
    "quantize_elemwise_op",
    "quantize_mx_op",
    "relu",
    "relu6",
    "sigmoid",
    "silu",
    "simd_add",
    "simd_div",
    "simd_exp",
    "simd_log",
    "simd_mul",
    "simd_norm",
    "simd_reduce_mean",
    "simd_reduce_sum",
    "simd_split",
    "simd_sqrt",
    "simd_square",
    "simd_sub",
    "softmax",
    "tanh",
]

# A function whose module has its name hides it: `import mx.linear as m` and `from mx import linear as m` give the
# function, and scripts go on to write m.linear(...) and m.Linear(...).
for _function in (linear, matmul, bmm, softmax):
    _module = sys.modules[_function.__module__]
    vars(_function).update({name: found for name, found in vars(_module).items() if not name.startswith("_")})


def __getattr__(name: str) -> Any:
    missing.check(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
