"""Scales that are floating-point numbers, against models written here and against gfloat, ml_dtypes and torchao."""

from fractions import Fraction

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxlab.errors import FormatError
from mxlab.formats import ROUNDINGS, MXFormat, element
from mxlab.formats.scales import SCALES
from mxlab.numerics import philox, quantize, quantize_, scale_clamps

from support.bits import same
from support.specification import FACTS, SEED, grid_points, to_element

ELEMENTS = sorted(name for name in FACTS if name != "bf16")
E5M3 = gfloat.FormatInfo(
    "ue5m3",
    k=8,
    precision=4,
    bias=15,
    is_signed=False,
    domain=gfloat.Domain.Finite,
    has_nz=False,
    num_high_nans=1,
    has_subnormals=True,
    is_twos_complement=False,
)


# The definition, with numpy's float32 for what is done in float32, gfloat or ml_dtypes for the scale, and fractions for
# the elements


def held_e5m3(wanted: np.float32) -> np.float32:
    rounded = gfloat.round_float(E5M3, float(wanted), gfloat.RoundMode.TiesToEven, sat=True)
    return np.float32(max(rounded, 2.0**-17))


def held_e4m3(wanted: np.float32) -> np.float32:
    rounded = np.minimum(wanted, np.float32(448)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return np.float32(max(rounded, 2.0**-9))


def tensor_scale(x: np.ndarray, fmt: MXFormat) -> np.float32:
    finite = np.abs(x[np.isfinite(x)])
    largest = finite.max() if finite.size else np.float32(0)
    return max(largest / np.float32(448 * element(fmt.element).max), np.float32(2.0**-117))


def model_block(xs: np.ndarray, fmt: MXFormat, us: np.ndarray, t: np.float32 | None) -> np.ndarray:
    if not np.isfinite(xs).all():
        return np.full_like(xs, np.nan)
    wanted = np.abs(xs).max() / np.float32(element(fmt.element).max)
    if t is None:
        scale = held_e5m3(wanted)
        y, total = xs / scale, scale
    else:
        scale = held_e4m3(wanted / t)
        y, total = xs * ((np.float32(1) / t) / scale), t * scale
    rounded = [float(to_element(Fraction(float(v)), fmt, Fraction(float(u)))) for v, u in zip(y, us, strict=True)]
    return np.array(rounded, np.float32) * total + np.float32(0)


def model(x: Tensor, fmt: MXFormat, seed: int = SEED) -> Tensor:
    """A 2-D tensor, blocks along the last axis."""
    us = philox.uniform(x.shape, seed, x.device).numpy()
    values = x.float().numpy()
    t = tensor_scale(values, fmt) if fmt.scale == "e4m3" else None
    result = np.empty_like(values)
    size = fmt.block_size or values.shape[1]
    with np.errstate(over="ignore", under="ignore"):
        for row, out, u in zip(values, result, us, strict=True):
            for start in range(0, len(row), size):
                part = slice(start, start + size)
                out[part] = model_block(row[part], fmt, u[part], t)
    largest = torch.finfo(x.dtype).max
    return torch.from_numpy(result).clamp(-largest, largest).to(x.dtype)


finite = st.one_of(st.floats(-8, 8, width=32), st.floats(width=32, allow_nan=False, allow_infinity=False))
values = st.one_of(finite, finite, finite, st.sampled_from([0.0, -0.0, np.nan, np.inf, -np.inf, 2.0**-149]))
float_scaled = st.builds(
    MXFormat,
    st.sampled_from(ELEMENTS),
    st.integers(0, 9),
    st.sampled_from(["e5m3", "e4m3"]),
    rounding=st.sampled_from(ROUNDINGS),
)


@settings(max_examples=400)
@given(
    st.lists(st.lists(values, min_size=7, max_size=7), min_size=1, max_size=4),
    float_scaled,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_definition_on_random_blocks(xs, fmt, dtype):
    x = torch.tensor(xs).to(dtype)
    same(quantize(x, fmt, seed=SEED), model(x, fmt))


def all_scales(fmt: MXFormat) -> np.ndarray:
    """Every value of a scale, the midpoints between them and beyond, and their float32 neighbours."""
    codes = np.array(fmt.scale_grid.magnitudes())
    beyond = codes[-1] * np.array([1.04, 1.07, 2, 1000])
    points = np.concatenate([codes, (codes[1:] + codes[:-1]) / 2, codes[1:] * 1.001, beyond]).astype(np.float32)
    near = [points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(np.inf))]
    return np.unique(np.abs(np.concatenate(near)))


@pytest.mark.parametrize("name", ["fp4_e2m1", "fp6_e3m2", "fp8_e4m3", "int4", "int8"])
def test_every_e5m3_scale(name):
    fmt = MXFormat(name, 4, scale="e5m3", rounding="even")
    amax = all_scales(fmt) * np.float32(element(name).max)
    x = torch.from_numpy(np.stack([amax, -amax / 3, amax * np.float32(0.7), -amax], 1))
    same(quantize(x, fmt), model(x, fmt))


@pytest.mark.parametrize("name", ["fp4_e2m1", "fp6_e3m2", "fp8_e4m3", "int4", "int8"])
def test_every_e4m3_scale(name):
    fmt = MXFormat(name, 4, scale="e4m3", rounding="even")
    for largest in (448, 447, 3e-20):  # the scale of the tensor: 1, almost 1, and far away
        points = all_scales(fmt)
        amax = points[points <= 448] * np.float32(element(name).max * largest / 448)
        x = torch.from_numpy(np.stack([amax, -amax / 3, amax * np.float32(0.7), -amax], 1))
        same(quantize(x, fmt), model(x, fmt))


def test_the_scales_are_gfloats_and_ml_dtypes():
    codes = {scale: MXFormat("fp4", scale=scale).scale_grid.magnitudes() for scale in ("e5m3", "e4m3")}
    assert list(codes["e5m3"]) == [gfloat.decode_float(E5M3, c).fval for c in range(255)]
    e4m3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert list(codes["e4m3"]) == e4m3.tolist()
    assert {name: row.exponent_bits + row.mantissa_bits for name, row in SCALES.items()} == {
        "e8m0": 8,
        "e5m3": 8,
        "e4m3": 7,  # and a sign, which is not used
    }


# torchao


def torchao_nvfp4(x: Tensor) -> Tensor:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    scale = per_tensor_amax_to_scale(x.abs().amax())
    return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(x.dtype) + 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_torchao_nvfp4(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((256, 512), generator=generator) * torch.randn((256, 1), generator=generator).exp2()
    x[::7] = torch.from_numpy(np.random.default_rng(seed).choice(grid_points("fp4_e2m1"), (37, 512)))
    x[5, :16] = 0
    # Multiples of three as the largest: values halfway between elements are common then.
    x[3, 3] = (129.0 + 3 * seed) / 8
    x = x.to(dtype)
    same(quantize(x, "nvfp4,rounding=even"), torchao_nvfp4(x))


def test_torchao_raises_scales_to_the_smallest_normal_number():
    """The one difference: below 1/28672 of the largest magnitude mxlab goes on with subnormal scales."""
    x = torch.zeros(2, 16)
    x[0, 0] = 2688.0  # the scale of the tensor is 1
    x[1] = 6 * 2.0**-8
    assert quantize(x, "nvfp4,rounding=even")[1, 0] == 6 * 2.0**-8
    assert torchao_nvfp4(x)[1, 0] == 1.5 * 2.0**-6
    x[1] = 6 * 2.0**-6
    same(quantize(x, "nvfp4,rounding=even"), torchao_nvfp4(x))


# The range


def test_a_scale_saturates_at_the_largest_and_is_never_zero():
    x = torch.tensor([[1e9, -6 * 114688.0, 114688.0], [2.0**-17, 3 * 2.0**-18, 2.0**-30]])
    expected = torch.tensor([[6 * 114688.0, -6 * 114688.0, 114688.0], [2.0**-17, 1.5 * 2.0**-17, 0.0]])
    same(quantize(x, "fp4@3,scale=e5m3,rounding=even"), expected)
    assert scale_clamps(x, MXFormat("fp4", 3, "e5m3")) == {"blocks": 2, "clamped": 1, "overflowed": 1}


def test_e4m3_spans_the_tensor():
    x = torch.tensor([1.0, 2.0**-14, 2.0**-17, 2.0**-18, 2.0**-23, 0.0, torch.nan, torch.inf])[:, None]
    result = quantize(x, "fp4@1,scale=e4m3")
    assert result[5] == 0
    assert result[6:].isnan().all()
    # 1/2688 is the scale of the tensor: with the scale 2^-9 and the element 1/2 the smallest result is 2^-10 / 2688.
    assert (result[:4] != 0).all()
    assert result[4] == 0
    assert scale_clamps(x, MXFormat("fp4", 1, "e4m3")) == {"blocks": 5, "clamped": 1, "overflowed": 0}


@pytest.mark.parametrize("scale", ["e5m3", "e4m3"])
@pytest.mark.parametrize("largest", [0.0, 2.0**-149, 2.0**-126, 2.0**-110, 3.4028234663852886e38])
def test_no_tensor_is_too_small_or_too_large(scale, largest):
    for name in ELEMENTS:
        x = torch.tensor([[largest, -largest / 2, largest / 3, 0.0]])
        fmt = MXFormat(name, 2, scale, rounding="even")
        result = quantize(x, fmt)
        same(result, model(x, fmt))
        assert not result.isnan().any()
        assert (result.abs() <= 2 * x.abs().amax() + 1e-4).all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_block_does_not_spoil_the_tensor(poison):
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 9  # the largest, in a block of its own
    expected = quantize(x, "nvfp4")
    x[3, 20] = poison
    expected[3, 16:] = torch.nan
    same(quantize(x, "nvfp4"), expected)


def test_the_tensor_of_a_scale_is_all_that_is_passed():
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    x[0] *= 100
    whole = quantize(x, "nvfp4")
    same(quantize(x.T, "nvfp4", axis=0), whole.T)
    same(quantize(x.view(4, 16, 48), "nvfp4").view(64, 48), whole)
    assert not torch.equal(quantize(x[1:], "nvfp4"), whole[1:])
    same(quantize_(x.clone(), "nvfp4"), whole)


# What the numerics share


EVERY_KIND = [
    *(f"int8@16,scale_rule={rule}" for rule in ("ceil", "even", "rceil", "mse", "mase_int")),
    *("fp4@16,scale=e5m3", "nvfp4", "nvfp4,rounding=dither"),
]


@pytest.mark.parametrize("text", EVERY_KIND)
def test_microxcaling_has_no_such_scale(text):
    for backend in ("native", "reference"):
        with pytest.raises(FormatError, match=r"microxcaling knows.*e8m0.*floor and none.*numerics='exact'"):
            quantize(torch.ones(2, 16), text, numerics="microxcaling", backend=backend)


@pytest.mark.parametrize("text", EVERY_KIND)
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function:DeprecationWarning")  # torch's own tracing
def test_the_gradient_passes_straight_through_compiled_code(text):
    x = torch.randn(4, 40, requires_grad=True)
    compiled = torch.compile(lambda t: quantize(t, text, seed=1), fullgraph=True, backend="aot_eager")
    gradient = torch.randn(4, 40)
    y = compiled(x)
    y.backward(gradient)
    same(y, quantize(x.detach(), text, seed=1))
    same(x.grad, gradient)


@pytest.mark.parametrize(
    ("rule", "clamped", "overflowed"), [("floor", 1, 0), ("ceil", 1, 1), ("even", 1, 1), ("rceil", 1, 1), ("mse", 1, 0)]
)
def test_scale_clamps_follow_the_rule(rule, clamped, overflowed):
    # With 3 bits the exponent of a scale is -3 to 3; int4's largest element is 1.75.
    x = torch.tensor([[15.9, 0.0], [1.0, 0.0], [0.06, 0.0], [0.0, 0.0], [torch.nan, 1.0]])
    fmt = MXFormat("int4", 2, scale_bits=3, scale_rule=rule)
    assert scale_clamps(x, fmt) == {"blocks": 3, "clamped": clamped, "overflowed": overflowed}
    assert quantize(x, fmt)[0].isnan().any() == (overflowed > 0)


def test_mase_int_moves_when_it_is_repeated():
    x, moved = torch.tensor([1.1]), []
    for _ in range(2):
        x = quantize(x, "int4,scale_rule=mase_int")
        moved.append(x.item())
    assert moved == [1.0, 0.875]
    assert quantize(torch.tensor([-1.0, 1.0]), "int8,scale_rule=mase_int").tolist() == [-1.0, 127 / 128]


def test_mse_is_the_better_of_two():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn((200, 32), generator=generator)
    floor, above = (quantize(x, MXFormat("fp4", 32, scale_rule=rule)) for rule in ("floor", "ceil"))
    best = quantize(x, "fp4@32,scale_rule=mse")
    errors = [((x - q).double() ** 2).sum(1) for q in (floor, above, best)]
    assert (errors[2] <= torch.minimum(errors[0], errors[1]) * (1 + 1e-6)).all()
    assert (errors[2] < errors[0]).any()
    assert (errors[2] < errors[1]).any()
