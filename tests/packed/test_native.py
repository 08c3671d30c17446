"""Packing and unpacking in C++: the bytes of the reference, and the values of quantizing."""

import pytest
import torch
from numerics.test_codes import FORMATS, hard, same

from mxlab import quantize
from mxlab.formats import MXFormat
from mxlab.numerics.codes import encode
from mxlab.numerics.kernels import native, packing
from mxlab.packed import MXTensor
from mxlab.packed.bits import pack

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason="the native kernels are missing")
MORE = (
    *FORMATS,
    "int8@32,scale_rule=mse",
    "fp6_e2m3@24,rounding=even",
    "int7@20",
    "fp3_e1m1@32",
    "int8@0,scale_rule=mase_int",
)
LENGTHS = (1, 7, 32, 33, 77, 200)


@pytest.mark.parametrize("text", [f for f in MORE if packing.can_pack(torch.ones(1), MXFormat.parse(f))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_are_those_of_the_reference(text, dtype, instruction_set):
    fmt = MXFormat.parse(text)
    for length in LENGTHS:
        x = hard(dtype)[:, :length] if length <= 77 else torch.cat([hard(dtype)] * 3, 1)[:, :length]
        x = x.contiguous()
        elements, scales, unit = packing.pack(x, fmt)
        codes = encode(x, fmt)
        assert torch.equal(elements, pack(codes.elements.flatten(-2)[..., :length], fmt.element_bits))
        assert torch.equal(scales, codes.scales)
        assert torch.equal(unit, codes.tensor_scale)


@pytest.mark.parametrize("text", MORE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_those_of_quantizing(text, dtype, instruction_set):
    for x in (hard(dtype), torch.cat([hard(dtype)] * 3, 1)):
        found = MXTensor.from_float(x, text, seed=3)
        assert packing.can_unpack(found.elements, found.fmt)
        assert same(found.dequantize(), quantize(x, text, seed=3, backend="reference"))
        assert same(found.narrow(0, 2, 3).dequantize(), quantize(x, text, seed=3, backend="reference")[2:5])


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_has_the_value_of_its_bits(bits, instruction_set):
    fmt = MXFormat.parse(f"int{bits}@32")
    elements = pack(torch.arange(2**bits, dtype=torch.uint8).repeat(2, 1), bits)
    scales = torch.tensor([[127] * (-(-(2**bits) // 32)), [129] * (-(-(2**bits) // 32))], dtype=torch.uint8)
    values = packing.unpack(elements, scales, torch.ones(()), fmt, 2**bits, torch.float32)
    whole = torch.arange(2**bits)
    expected = torch.where(whole < 2 ** (bits - 1), whole, whole - 2**bits) * 2.0 ** (2 - bits)
    assert torch.equal(values, torch.stack([expected, expected * 4]))
