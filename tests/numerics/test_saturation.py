"""The end of a dtype's range: finite numbers stay finite in the exact numerics, whatever they round up to."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from mxlab.formats import ELEMENTS, NUMERICS, MXFormat
from mxlab.formats.scales import SCALE_RULES
from mxlab.numerics import quantize, round_elementwise
from mxlab.numerics.kernels import native

from support.bits import same
from support.strategies import DTYPES, EVERY_NAME, allowed

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(bool(native.missing()), reason=str(native.missing()))),
]


def near_the_end(dtype: torch.dtype) -> Tensor:
    """Rows of 64 numbers, the largest of each from a quarter of the dtype's largest up to it; all are finite."""
    generator = torch.Generator().manual_seed(0)
    largest = torch.finfo(dtype).max
    rows = torch.rand(40, 64, generator=generator, dtype=torch.float64) * 2 - 1
    rows[:, 17] = torch.linspace(0.25, 1, 40, dtype=torch.float64)
    rows[::2] *= -1
    return (rows * largest).to(dtype).nan_to_num(0, largest, -largest)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finite_blocks_have_no_infinities(dtype, backend):
    x = near_the_end(dtype)
    for (i, name), rule in product(enumerate(EVERY_NAME), SCALE_RULES):
        rounding = ("nearest", "even", "floor", "dither")[i % 4]
        if not allowed(name, rule, rounding):
            continue
        for axis, block in ((-1, 32), (-1, 5), (0, 8)):
            fmt = MXFormat(name, block, scale_rule=rule, rounding=rounding)
            assert not quantize(x, fmt, axis=axis, seed=3, backend=backend).isinf().any(), fmt


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", ["nvfp4", "nvfp4,rounding=even", "fp4@16,scale=e5m3", "fp8_e4m3@32,scale=e4m3"])
def test_floating_point_scales_saturate(text, dtype, backend):
    assert quantize(near_the_end(dtype), text, backend=backend).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["ceil", "rceil", "even"])
def test_the_largest_number_becomes_itself(rule, dtype, backend):
    """In these elements it rounds up to the power of two above."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([[largest, -largest, 0.0]], dtype=dtype)
    same(quantize(x, f"fp8_e4m3@3,scale_rule={rule}", backend=backend), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_most_negative_code_saturates(backend):
    x = torch.tensor([[-65504.0, 65504.0]], dtype=torch.float16)
    assert quantize(x, "int8@2,scale_rule=mase_int", backend=backend).tolist() == [[-65504.0, 65024.0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mse_takes_what_the_dtype_can_hold_for_the_error(dtype, backend):
    """The upper scale makes the largest number exact, once it saturates; the lower one is off by an eighth."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([[largest, 0.0, 0.0, 0.0]], dtype=dtype)
    for axis in (0, -1):
        same(quantize(x.movedim(-1, axis), "fp8_e4m3@4,scale_rule=mse", axis=axis, backend=backend).flatten(), x[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nan_still_make_a_block_nan(dtype, backend):
    largest = torch.finfo(dtype).max
    for bad, name in product((math.inf, -math.inf, math.nan), ELEMENTS):
        x = torch.tensor([[largest, bad, 1.0, 0.0]], dtype=dtype)
        assert quantize(x, f"{name}@4", backend=backend).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_element_wise_rounding_overflows_the_format_but_not_the_dtype(backend):
    """A bfloat reaches farther than float16, and saturates there; fp8 has infinities of its own."""
    x = torch.tensor([65504.0, -65504.0, math.inf], dtype=torch.float16)
    assert round_elementwise(x, bfloat=12, backend=backend).tolist() == [65504.0, -65504.0, math.inf]
    assert round_elementwise(x, fp=8, backend=backend).tolist() == [math.inf, -math.inf, math.inf]


@pytest.mark.parametrize("numerics", NUMERICS)
def test_microxcaling_overflows_as_the_original_does(numerics):
    result = quantize(torch.tensor([[65504.0, 1.0]], dtype=torch.float16), "fp8_e4m3@2", numerics=numerics)
    assert result[0, 0] == (57344.0 if numerics == "exact" else math.inf)
