"""Codes of values that are on a grid: whatever scales put them there."""

import pytest
import torch
from numerics.test_codes import FORMATS, hard, same

from mxlab import quantize
from mxlab.errors import FormatError
from mxlab.formats import MXFormat
from mxlab.numerics.codes import scale_values
from mxlab.packed import MXTensor

POWERS = [text for text in FORMATS if MXFormat.parse(text).scale == "e8m0" and "none" not in text]


@pytest.mark.parametrize("text", POWERS)
@pytest.mark.parametrize("axis", [0, 1])
def test_scales_that_are_powers_of_two(text, axis):
    for dtype in (torch.float32, torch.bfloat16):
        values = quantize(hard(dtype), text, axis=axis, seed=3).contiguous()
        assert same(MXTensor.from_values(values, text, axis).dequantize(), values)


@pytest.mark.parametrize("text", ["fp4_e2m1@32", "int8@32", "int4@32,scale_rule=mase_int", "fp6_e2m3@16"])
def test_scales_larger_than_the_rule_would_choose(text):
    fmt = MXFormat.parse(text)
    g = torch.Generator().manual_seed(0)
    elements = torch.tensor(sorted({-m for m in fmt.grid.magnitudes()} | set(fmt.grid.magnitudes())))
    elements = elements[(elements >= fmt.limits[0]) & (elements <= fmt.limits[1])]
    picked = elements[torch.randint(len(elements), (40, 64), generator=g)]
    picked[:8] *= picked[:8].abs() < 0.3  # only small ones: a smaller scale holds them, too
    values = picked * 2.0 ** torch.randint(-9, 9, (40, 1), generator=g)
    assert torch.equal(MXTensor.from_values(values, text).dequantize(), values + 0.0)


@pytest.mark.parametrize("text", ["nvfp4", "fp4_e2m1@16,scale=e4m3,scale_rule=max"])
@pytest.mark.parametrize("choice", ["rule", "searched", "smaller"])
def test_floating_scales_that_were_searched(text, choice):
    """As GPTQ chooses them: numbers of E4M3 times the scale that the tensor had before it was quantized."""
    fmt = MXFormat.parse(text)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(96, 160, generator=g) * 0.03
    given = MXTensor.from_float(x, fmt)
    codes = given.scales.long()
    if choice != "rule":
        change = torch.randint(-6, 1 if choice == "smaller" else 4, codes.shape, generator=g)
        codes = (codes + change).clamp(1, 126)
    up = (given.tensor_scale * scale_values(fmt)[codes]).repeat_interleave(16, dim=1)
    grid = torch.tensor(fmt.grid.magnitudes())
    near = grid[torch.bucketize((x / up).abs(), (grid[1:] + grid[:-1]) / 2)].copysign(x)
    values = near * up + 0.0
    assert torch.equal(MXTensor.from_values(values, fmt).dequantize(), values)


@pytest.mark.parametrize("text", ["fp4_e2m1@32", "nvfp4", "int8@32"])
def test_values_that_are_on_no_grid_are_refused(text):
    with pytest.raises(FormatError, match="does not hold values of"):
        MXTensor.from_values(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), text)


def test_zeros():
    for text in ("fp4_e2m1@32", "nvfp4"):
        assert torch.equal(MXTensor.from_values(torch.zeros(3, 40), text).dequantize(), torch.zeros(3, 40))
