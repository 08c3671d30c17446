"""microxcaling's quantization functions against its recorded outputs, and what they refuse."""

import ml_dtypes
import numpy as np
import pytest
import torch

from mxlab import quantize, round_elementwise
from mxlab.compat.mx import MxSpecs, quantize_elemwise_op, quantize_mx_op
from mxlab.compat.mx.elemwise_ops import (
    _quantize_bfloat,
    _quantize_elemwise,
    _quantize_elemwise_core,
    _quantize_fp,
)
from mxlab.compat.mx.formats import ElemFormat, RoundingMode, _get_format_params, _get_max_norm, _get_min_norm
from mxlab.compat.mx.mx_ops import _quantize_mx
from mxlab.errors import FormatError, SpecError
from mxlab.formats import ELEMENTS, MXFormat

from support import golden
from support.golden import GROUPS, manifest, selection, whole_set  # noqa: F401

X = torch.linspace(-3, 3, 48).reshape(3, 16) ** 3


# ---- golden vectors


def through_compat(case: dict, x: torch.Tensor, numerics: str) -> torch.Tensor:
    """A golden case as a script for microxcaling computes it."""
    specs = MxSpecs(custom_cuda=numerics == "exact")
    if "elementwise" in case:
        scalar = {"fp": 0, "rounding": "nearest", "subnormals": True} | case["elementwise"]
        specs.update(bfloat=scalar.get("bfloat", 0), fp=scalar["fp"], bfloat_subnorms=scalar["subnormals"])
        return quantize_elemwise_op(x, specs, round=scalar["rounding"])
    fmt = MXFormat(**case["format"])
    specs.update(
        scale_bits=fmt.scale_bits,
        shared_exp_method={"floor": "max", "none": "none"}[fmt.scale_rule],
        mx_flush_fp32_subnorms=fmt.flush_fp32_subnorms,
    )
    in_specs = case["id"].endswith(("0", "2", "4", "6", "8"))  # both ways to give a block size
    specs["block_size"] = fmt.block_size if in_specs else 7
    block_size = None if in_specs else fmt.block_size
    return quantize_mx_op(x, specs, fmt.element, block_size, case["axis"], fmt.rounding)


@pytest.fixture(autouse=True)
def _compat_in_place_of_numerics(monkeypatch):
    monkeypatch.setattr(golden, "run", through_compat)


@pytest.mark.parametrize("group", GROUPS, ids="-".join)
def test_selection(selection, group):  # noqa: F811
    golden.check(selection[group])


@pytest.mark.parametrize("group", GROUPS, ids="-".join)
def test_whole_set(whole_set, group):  # noqa: F811
    golden.check(whole_set[group])


# ---- quantize_mx_op


def test_a_format_by_name_or_member():
    specs = MxSpecs(block_size=8)
    expected = quantize(X, "fp4_e2m1@8", numerics="microxcaling")
    for fmt in ("fp4_e2m1", "fp4", ElemFormat.from_str("FP4"), ElemFormat.fp4_e2m1, ElemFormat.fp4):
        assert torch.equal(quantize_mx_op(X, specs, elem_format=fmt, axes=[-1]), expected)


def test_no_format_no_quantization():
    assert quantize_mx_op(X, MxSpecs()) is X
    assert quantize_mx_op(X, None) is X
    assert _quantize_mx(X, 8, None) is X
    assert _quantize_elemwise(X, None) is X


def test_options_left_out_of_a_plain_dictionary_are_microxcalings_defaults():
    y = quantize_mx_op(X, {"custom_cuda": True}, elem_format="int8", axes=-1)
    assert torch.equal(y, quantize(X, "int8@0"))
    assert torch.equal(
        quantize_elemwise_op(X, {"bfloat": 16}), round_elementwise(X, bfloat=16, numerics="microxcaling")
    )


def test_gradients_pass_straight_through():
    x = X.clone().requires_grad_()
    y = quantize_elemwise_op(quantize_mx_op(x, MxSpecs(), elem_format="int4", axes=[0]), MxSpecs(bfloat=12))
    y.backward(X)
    assert not torch.equal(y, x)
    assert torch.equal(x.grad, X)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"axes": None}, r"axes is None: name the axis along which blocks lie, such as axes=\[-1\]"),
        ({"axes": [2]}, r"axis is \[2\]: a tensor of shape \(3, 16\) has axes -2 to 1"),
        ({"elem_format": "fp9"}, "unknown element format 'fp9'"),
        ({"elem_format": "fp8_e4m4"}, "did you mean 'fp8_e4m3'"),
        ({"scale_bits": 9}, "scale_bits is 9: it must be 1 to 8"),
        ({"scale_bits": 0}, "scale_bits is 0"),
        ({"block_size": -1}, "block_size is -1"),
        ({"round": "up"}, "rounding is 'up'"),
        ({"shared_exp_method": "mean"}, "shared_exp_method is 'mean': it must be one of max, none"),
        ({"A": X.double()}, r"cannot quantize torch\.float64"),
        ({"A": X.half(), "elem_format": "bf16"}, r"too large for torch\.float16"),
    ],
)
def test_what_mx_quantization_refuses(given, message):
    options = {"A": X, "scale_bits": 8, "elem_format": "int8", "axes": [-1], "block_size": 8} | given
    with pytest.raises(FormatError, match=message):
        _quantize_mx(**options)


def test_a_format_needs_options():
    with pytest.raises(SpecError, match="mx_specs is None"):
        quantize_mx_op(X, None, elem_format="int8", axes=[-1])


# ---- element-wise rounding


def test_nothing_to_round():
    for specs in (None, MxSpecs(), MxSpecs(bfloat=32)):
        assert quantize_elemwise_op(X, specs) is X
    assert _quantize_bfloat(X, 0) is _quantize_bfloat(X, 32) is _quantize_fp(X) is X
    double = X.double()  # is left alone, too
    assert quantize_elemwise_op(double, MxSpecs()) is double


def test_the_rounding_of_the_options_is_the_default():
    specs = MxSpecs(bfloat=16, round="floor", custom_cuda=True)
    assert torch.equal(quantize_elemwise_op(X, specs), round_elementwise(X, bfloat=16, rounding="floor"))
    assert torch.equal(quantize_elemwise_op(X, specs, round="even"), X.bfloat16().float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bfloat": 16, "fp": 16}, "give one of them"),
        ({"bfloat": 9}, "bfloat must be 10 to 32"),
        ({"fp": 6}, "fp 7 to 29"),
        ({"bfloat": 16, "round": "up"}, "rounding is 'up'"),
    ],
)
def test_what_element_wise_rounding_refuses(options, message):
    with pytest.raises(FormatError, match=message):
        quantize_elemwise_op(X, MxSpecs(options))


@pytest.mark.parametrize("custom_cuda", [False, True])
@pytest.mark.parametrize("rounding", ["nearest", "even", "floor"])
@pytest.mark.parametrize("allow_denorm", [False, True])
def test_the_internal_functions_agree_with_the_public_one(custom_cuda, rounding, allow_denorm):
    x = torch.cat([X.flatten(), X.flatten() * 2.0**-20, X.flatten() * 1e-38, X.flatten() * 1e38])
    options = {"round": rounding, "allow_denorm": allow_denorm, "custom_cuda": custom_cuda}
    public = {"bfloat_subnorms": allow_denorm, "custom_cuda": custom_cuda, "round": rounding}
    bfloat = _quantize_bfloat(x, 12, **options)
    assert torch.equal(bfloat, quantize_elemwise_op(x, MxSpecs(bfloat=12, **public)))
    assert torch.equal(_quantize_fp(x, 8, 3, **options), bfloat)
    assert torch.equal(_quantize_fp(x, 5, 10, **options), quantize_elemwise_op(x, MxSpecs(fp=16, **public)))


@pytest.mark.parametrize("custom_cuda", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp8_e5m2", ml_dtypes.float8_e5m2),
        ("fp8_e4m3", ml_dtypes.float8_e4m3fn),
        ("fp6_e3m2", ml_dtypes.float6_e3m2fn),
        ("fp6_e2m3", ml_dtypes.float6_e2m3fn),
        ("fp4_e2m1", ml_dtypes.float4_e2m1fn),
    ],
)
def test_element_formats_against_ml_dtypes(name, dtype, custom_cuda):
    grid = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e5m2).astype(np.float32)
    x = torch.from_numpy(grid[np.isfinite(grid)])
    x = torch.cat([x, x * 1.125, x * 1.375])  # a grid point, a tie of some formats, another value
    largest = ELEMENTS[name].max
    inside = x[x.abs() <= largest]
    expected = torch.from_numpy(inside.numpy().astype(dtype).astype(np.float32))
    assert torch.equal(_quantize_elemwise(inside, name, round="even", custom_cuda=custom_cuda), expected)
    beyond = torch.tensor([4 * largest, -4 * largest, torch.inf])
    saturated = _quantize_elemwise(beyond, name, saturate_normals=True, custom_cuda=custom_cuda)
    assert saturated.tolist() == [largest, -largest, torch.inf]
    assert _quantize_elemwise(beyond, name, custom_cuda=custom_cuda).tolist() == [torch.inf, -torch.inf, torch.inf]


@pytest.mark.parametrize("custom_cuda", [False, True])
def test_integers_saturate_and_have_no_subnormals(custom_cuda):
    x = torch.tensor([0.25, 0.3, 1.7, 3.0, -3.0])
    for allow_denorm in (False, True):
        y = _quantize_elemwise(x, "int4", allow_denorm=allow_denorm, custom_cuda=custom_cuda)
        assert y.tolist() == [0.25, 0.25, 1.75, 1.75, -1.75]


def test_dither_draws_from_torchs_generator():
    x = torch.full((1000,), 1.1)
    torch.manual_seed(1)
    first, second = (_quantize_elemwise(x, "fp4", round="dither") for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(_quantize_elemwise(x, "fp4", round="dither"), first)
    assert not torch.equal(first, second)
    assert set(first.tolist()) == {1.0, 1.5}
    assert abs(first.mean() - 1.1) < 0.03


def test_no_format_of_that_reach():
    with pytest.raises(FormatError, match="max_norm is 5: 2 exponent bits and 3 bits of mantissa reach one of 6, 4, 3"):
        _quantize_elemwise_core(X, 3, 2, 5.0)


# ---- formats


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("fp16", "float16"), (5, 12, 15, 65504, 2**-14)),
        (("bf16", "bfloat16"), (8, 9, 127, 2**127 * (1 + 127 / 128), 2**-126)),
        (("fp8_e5m2",), (5, 4, 15, 57344, 2**-14)),
        (("fp8_e4m3",), (4, 5, 8, 448, 2**-6)),
        (("fp6_e3m2",), (3, 4, 4, 28, 0.25)),
        (("fp6_e2m3",), (2, 5, 2, 7.5, 1)),
        (("fp4", "fp4_e2m1"), (2, 3, 2, 6, 1)),
        (("int8",), (0, 8, 0, 127 / 64, 0)),
        (("int4",), (0, 4, 0, 1.75, 0)),
        (("int2",), (0, 2, 0, 1, 0)),
    ],
)
def test_format_parameters(names, expected):
    for name in names:
        assert _get_format_params(name) == _get_format_params(ElemFormat.from_str(name)) == expected
    assert _get_min_norm(expected[0]) == expected[-1]


def test_largest_numbers_of_ieee_formats():
    assert _get_max_norm(5, 12) == torch.finfo(torch.float16).max
    assert _get_max_norm(8, 9) == torch.finfo(torch.bfloat16).max
    with pytest.raises(FormatError, match="ebits is 4"):
        _get_max_norm(4, 5)


def test_names_of_formats_and_roundings():
    assert RoundingMode.string_enums() == ["nearest", "floor", "even"]
    assert RoundingMode["even"] == 2
    assert {fmt.value for fmt in ElemFormat} == set(ELEMENTS)
    with pytest.raises(FormatError, match="unknown element format 'fp5'"):
        ElemFormat.from_str("fp5")
    with pytest.raises(FormatError, match="'int5' is no member of ElemFormat"):
        ElemFormat.from_str("int5")
