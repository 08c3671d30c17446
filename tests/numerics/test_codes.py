"""Codes: those of the specification, decoded to what quantizing gives, in every format and through every scale."""

import ml_dtypes
import numpy as np
import pytest
import torch

from mxlab import quantize
from mxlab.errors import FormatError
from mxlab.formats import MXFormat
from mxlab.formats.elements import element
from mxlab.numerics.codes import decode, element_codes, element_values, encode, nan_scale, scale_values
from mxlab.numerics.reference import block_layout

FORMATS = (
    "fp4_e2m1@32", "fp6_e2m3@32", "fp6_e3m2@16", "fp8_e4m3@32", "fp8_e5m2@8", "int8@32", "int4@16", "int2@32",
    "fp4_e2m1@16,scale=e4m3", "fp4_e2m1@16,scale=e5m3", "int4@32,scale_rule=mase_int", "fp5_e2m2@32",
    "fp4_e2m1@32,scale_rule=four_thirds", "fp4_e2m1@32,scale_bits=4", "int8@32,scale_rule=none", "fp4_e2m1@0",
    "fp4_e2m1@32,flush_fp32_subnorms=true", "fp6_e2m3@32,rounding=dither",
)  # fmt: skip
# OCP MX v1.0, section 5.3, as another library has them.
PUBLISHED = {
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
}


def hard(dtype=torch.float32):
    """Ordinary values, subnormal and huge ones, zeros of both signs, ends of blocks, and what is no number."""
    x = torch.randn(9, 77, generator=torch.Generator().manual_seed(0))
    x *= 2.0 ** torch.randint(-20, 20, (9, 1), generator=torch.Generator().manual_seed(1))
    x[1], x[2, ::3], x[2, 1::3] = 0, 0.0, -0.0
    x[3] *= 2.0**-140
    x[4] = x[4].clamp(-1, 1) * 2.0**127
    x[5, 40], x[6, 3] = torch.nan, torch.inf
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", FORMATS)
def test_decoding_gives_what_quantizing_gives(text, dtype):
    fmt = MXFormat.parse(text)
    for axis in (0, 1):
        x = hard(dtype)
        found = decode(encode(x, fmt, (axis,), seed=7), fmt, block_layout(x, fmt, (axis,)), dtype)
        wanted = quantize(x, fmt, axis=axis, seed=7, backend="reference")
        assert torch.equal(found.view(torch.uint8), wanted.contiguous().view(torch.uint8)) or same(found, wanted)


def same(a, b):
    """Whether all bits agree, but those of NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a[~a.isnan()].view(torch.uint8), b[~b.isnan()].view(torch.uint8)
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_codes_of_floating_point_elements_are_those_of_the_specification(name):
    row = element(name)
    codes = np.arange(2**row.bits, dtype=np.uint8)
    wanted = torch.from_numpy(codes.view(PUBLISHED[name]).astype(np.float32))
    assert same(element_values(row, row.bits), wanted)


@pytest.mark.parametrize("name", [*PUBLISHED, "int8", "int4", "int2", "fp5_e2m2", "fp3_e1m1"])
def test_every_code_of_a_number_comes_back(name):
    row = element(name)
    values = element_values(row, row.bits)
    codes = torch.arange(2**row.bits, dtype=torch.uint8)
    counts = values.isfinite() & ~((values == 0) & (codes > 0))
    assert torch.equal(element_codes(values[counts], row, row.bits), codes[counts])
    assert element_codes(torch.tensor([-0.0]), row, row.bits).item() == 0


def test_codes_of_fixed_point_elements_are_twos_complement():
    assert element_values(element("int4"), 4).tolist() == [k / 4 for k in [*range(8), *range(-8, 0)]]


def test_scales_are_e8m0_and_e4m3():
    exponents = scale_values(MXFormat.parse("fp4_e2m1@32"))
    wanted = torch.from_numpy(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    assert same(exponents, wanted)
    floats = scale_values(MXFormat.parse("nvfp4"))[:128]
    wanted = torch.from_numpy(np.arange(128, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert same(floats, wanted)
    assert nan_scale(MXFormat.parse("nvfp4")) == 0x7F
    assert nan_scale(MXFormat.parse("fp4_e2m1@32")) == 0xFF
    assert nan_scale(MXFormat.parse("fp4_e2m1@32,scale_bits=4")) == 0xF


def test_elements_that_are_longer_than_a_code_are_refused():
    with pytest.raises(FormatError, match="elements of 16 bits: codes have at most 8"):
        encode(torch.ones(32), MXFormat.parse("bf16@32"))
