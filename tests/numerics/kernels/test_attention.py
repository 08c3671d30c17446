"""The products of an attention with packed keys and values, against float64, on every instruction set."""

import pytest
import torch

from mxlab.formats import MXFormat
from mxlab.numerics.kernels import attention, native
from mxlab.numerics.kernels.attention import PackedHeads
from mxlab.packed import MXTensor

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=f"no native kernels: {native.MISSING}")

FORMATS = ["fp4_e2m1@32", "fp6_e2m3@32", "fp6_e3m2@16", "fp8_e4m3@32", "fp8_e5m2@8", "int8@32", "int4@0", "fp4_e2m1@12"]


def packed(text, batch=2, heads=3, tokens=300, length=64, capacity=None):
    x = torch.randn(batch, heads, capacity or tokens, length, generator=torch.Generator().manual_seed(0))
    x[0, 0, 1:2] = 0
    x[0, 1, 2:4] *= 1e6
    made = MXTensor.from_float(x, text)
    parts = (part[:, :, :tokens] for part in (made.elements, made.scales))
    return PackedHeads(*parts, MXFormat.parse(text), length), made.dequantize()[:, :, :tokens].double()


def rows(count, length, batch=2, heads=3):
    return torch.randn(batch, heads, count, length, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize(("tokens", "length"), [(1, 64), (7, 8), (300, 64), (257, 80), (40, 136), (9, 1024)])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_against_float64(text, tokens, length, count):
    heads, values = packed(text, tokens=tokens, length=length, capacity=tokens + 5)
    queries, weights = rows(count, length), rows(count, tokens)
    for found, a, b in (
        (attention.score(queries, heads), queries, values.mT),
        (attention.mix(weights, heads), weights, values),
    ):
        error = (found.double() - a.double() @ b).abs()
        assert (error <= a.shape[-1] * 2**-24 * (a.double().abs() @ b.abs()) + 1e-30).all()


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_those_of_any_instruction_set_and_thread_count(text, dtype, instruction_set):
    heads, _ = packed(text)
    queries, weights = rows(3, 64).to(dtype), rows(3, 300).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = attention.score(queries, heads), attention.mix(weights, heads)
        torch.set_num_threads(2)
        together = attention.score(queries, heads), attention.mix(weights, heads)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)
    digest = tuple(x.double().sum().item() for x in alone), tuple(x.view(torch.int32).sum().item() for x in alone)
    assert _first.setdefault((text, dtype), digest) == digest


_first: dict = {}  # what the first instruction set gave


def test_a_scale_that_is_no_number_reaches_the_result():
    heads, _ = packed("fp4_e2m1@32", tokens=10)
    heads.scales[0, 0, 2, 1] = 255
    found = attention.score(rows(1, 64), heads)
    assert found.isnan().nonzero().tolist() == [[0, 0, 0, 2]]


@pytest.mark.parametrize(
    ("change", "count", "message"),
    [({"length": 60}, 1, "head_dim is 60"), ({"tokens": 0}, 1, "there are 1 rows, and 0 tokens"), ({}, 17, "17 rows"),
     ({"length": 1032}, 1, "head_dim is 1032")],
)  # fmt: skip
def test_obstacles(change, count, message):
    heads = packed("fp4_e2m1@32", **{"tokens": 4, "length": 64, "capacity": 8, **change})[0]
    assert message in attention.obstacle(heads, count)
    assert attention.obstacle(packed("fp4_e2m1@32")[0], 16) is None


def test_without_kernels(monkeypatch):
    monkeypatch.setattr(native, "MISSING", "no compiler")
    assert "no compiler" in attention.obstacle(packed("fp4_e2m1@32")[0], 1)
