"""The front door of the numerics: what it refuses, and what it leaves alone."""

import math
from itertools import product

import pytest
import torch

from mxlab.errors import FormatError
from mxlab.formats import ELEMENTS, NUMERICS, ROUNDINGS, MXFormat, elementwise_format
from mxlab.numerics import quantize, round_elementwise, scale_clamps

from support.strategies import NUMERICS_ROUNDINGS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def message(function, *args, **kwargs) -> str:
    with pytest.raises(FormatError) as error:
        function(*args, **kwargs)
    return str(error.value)


# What is refused


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint8])
@pytest.mark.parametrize("function", [lambda x: quantize(x, "fp4"), lambda x: round_elementwise(x, bfloat=16)])
def test_dtypes(function, dtype):
    text = message(function, torch.ones(4, dtype=dtype))
    assert str(dtype) in text
    assert all(str(d) in text for d in DTYPES)


def test_a_dtype_is_refused_even_where_nothing_would_be_rounded():
    assert "torch.float64" in message(round_elementwise, torch.ones(4, dtype=torch.float64))
    assert "torch.float64" in message(quantize, torch.ones(0, dtype=torch.float64), "fp4")


@pytest.mark.parametrize("axis", [2, -3, (0, 2), (-3,), 100])
def test_an_axis_out_of_range(axis):
    text = message(quantize, torch.ones(3, 4), "fp4", axis=axis)
    assert repr(axis) in text
    assert "(3, 4)" in text
    assert "-2 to 1" in text


@pytest.mark.parametrize("axis", [(), []])
def test_no_axis(axis):
    assert f"axis is {axis!r}" in message(quantize, torch.ones(3, 4), "fp4", axis=axis)


@pytest.mark.parametrize("axis", [(0, 0), (1, -1), [-2, 1, 0]])
def test_an_axis_twice(axis):
    text = message(quantize, torch.ones(3, 4), "fp4", axis=axis)
    assert repr(axis) in text
    assert "twice" in text


def test_a_scalar_has_no_axis():
    assert "0-dimensional" in message(quantize, torch.tensor(1.0), "fp4")


@pytest.mark.parametrize("function", [lambda **kw: quantize(torch.ones(4), "fp4", **kw),
                                      lambda **kw: round_elementwise(torch.ones(4), bfloat=16, **kw)])  # fmt: skip
def test_unknown_numerics(function):
    text = message(function, numerics="exakt")
    assert "numerics is 'exakt'" in text
    assert "exact, microxcaling" in text
    assert "did you mean 'exact'" in text


def test_unknown_backend():
    text = message(quantize, torch.ones(4), "fp4", backend="tpu")
    assert "backend is 'tpu'" in text
    assert "auto" in text
    assert "reference" in text


def test_unknown_format_and_rounding():
    assert "unknown element format 'fp5'" in message(quantize, torch.ones(4), "fp5@32")
    assert "rounding is 'up'" in message(round_elementwise, torch.ones(4), bfloat=16, rounding="up")


@pytest.mark.parametrize(
    ("widths", "parts"),
    [
        ({"bfloat": 9}, ["bfloat", "9", "10 to 32"]),
        ({"bfloat": 1}, ["bfloat", "1", "10 to 32"]),
        ({"bfloat": 33}, ["bfloat", "33", "10 to 32"]),
        ({"bfloat": -1}, ["bfloat", "-1", "10 to 32"]),
        ({"bfloat": True}, ["bfloat", "True", "10 to 32"]),
        ({"bfloat": 16.0}, ["bfloat", "16.0", "10 to 32"]),
        ({"fp": 6}, ["fp", "6", "7 to 29"]),
        ({"fp": 30}, ["fp", "30", "7 to 29"]),
        ({"fp": -5}, ["fp", "-5", "7 to 29"]),
        ({"fp": "16"}, ["fp", "'16'", "7 to 29"]),
        ({"bfloat": 16, "fp": 16}, ["bfloat is 16", "fp is 16", "one of them"]),
        ({"bfloat": 32, "fp": 8}, ["bfloat is 32", "fp is 8", "one of them"]),
    ],
)
def test_element_wise_widths(widths, parts):
    for text in (message(round_elementwise, torch.ones(4), **widths), message(elementwise_format, **widths)):
        assert all(part in text for part in parts), text


def test_microxcaling_has_no_bf16_elements_in_float16():
    text = message(quantize, torch.ones(4, dtype=torch.float16), "bf16@4", numerics="microxcaling")
    assert "bf16" in text
    assert "torch.float16" in text
    assert "use bfloat16 or float32" in text
    assert torch.equal(quantize(torch.ones(4, dtype=torch.float16), "bf16@4"), torch.ones(4, dtype=torch.float16))


# What is kept


EVERY_WAY = [
    *(
        (lambda x, f=fmt, n=numerics: quantize(x, f, numerics=n, seed=0))
        for fmt, numerics in product(
            ["fp4@32", "int8@0", "fp8_e4m3@8,rounding=floor", "fp6_e2m3@5,rounding=even", "int4@7,rounding=dither",
             "fp4@32,scale_rule=none", "fp4@4,flush_fp32_subnorms=true"],
            NUMERICS,
        )
    ),
    *(
        (lambda x, w=widths, r=rounding, n=numerics, s=subnormals: round_elementwise(
            x, **w, rounding=r, numerics=n, subnormals=s, seed=0))
        for widths, (numerics, rounding), subnormals in product(
            [{}, {"bfloat": 16}, {"bfloat": 32}, {"fp": 8}], NUMERICS_ROUNDINGS, [True, False]
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("shape", [(1,), (33,), (3, 40), (2, 3, 20), (2, 1, 3, 5), (0,), (0, 32), (4, 0), (2, 0, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shape_dtype_and_device_are_kept_and_the_input_is_not_touched(dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if x.numel() > 30:
        x.view(-1)[::7] = 0
        x.view(-1)[3] = math.nan
    before = x.clone()
    for function in EVERY_WAY:
        result = function(x)
        assert result.shape == x.shape
        assert result.dtype == x.dtype
        assert result.device == x.device
        assert result.layout == torch.strided
        assert torch.equal(x, before) or torch.equal(x.nan_to_num(7), before.nan_to_num(7))
        assert result.numel() == 0 or result.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("numerics", NUMERICS)
def test_the_result_is_laid_out_as_the_operator_promises(numerics, backend):
    x = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0)).permute(2, 0, 1)
    for y in (x, x[:, ::2], x.expand(2, 4, 6, 5), x.contiguous()):
        for axis in (0, 1, 2, (0, 1), (2, 0)):
            for rounding in ("nearest", "dither"):
                result = quantize(y, f"fp4@4,rounding={rounding}", axis=axis, numerics=numerics, backend=backend)
                assert result.stride() == torch.empty_like(y).stride()


@pytest.mark.parametrize("axis", [0, -1, (0, 1), 1])
def test_an_empty_tensor_keeps_its_gradient(axis):
    x = torch.zeros(0, 4, requires_grad=True)
    quantize(x, "fp4@0", axis=axis).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 4)


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize(("value", "expected"), [(1.0, 1.0), (0.0, 0.0), (-2.5, -2.0), (3.3, 3.0), (7.9, 6.0)])
def test_one_element(value, expected, numerics):
    assert quantize(torch.tensor([value]), "fp4@32,rounding=even", numerics=numerics).tolist() == [expected]


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("block_size", [64, 65, 10**6, 2**40, 10**30])
def test_a_block_longer_than_the_axis_is_the_whole_axis(block_size, numerics):
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    whole = quantize(x, MXFormat("fp4", 0), numerics=numerics)
    assert torch.equal(quantize(x, MXFormat("fp4", block_size), numerics=numerics), whole)
    tile = quantize(x, MXFormat("fp4", 0), axis=(0, 1), numerics=numerics)
    assert torch.equal(quantize(x, MXFormat("fp4", block_size), axis=(0, 1), numerics=numerics), tile)
    assert scale_clamps(x, MXFormat("fp4", block_size))["blocks"] == 3


def test_a_format_may_be_given_as_text():
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantize(x, "fp6_e2m3@16,rounding=even"), quantize(x, MXFormat("fp6_e2m3", 16, rounding="even")))
    assert torch.equal(quantize(x, "fp4"), quantize(x, "fp4_e2m1@32", axis=1, backend="reference"))


# Element-wise rounding


@pytest.mark.parametrize(("numerics", "rounding"), NUMERICS_ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bfloat_32_and_no_width_change_nothing(dtype, numerics, rounding):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:3] = torch.tensor([-0.0, math.inf, 2.0**-140])
    for widths in ({"bfloat": 32}, {}):
        result = round_elementwise(x, **widths, rounding=rounding, subnormals=False, numerics=numerics)
        assert torch.equal(result, x)
        assert torch.equal(result.signbit(), x.signbit())


def every_bfloat16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_bfloat_16_is_the_identity_on_bfloat16_in_exact(rounding):
    x = every_bfloat16()
    result = round_elementwise(x, bfloat=16, rounding=rounding)
    assert torch.equal(result.nan_to_num(7.5), x.nan_to_num(7.5))
    assert torch.equal(result.isnan(), x.isnan())


def test_bfloat_16_moves_half_of_all_bfloat16_in_microxcaling():
    x = every_bfloat16().float()
    x = x[x.isfinite() & (x.abs() > 2.0**-100) & (x.abs() < 2.0**100)].bfloat16()
    for rounding, change in (("nearest", 0.0027), ("even", -0.0022)):
        result = round_elementwise(x, bfloat=16, rounding=rounding, numerics="microxcaling")
        assert 0.45 < (result != x).double().mean() < 0.55
        assert abs((result.double() / x.double() - 1).mean().item() - change) < 0.0001


@pytest.mark.parametrize("numerics", NUMERICS)
def test_overflow_is_infinite_and_special_values_stay(numerics):
    x = torch.tensor([65504.0, 70000.0, -1e9, math.inf, -math.inf, math.nan])
    result = round_elementwise(x, fp=16, numerics=numerics)
    assert result[:5].tolist() == [65504.0, math.inf, -math.inf, math.inf, -math.inf]
    assert result[5].isnan()


@pytest.mark.parametrize("numerics", NUMERICS)
def test_subnormals_are_kept_or_become_zero(numerics):
    x = torch.tensor([2.0**-14, 2.0**-15, -(2.0**-20)])
    assert round_elementwise(x, fp=16, numerics=numerics).tolist() == x.tolist()
    assert round_elementwise(x, fp=16, subnormals=False, numerics=numerics).tolist() == [2.0**-14, 0, 0]


def test_element_wise_formats():
    assert elementwise_format() is None
    assert elementwise_format(bfloat=32) is None
    bfloat16, fp16 = elementwise_format(bfloat=16), elementwise_format(fp=16)
    for ours, table in ((bfloat16, ELEMENTS["bf16"]), (fp16, ELEMENTS["fp16"])):
        assert ours is not None
        assert (ours.bits, ours.emin, ours.max) == (table.bits, table.emin, table.max)


# Scales out of range


def test_scale_clamps_counts():
    # fp4_e2m1 has emax 2; with 4 bits the shared exponent may be -7 to 7, so block maxima 2^-5 to 2^9 are in range.
    amax = [2.0**-6, 2.0**-5, 1.0, 2.0**9, 2.0**10 - 2.0**-10, 2.0**10, 0.0, math.nan, math.inf, -(2.0**-20)]
    x = torch.zeros(len(amax), 8)
    x[:, 3] = torch.tensor(amax)
    fmt = MXFormat("fp4", 8, scale_bits=4)
    assert scale_clamps(x, fmt) == {"blocks": 7, "clamped": 2, "overflowed": 1}
    assert scale_clamps(x.T, fmt, axis=0) == {"blocks": 7, "clamped": 2, "overflowed": 1}
    assert scale_clamps(x, MXFormat("fp4", 8)) == {"blocks": 7, "clamped": 0, "overflowed": 0}
    assert int(quantize(x, fmt).isnan().any(-1).sum()) == 3  # the overflowed one, and NaN and Inf


def test_scale_clamps_counts_blocks_as_quantize_cuts_them():
    x = torch.ones(5, 33, requires_grad=True)
    assert scale_clamps(x, MXFormat("int8", 16)) == {"blocks": 15, "clamped": 0, "overflowed": 0}
    assert scale_clamps(x, MXFormat("int8", 16), axis=0)["blocks"] == 33
    assert scale_clamps(x, MXFormat("int8", 4), axis=(0, 1))["blocks"] == 18
    assert scale_clamps(x, MXFormat("int8", 0))["blocks"] == 5
    assert scale_clamps(x, MXFormat("int8", 16, scale_rule="none"))["blocks"] == 165
    assert scale_clamps(x.to(torch.bfloat16) * 2.0**-127, MXFormat("fp8_e5m2"))["clamped"] == 10


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
@pytest.mark.parametrize("block_size", [0, 32])
def test_scale_clamps_of_nothing(shape, block_size):
    nothing = {"blocks": 0, "clamped": 0, "overflowed": 0}
    assert scale_clamps(torch.zeros(shape), MXFormat("int8", block_size)) == nothing


def test_scale_clamps_refuses_a_bad_axis():
    assert "axis is 3" in message(scale_clamps, torch.ones(2, 2), MXFormat("int8"), 3)
