"""bfloat16 products where the processor has no units for them: in float32, rounded once."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from mxlab import MXFormat, quantize
from mxlab.model.nn import linear
from mxlab.model.nn.operands import LinearOperands

FP4, FP6 = MXFormat("fp4_e2m1", 32), MXFormat("fp6_e2m3", 32)


def converted(layer: nn.Module) -> nn.Module:
    operands = LinearOperands(weight=FP4, activation=FP6)
    return linear.convert(layer.eval(), {"prefill": operands, "decode": operands})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_product_is_that_of_float32_rounded_once(kind, bias, monkeypatch):
    monkeypatch.setattr(linear, "COMPUTED_IN_FLOAT32", (torch.bfloat16,))
    torch.manual_seed(0)
    layer = nn.Linear(96, 64, bias=bias) if kind == "linear" else Conv1D(64, 96)
    layer = layer.bfloat16()
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    x = torch.randn(5, 96).bfloat16()
    axis = -1 if kind == "linear" else 0
    weight, added = quantize(layer.weight.detach(), FP4, axis=axis).float(), layer.bias
    inputs = quantize(x, FP6).float()
    expected = F.linear(inputs, weight if kind == "linear" else weight.T, None if added is None else added.float())
    with torch.no_grad():
        found = converted(layer)(x)
    assert found.dtype == torch.bfloat16
    # Sums in another order may differ in the last bit of bfloat16, and where they do not, not at all.
    assert torch.equal(found, expected.bfloat16()) or (found - expected).abs().max() <= expected.abs().max() * 2**-8


def test_the_gradient_has_the_dtype_of_the_layer(monkeypatch):
    monkeypatch.setattr(linear, "COMPUTED_IN_FLOAT32", (torch.bfloat16,))
    layer = converted(nn.Linear(32, 16).bfloat16())
    x = torch.randn(3, 32).bfloat16().requires_grad_()
    layer.train()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == layer.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.bfloat16), (2, torch.float32)])
def test_a_single_row_is_left_to_torch(rows, dtype, monkeypatch):
    monkeypatch.setattr(linear, "COMPUTED_IN_FLOAT32", (torch.bfloat16,))
    seen = []
    real = F.linear
    monkeypatch.setattr(linear.F, "linear", lambda x, *rest: seen.append(x.dtype) or real(x, *rest))
    found = converted(nn.Linear(32, 16).bfloat16())(torch.ones(rows, 32).bfloat16())
    assert (seen, found.dtype) == ([dtype], torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_multiply_as_they_are(dtype, monkeypatch):
    monkeypatch.setattr(linear, "COMPUTED_IN_FLOAT32", (torch.bfloat16,))
    seen = []
    real = F.linear
    monkeypatch.setattr(linear.F, "linear", lambda x, *rest: seen.append(x.dtype) or real(x, *rest))
    converted(nn.Linear(32, 16).to(dtype))(torch.ones(2, 32, dtype=dtype))
    assert seen == [dtype]
