"""What is run for ``operators.npz``, by microxcaling and by :mod:`mxlab.compat.mx` alike.

A case takes the package (either one), options and inputs; everything else is the same for both. Inputs are drawn from
numpy's RandomState, which gives the same numbers everywhere.
"""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

SPECS = {
    "bfloat": {"bfloat": 16},
    "fp8_even": {
        "w_elem_format": "fp8_e4m3",
        "a_elem_format": "fp8_e4m3",
        "block_size": 32,
        "bfloat": 16,
        "round": "even",
    },
    "fp4_fp6": {"w_elem_format": "fp4_e2m1", "a_elem_format": "fp6_e3m2", "block_size": 32},
    "int8_floor": {
        "w_elem_format": "int8",
        "a_elem_format": "int8",
        "block_size": 16,
        "bfloat": 16,
        "round": "floor",
        "quantize_backprop": False,
    },
    "fp16_exp2": {
        "w_elem_format": "fp6_e2m3",
        "a_elem_format": "fp4_e2m1",
        "block_size": 8,
        "fp": 16,
        "vec_use_exp2": True,
        "softmax_exp2": True,
    },
    "bfloat12_flushed": {
        "w_elem_format": "int4",
        "a_elem_format": "fp8_e5m2",
        "scale_bits": 8,
        "block_size": 0,
        "bfloat": 12,
        "bfloat_subnorms": False,
        "round": "even",
        "round_grad_input": "floor",
        "round_grad_weight": "nearest",
    },
    "recip": {
        "bfloat": 0,
        "vec_use_recip": True,
        "w_elem_format": "fp8_e4m3",
        "block_size": 32,
        "quantize_backprop": False,
    },
    "bf16_tensors": {"w_elem_format": "fp8_e4m3", "a_elem_format": "fp6_e2m3", "block_size": 32, "bfloat": 16},
}


class Case(NamedTuple):
    """``make(mx, specs)`` gives a function, or a module whose parameters are then drawn, of inputs of these shapes."""

    make: Callable[[Any, Any], Callable]
    shapes: tuple[tuple[int, ...], ...]


def _function(name: str, *shapes: tuple[int, ...], **options: Any) -> Case:
    return Case(lambda mx, specs: partial(getattr(mx, name), mx_specs=specs, **options), shapes)


def _module(name: str, shape: tuple[int, ...], *args: Any, training: bool = True, **options: Any) -> Case:
    return Case(lambda mx, specs: getattr(mx, name)(*args, mx_specs=specs, **options).train(training), (shape,))


def _number(name: str) -> Case:
    return Case(lambda mx, specs: lambda x: getattr(mx, name)(x, 0.7, mx_specs=specs), ((3, 5),))


def _positive(name: str) -> Case:
    return Case(lambda mx, specs: lambda x: getattr(mx, name)(x * x + 0.1, mx_specs=specs), ((3, 5),))


def _placed(name: str) -> Case:
    return Case(lambda mx, specs: lambda x: getattr(mx, name)(x * 2, inplace=True, mx_specs=specs), ((3, 7),))


def _split(mx: Any, specs: Any) -> Callable:
    def split(x: Tensor) -> Tensor:
        a, b = mx.simd_split(x, mx_specs=specs)
        return a * 0.3 + b * b

    return split


def _packed(mx: Any, specs: Any) -> Callable:
    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = mx.LSTM(6, 5, 2, bidirectional=True, mx_specs=specs)

        def forward(self, x: Tensor) -> Any:
            packed = pack_padded_sequence(x, torch.tensor([2, 4, 3]), enforce_sorted=False)
            output, (h, c) = self.lstm(packed)
            return output.data, h, c

    return Packed()


def _lstm_of_states(mx: Any, specs: Any) -> Callable:
    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = mx.LSTM(6, 5, 2, mx_specs=specs)

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
            output, (h, c) = self.lstm(x, (h, c))
            return output, h, c

    return States()


def _vectors(mx: Any, specs: Any) -> Callable:
    v = mx.vector_ops

    def vectors(a: Tensor, b: Tensor) -> Tensor:
        a, b, q = a.detach(), b.detach(), {"mx_specs": specs}
        binary = [f(a, b, **q) for f in (v.vec_add, v.vec_sub, v.vec_mul, v.vec_div)]
        unary = [
            f(a.abs() + 0.1, **q) for f in (v.vec_quantize, v.vec_exp, v.vec_exp2, v.vec_recip, v.vec_sqrt, v.vec_tanh)
        ]
        return torch.stack([*binary, *unary, v.vec_add(a, v.vec_reduce_sum(b, -1, keepdim=True, **q), **q)])

    return vectors


def _injected(mx: Any, specs: Any) -> Callable:
    """The library's own example, ``ffn_mx_auto.py``, with attention, in torch's namespace."""
    spaces = torch, F, torch.nn

    @contextmanager
    def injected() -> Any:
        before = [dict(vars(space)) for space in spaces]
        mx.mx_mapping.inject_pyt_ops(specs)
        try:
            yield
        finally:
            for space, names in zip(spaces, before, strict=True):
                vars(space).update(names)

    with injected():
        parts = torch.nn.ModuleDict(
            {
                "norm": torch.nn.LayerNorm(24),
                "up": torch.nn.Linear(24, 40),
                "act": torch.nn.SiLU(),
                "down": torch.nn.Linear(40, 24),
            }
        )

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = parts

        def forward(self, x: Tensor) -> Tensor:
            with injected():
                scores = F.softmax(torch.matmul(x, x.transpose(-1, -2)), dim=-1, dtype=torch.float32).to(x.dtype)
                x = torch.bmm(scores, x)
                y = F.gelu(parts["up"](parts["norm"](x)), approximate="tanh")
                y = torch.add(parts["down"](parts["act"](y)), x)
                return torch.sub(y, torch.mean(torch.exp(torch.mul(y, 0.1)), dim=-1, keepdim=True))

    return Network()


CASES = {
    **{name: _function(name, (3, 7)) for name in ("sigmoid", "tanh", "relu", "relu6", "leaky_relu", "silu", "gelu")},
    **{f"{name}_in_place": _placed(name) for name in ("relu", "relu6", "leaky_relu", "silu")},
    "gelu_first_order": _function("gelu", (3, 7), first_order_gelu=True),
    "GELU": _module("GELU", (3, 7)),
    "quantize_bfloat": _function("quantize_bfloat", (3, 7), round="floor"),
    **{f"{name}_number": _number(name) for name in ("simd_add", "simd_sub", "simd_mul", "simd_div")},
    **{name: _function(name, (2, 3, 4), (3, 1)) for name in ("simd_add", "simd_sub", "simd_mul", "simd_div")},
    "simd_split": Case(_split, ((3, 5),)),
    **{name: _function(name, (3, 5)) for name in ("simd_square", "simd_exp", "simd_norm")},
    **{name: _function(name, (3, 5)) for name in ("simd_reduce_sum", "simd_reduce_mean")},
    **{name: _positive(name) for name in ("simd_sqrt", "simd_log")},
    "simd_reduce_sum_dims": _function("simd_reduce_sum", (2, 3, 4), dim=[0, -1]),
    "simd_reduce_mean_dim": _function("simd_reduce_mean", (2, 3, 4), dim=1, keepdim=True),
    "vectors": Case(_vectors, ((3, 7), (3, 7))),
    "softmax": _function("softmax", (2, 3, 9)),
    "Softmax": _module("Softmax", (2, 9, 3), 1),
    "LayerNorm": _module("LayerNorm", (2, 3, 17), 17),
    "RMSNorm": _module("RMSNorm", (2, 3, 17), 17),
    "GroupNorm": _module("GroupNorm", (2, 6, 3, 2), 3, 6),
    "BatchNorm1d": _module("BatchNorm1d", (5, 3), 3),
    "BatchNorm2d": _module("BatchNorm2d", (2, 3, 2, 3), 3),
    "BatchNorm3d_evaluation": _module("BatchNorm3d", (2, 3, 2, 1, 2), 3, training=False),
    "AdaptiveAvgPool2d": _module("AdaptiveAvgPool2d", (2, 2, 7, 5), (3, 2)),
    "Linear": _module("Linear", (3, 2, 40), 40, 6),
    "matmul": _function("matmul", (2, 3, 40), (2, 40, 5)),
    "bmm": _function("bmm", (2, 3, 40), (2, 40, 5)),
    "Conv1d": _module("Conv1d", (3, 40, 6), 40, 3, 3, padding=1),
    "Conv2d": _module("Conv2d", (2, 8, 5, 4), 8, 4, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), groups=2),
    "Conv3d": _module("Conv3d", (2, 3, 3, 3, 3), 3, 2, 2, bias=False),
    "ConvTranspose2d": _module("ConvTranspose2d", (2, 8, 3, 4), 8, 3, 3, stride=2, padding=1, output_padding=1),
    "LSTM": Case(_lstm_of_states, ((3, 2, 6), (2, 2, 5), (2, 2, 5))),
    "LSTM_packed": Case(_packed, ((4, 3, 6),)),
    "injected": Case(_injected, ((2, 3, 24),)),
}  # fmt: skip


def arithmetic() -> np.ndarray:
    """What torch makes of some inputs on this machine: where it differs, so may the last bits of the results."""
    draw = np.random.RandomState(0).standard_normal
    x, y = (torch.from_numpy(draw((40, 40))).float() for _ in range(2))
    functions = [
        x.exp(),
        x.exp2(),
        x.tanh(),
        x.abs().log(),
        x.abs().sqrt(),
        x.sum(0),
        x @ y,
        x.bfloat16() @ y.bfloat16(),
    ]
    convolutions = [F.conv1d(x[None], y[:, :, None]), F.conv2d(x.view(1, 8, 10, 20), y.view(8, 8, 5, 5))]
    return np.concatenate([found.float().flatten().numpy() for found in (*functions, *convolutions)])


def run(case: str, specs: str, mx: Any, finalize: Callable) -> np.ndarray:
    """Return the outputs, the gradients of all inputs and parameters, and the buffers, flat, as float32."""
    dtype = torch.bfloat16 if specs == "bf16_tensors" else torch.float32
    draw = np.random.RandomState(crc32(case.encode())).standard_normal

    def tensor(shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(draw(shape)).to(dtype)

    made = CASES[case].make(mx, finalize(dict(SPECS[specs])))
    inputs = [tensor(shape).requires_grad_() for shape in CASES[case].shapes]
    parameters, buffers = [], []
    if isinstance(made, torch.nn.Module):
        parameters, buffers = list(made.to(dtype).parameters()), list(made.buffers())
        for parameter in parameters:
            parameter.data = tensor(tuple(parameter.shape)) * 0.5
    outputs = made(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grown = [y for y in outputs if y.requires_grad]
    if grown:
        torch.autograd.backward(grown, [tensor(tuple(y.shape)).to(y.dtype) for y in grown])
    grads = [leaf.grad for leaf in (*inputs, *parameters) if leaf.grad is not None]
    found = [*outputs, *grads, *(b for b in buffers if b.is_floating_point())]
    return np.concatenate([x.detach().float().flatten().numpy() for x in found])
