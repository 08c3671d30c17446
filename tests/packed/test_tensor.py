"""Packed tensors: the bits of every format, and what comes back of them."""

import json

import pytest
import torch
from numerics.test_codes import FORMATS, hard, same
from safetensors.torch import load, save

from mxlab import quantize
from mxlab.errors import FormatError, SourceError
from mxlab.formats import MXFormat
from mxlab.packed import MXTensor
from mxlab.packed.bits import pack, packed_length, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("length", [0, 1, 7, 32, 33])
def test_codes_come_back_from_their_bits(bits, length):
    codes = torch.randint(0, 2**bits, (3, length), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, packed_length(length, bits))
    assert torch.equal(unpack(packed, bits, length), codes)


@pytest.mark.parametrize("bits", [3, 4, 5, 6])
def test_a_row_is_one_number_whose_lowest_bits_are_the_first_code(bits):
    codes = torch.randint(0, 2**bits, (13,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    whole = sum(code << (i * bits) for i, code in enumerate(codes.tolist()))
    assert bytes(pack(codes, bits).tolist()) == whole.to_bytes(packed_length(13, bits), "little")


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("axis", [0, 1])
def test_values_are_those_of_quantizing(text, axis):
    for dtype in (torch.float32, torch.bfloat16):
        x = hard(dtype)
        found = MXTensor.from_float(x, text, axis, seed=3).dequantize()
        assert found.dtype == dtype
        assert same(found, quantize(x, text, axis=axis, seed=3, backend="reference").contiguous())


@pytest.mark.parametrize(("text", "bits"), [("fp4_e2m1@32", 4.25), ("fp6_e2m3@32", 6.25), ("int8@32", 8.25)])
def test_it_takes_the_bits_of_its_format(text, bits):
    x = torch.randn(64, 256)
    assert MXTensor.from_float(x, text).nbytes * 8 == bits * x.numel()
    nvfp4 = MXTensor.from_float(x, "nvfp4")
    assert nvfp4.nbytes * 8 == 4.5 * x.numel() + 32


@pytest.mark.parametrize("text", ["fp6_e2m3@32", "nvfp4"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_parts_along_other_axes(text, axis):
    x = torch.randn(6, 33, 40, generator=torch.Generator().manual_seed(0))
    packed = MXTensor.from_float(x, text, axis)
    for other in {0, 1, 2} - {axis}:
        part = packed.narrow(other - 3, 2, 3)
        assert torch.equal(part.dequantize(), packed.dequantize().narrow(other, 2, 3))
    with pytest.raises(FormatError, match=f"axis {axis} is that of the blocks, which cannot be cut"):
        packed.narrow(axis, 0, 1)
    with pytest.raises(FormatError, match="is not within the"):
        packed.narrow(axis - 1, 1, 100)


@pytest.mark.parametrize("text", ["fp4_e2m1@32", "nvfp4", "int8@0"])
def test_it_is_stored_and_read(text):
    packed = MXTensor.from_float(torch.randn(3, 40), text)
    read = load(save({name: t.contiguous() for name, t in packed.tensors().items()}))
    again = MXTensor.from_tensors(read, json.loads(json.dumps(packed.description())))
    assert torch.equal(again.dequantize(), packed.dequantize())
    assert again.fmt == packed.fmt


def test_what_does_not_fit_is_refused_by_name():
    packed = MXTensor.from_float(torch.randn(3, 40), "nvfp4")
    tensors, description = packed.tensors(), packed.description()

    def read(tensors=tensors, **changed):
        return MXTensor.from_tensors(tensors, {**description, **changed}, "layers.0")

    with pytest.raises(
        SourceError, match=r"layers\.0 has the layout 2, and this version of mxlab reads 1: update mxlab"
    ):
        read(layout=2)
    with pytest.raises(SourceError, match=r"layers\.0: scales is missing, and .* wants torch.uint8 \(3, 3\)"):
        read({name: t for name, t in tensors.items() if name != "scales"})
    with pytest.raises(SourceError, match=r"elements is torch.uint8 \(3, 19\), and"):
        read({**tensors, "elements": tensors["elements"][:, 1:]})
    with pytest.raises(SourceError, match=r"scales is torch.float32 \(3, 3\)"):
        read({**tensors, "scales": tensors["scales"].float()})
    with pytest.raises(SourceError, match="tensor_scale is missing"):
        read({name: t for name, t in tensors.items() if name != "tensor_scale"})


def test_bad_input_is_refused():
    with pytest.raises(FormatError, match=r"axis is 2: a tensor of shape \(3, 40\) has 2"):
        MXTensor.from_float(torch.randn(3, 40), "fp4_e2m1@32", 2)
    with pytest.raises(FormatError, match="elements of 16 bits"):
        MXTensor.from_float(torch.randn(3, 40), "bf16@32")
    with pytest.raises(FormatError, match=r"cannot quantize torch\.float64"):
        MXTensor.from_float(torch.randn(3, 40).double(), "fp4_e2m1@32")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("fp4_e2m1@32", "fp6_e2m3@32"), ("fp4_e2m1@32", "fp8_e4m3@32"), ("fp4_e2m1@32", "fp4_e2m1@16"),
        ("int4@32", "int8@32"), ("fp6_e2m3@32", "fp8_e4m3@32"), ("fp6_e3m2@32", "fp8_e5m2@32"),
        ("fp4_e2m1@32", "int8@32"), ("fp4_e2m1@32", "fp4_e2m1@32,scale_rule=mse"),
    ],
)  # fmt: skip
def test_recast_to_a_format_that_holds_it(given, wanted):
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-4, 4)[:, None]
    made = MXTensor.from_float(x, given)
    found = made.recast(wanted)
    assert found.fmt == MXFormat.parse(wanted)
    assert torch.equal(found.dequantize(), made.dequantize())


@pytest.mark.parametrize(("given", "wanted"), [("fp6_e2m3@32", "fp4_e2m1@32"), ("fp4_e2m1@16", "fp4_e2m1@32")])
def test_recast_to_a_format_that_does_not(given, wanted):
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(0, 96)[None] ** 0.5
    made = MXTensor.from_float(x, given)
    lost = made.dequantize() - quantize(made.dequantize(), wanted)
    share = f"{float(lost.norm() / made.dequantize().norm()):.2e}"
    with pytest.raises(FormatError, match=rf"{int((lost != 0).sum())} of 768 values of {given}.* off by {share} of"):
        made.recast(wanted)


@pytest.mark.parametrize("text", ["fp8_e6m1@32", "fp8_e7m0@32", "fp7_e5m1@32", "fp8_e5m2@12", "fp4_e2m1@32", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_dtype_cannot_hold_becomes_its_largest_value(text, dtype):
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.tensor([0, 3, 5, 38])[:, None]
    made = MXTensor.from_float(x.clamp(-3e38, 3e38), text)
    limit = torch.finfo(dtype).max
    wanted = made.dequantize(torch.float32).clamp(-limit, limit).to(dtype)
    assert torch.equal(made.dequantize(dtype), wanted)
    assert wanted.isfinite().all()
