"""MXFP4 as seven published tools compute it: what each returned for one tensor, and mxlab's format for it, bit for bit.

tools/docs/record_published_tools.py ran the tools; docs/published_tools.md shows what differs.
"""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from mxlab.errors import FormatError
from mxlab.formats import MXFormat
from mxlab.formats.scales import FP4_RULES
from mxlab.numerics import quantize, reference, round_elementwise, scale_clamps
from mxlab.numerics.kernels import native

from support.bits import same
from support.paths import TESTS

RECORDED = json.loads((TESTS / "golden" / "published_tools.json").read_text(encoding="utf-8"))
ARRAYS = dict(np.load(TESTS / "golden" / "published_tools.npz"))
TOOLS = [pytest.param(row, id=f"{row['tool']} {row['call']}") for row in RECORDED]


def array(name: str) -> Tensor:
    return torch.from_numpy(ARRAYS[name]).view(torch.bfloat16)


def backends(text: str) -> list[str]:
    has_native = MXFormat.parse(text).has_kernels and native.MISSING is None
    return ["auto", "reference", *(["native"] if has_native else [])]


@pytest.mark.parametrize("row", TOOLS)
def test_a_tool_bit_for_bit(row):
    for backend in backends(row["format"]):
        result = quantize(array("input"), row["format"], numerics=row["numerics"], backend=backend)
        same(result + 0.0, array(row["output"]))


@pytest.mark.parametrize("row", TOOLS)
def test_float32_and_the_other_axis_give_the_same_numbers(row):
    if row["numerics"] == "exact":
        x = array("input").float()
        same(quantize(x, row["format"]).bfloat16(), array(row["output"]))
        same(quantize(x.T, row["format"], axis=0).T.bfloat16(), array(row["output"]))


def test_the_tensor_tells_the_tools_apart():
    outputs = {row["format"] + row["numerics"]: ARRAYS[row["output"]].tobytes() for row in RECORDED}
    assert len(outputs) == len(set(outputs.values())) >= 7


# The rules of FP-Quant


def float32(x) -> np.ndarray:
    return np.asarray(x, np.float32)


def scaled_fp4(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The nearest elements, ties toward zero, by their thresholds; in float32, as FP-Quant computes."""
    y = float32(x / scale)
    bounds = float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    elements = float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])[np.searchsorted(bounds, np.abs(y), side="left")]
    return float32(np.copysign(elements, y) * scale) + np.float32(0)


@pytest.mark.parametrize("rule", FP4_RULES)
def test_the_rules_in_numpy(rule):
    generator = np.random.default_rng(3)
    x = float32(generator.standard_normal((200, 32)) * np.exp2(generator.integers(-20, 20, (200, 1))))
    x[::7, ::3] *= 16  # outliers
    x[5] = 0
    if rule == "quest":
        wanted = x.astype(np.float64).std(-1, keepdims=True) * (2.92247856 / 6) + 1e-8
        scale = np.exp2(np.floor(np.log2(wanted)))
    else:
        amax = np.abs(x).max(-1, keepdims=True).astype(np.float64)
        scale = np.exp2(np.floor(np.log2(np.where(amax == 0, 1, amax))) - 2) / 0.75
    result = quantize(torch.from_numpy(x), f"fp4@32,scale_rule={rule},rounding=nearest_zero")
    same(result, torch.from_numpy(scaled_fp4(x, float32(scale))))


@pytest.mark.parametrize("rule", FP4_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ends_of_the_range(rule, dtype):
    largest = torch.finfo(dtype).max
    rows = [[largest, -largest, largest / 2, 0.0], [0.0] * 4, [1.0, torch.nan, 0.0, 2.0], [1.0, -torch.inf, 0.0, 2.0]]
    x = torch.tensor(rows, dtype=dtype)
    for text in (f"fp4@4,scale_rule={rule}", f"fp4@4,scale_rule={rule},flush_fp32_subnorms=true"):
        result = quantize(x, text)
        assert result[0].isfinite().all()
        assert (result[1] == 0).all()
        assert result[2:].isnan().all()
    assert scale_clamps(x, MXFormat.parse(text)) == {"blocks": 1, "clamped": 0, "overflowed": 0}


def test_four_thirds_saturates_nothing_and_is_what_inspect_calls_the_scale():
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    fmt = MXFormat("fp4", scale_rule="four_thirds")
    scale = reference.scales(x[:, None], fmt, x.dtype)[:, 0]
    same(scale, x.abs().amax(-1, keepdim=True).log2().floor().exp2() / 4 / 0.75)
    assert ((x / scale).abs() <= 6).all()


@pytest.mark.parametrize("rule", FP4_RULES)
def test_what_the_rules_refuse(rule):
    x = torch.ones(2, 32)
    with pytest.raises(FormatError, match="fp4_e2m1"):
        MXFormat("int8", scale_rule=rule)
    with pytest.raises(FormatError, match="does not have the format"):
        quantize(x, f"fp4@32,scale_rule={rule}", backend="native")
    with pytest.raises(FormatError, match="microxcaling"):
        quantize(x, f"fp4@32,scale_rule={rule}", numerics="microxcaling")


def test_microxcaling_refuses_ties_toward_zero():
    x = torch.ones(2, 32)
    for call in (
        lambda: quantize(x, "fp4@32,rounding=nearest_zero", numerics="microxcaling"),
        lambda: quantize(x, "fp4@32,rounding=nearest_zero", numerics="microxcaling", backend="reference"),
        lambda: round_elementwise(x, bfloat=16, rounding="nearest_zero", numerics="microxcaling"),
    ):
        with pytest.raises(FormatError, match="nearest, even, floor, dither"):
            call()
