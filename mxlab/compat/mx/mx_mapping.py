"""Put microxcaling's operators in the place of torch's own, for a whole process or for a block of code.

Replaced are the functions of ``torch`` and ``torch.nn.functional`` that :data:`FUNCTION_MAPPING` names and the classes
of ``torch.nn`` that :data:`MODULE_MAPPING` names, each where that name is. What torch offers otherwise (methods and
arithmetic of tensors, attention in one call) stays torch's, and so does what was imported by name before.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mxlab.compat.mx import activations as act
from mxlab.compat.mx import adaptive_avg_pooling, batchnorm, convolution, groupnorm, layernorm, simd_ops
from mxlab.compat.mx.bmm import bmm
from mxlab.compat.mx.linear import Linear, linear
from mxlab.compat.mx.matmul import matmul
from mxlab.compat.mx.rnn import LSTM
from mxlab.compat.mx.softmax import Softmax, softmax
from mxlab.compat.mx.transpose_convolution import ConvTranspose2d
from mxlab.errors import SpecError

Specs = Mapping[str, Any] | None


def addmm_mx(bias: Tensor, in1: Tensor, in2: Tensor, mx_specs: Specs = None, name: str | None = None) -> Tensor:
    """Return ``in1 @ in2 + bias``: :func:`mx.matmul <mxlab.compat.mx.matmul.matmul>` in the order of torch's addmm."""
    return matmul(in1, in2, bias, mx_specs)


def _norm(input: Tensor, p: Any = "fro", dim: None = None, keepdim: bool = False, mx_specs: Specs = None) -> Tensor:
    """``simd_norm`` in the order of ``torch.norm``; raise SpecError at a norm that is not Frobenius's of all."""
    if p not in ("fro", 2, None) or dim is not None:
        raise SpecError(f"torch.norm: with mx_specs p must be 'fro' or 2 and dim None, not {p!r} and {dim!r}")
    return simd_ops.simd_norm(input, keepdim, mx_specs)


MODULE_MAPPING: dict[str, type[torch.nn.Module]] = {
    found.__name__: found
    for found in (
        adaptive_avg_pooling.AdaptiveAvgPool2d,
        batchnorm.BatchNorm1d,
        batchnorm.BatchNorm2d,
        batchnorm.BatchNorm3d,
        convolution.Conv1d,
        convolution.Conv2d,
        convolution.Conv3d,
        ConvTranspose2d,
        act.GELU,
        groupnorm.GroupNorm,
        LSTM,
        layernorm.LayerNorm,
        act.LeakyReLU,
        Linear,
        act.ReLU,
        act.ReLU6,
        act.SiLU,
        act.Sigmoid,
        Softmax,
        act.Tanh,
    )
}

FUNCTION_MAPPING: dict[str, Callable[..., Any]] = {
    "adaptive_avg_pool2d": adaptive_avg_pooling.adaptive_avg_pool2d,
    "batch_norm": batchnorm.batch_norm,
    "conv1d": convolution.conv1d,
    "conv2d": convolution.conv2d,
    "conv3d": convolution.conv3d,
    "gelu": act.gelu,
    "group_norm": groupnorm.group_norm,
    "layer_norm": layernorm.layer_norm,
    "leaky_relu": act.leaky_relu,
    "linear": linear,
    "relu": act.relu,
    "relu6": act.relu6,
    "sigmoid": act.sigmoid,
    "silu": act.silu,
    "softmax": softmax,
    "tanh": act.tanh,
    "add": simd_ops.simd_add,
    "sub": simd_ops.simd_sub,
    "mul": simd_ops.simd_mul,
    "div": simd_ops.simd_div,
    "exp": simd_ops.simd_exp,
    "log": simd_ops.simd_log,
    "sum": simd_ops.simd_reduce_sum,
    "mean": simd_ops.simd_reduce_mean,
    "norm": _norm,
    "square": simd_ops.simd_square,
    "matmul": matmul,
    "mm": matmul,
    "addmm": addmm_mx,
    "bmm": bmm,
}

# Where each name is in torch, and what it is there.
_Place = tuple[Any, str]
_ORIGINALS: dict[_Place, Any] = {
    **{
        (space, name): vars(space)[name]
        for name in FUNCTION_MAPPING
        for space in (torch, torch.nn.functional)
        if name in vars(space)
    },
    **{(torch.nn, name): getattr(torch.nn, name) for name in MODULE_MAPPING},
}


def inject_pyt_ops(mx_specs: Specs, calls: Counter[str] | None = None) -> None:
    """Put the operators, with these options, in the place of torch's; build the model afterwards.

    Calling it again takes other options. :func:`injected` undoes it at the end of a block.

    A function computes as torch does where none of its tensors is floating-point; ``dtype`` converts its result.

    Args:
        mx_specs: the options; None computes as torch does.
        calls: where to count, by name, the calls of functions that compute with these options.
    """
    calls = Counter() if calls is None else calls
    for (space, name), original in _ORIGINALS.items():
        if name in MODULE_MAPPING:
            replacement = _layer(MODULE_MAPPING[name], original, mx_specs)
        else:
            replacement = _function(name, original, mx_specs, calls)
        setattr(space, name, replacement)


@contextmanager
def injected(mx_specs: Specs, calls: Counter[str] | None = None) -> Iterator[None]:
    """Have :func:`inject_pyt_ops` in force for a block of code; what was in force before is put back after it."""
    before = {(space, name): getattr(space, name) for space, name in _ORIGINALS}
    inject_pyt_ops(mx_specs, calls)
    try:
        yield
    finally:
        for (space, name), found in before.items():
            setattr(space, name, found)


def _function(name: str, original: Callable[..., Any], mx_specs: Specs, calls: Counter[str]) -> Callable[..., Any]:
    ours = FUNCTION_MAPPING[name]

    def call(*args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        if not any(isinstance(x, Tensor) and x.is_floating_point() for x in (*args, *kwargs.values())):
            return original(*args, **kwargs) if dtype is None else original(*args, dtype=dtype, **kwargs)
        calls[name] += 1
        out = ours(*args, mx_specs=mx_specs, **kwargs)
        return out if dtype is None else out.to(dtype)

    return functools.wraps(ours)(call)


def _layer(ours: type[torch.nn.Module], original: type[torch.nn.Module], mx_specs: Specs) -> type[torch.nn.Module]:
    """Return ``ours`` as a class whose arguments come in torch's order."""
    parameters = list(inspect.signature(original).parameters.values())
    optional = [p.name for p in parameters if p.default is not p.empty]
    required = len(parameters) - len(optional)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        required, optional = 2**31, []

    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        named = dict(zip(optional, args[required:], strict=False))
        ours.__init__(self, *args[:required], mx_specs=mx_specs, **named, **kwargs)

    return type(f"{ours.__name__}_inj", (ours,), {"__init__": initialize})
