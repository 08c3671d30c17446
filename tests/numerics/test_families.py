"""What the quantizers compute: against plain Python on fractions, against other libraries, and at the door."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from mxlab.errors import FormatError
from mxlab.formats import FAMILIES, Binary, FormatFamily, Integer, Log, MinifloatIEEE, Ternary, parse_format
from mxlab.numerics import philox, quantize, quantize_

from support import family_oracle as oracle
from support.families import SPELLED, every_family

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERY_TEXT = [text for _, text, *_ in SPELLED]
DENORM = [(8, 4), (8, 5), (8, 1), (6, 3), (6, 2), (4, 2), (3, 1)]
IEEE = [(8, 4), (8, 5), (8, 7), (6, 3), (4, 2), (3, 2), (2, 1)]
SCALARS = [
    "integer,width=8,frac=4",
    "integer,width=3,frac=0",
    "integer,width=2,frac=-3",
    "integer,width=5,frac=9",
    *(f"minifloat_denorm,width={width},exponent_bits={bits}" for width, bits in DENORM),
    *(f"minifloat_ieee,width={width},exponent_bits={bits}" for width, bits in IEEE),
    "minifloat_denorm,width=6,exponent_bits=2,bias=9",
    "minifloat_ieee,width=6,exponent_bits=2,bias=-3",
    "log,width=2",
    "log,width=4",
    "log,width=4,bias=9",
    "log,width=8",
    "binary",
]
WIDE = [
    "log,width=32",
    "integer,width=32,frac=2",
    "minifloat_ieee,width=32,exponent_bits=4",
    "minifloat_denorm,width=32,exponent_bits=4",
]
SHARED = [
    "block_fp@4,width=8",
    "block_fp@8,width=4,exponent_bits=3",
    "block_fp@0,width=2,exponent_bits=5,bias=20",
    "block_minifloat@4,width=8,exponent_bits=4",
    "block_minifloat@8,width=4,exponent_bits=2,bias_bits=3",
    "block_minifloat@0,width=2,exponent_bits=1,bias_bits=1",
    "block_log@4,width=4",
    "block_log@8,width=2,bias_bits=2",
    "block_log@0,width=8",
    "binary,scaled=true",
    "binary_residual,levels=1",
    "binary_residual",
    "binary_residual,levels=3",
    "ternary",
]
STOCHASTIC = ["binary,stochastic=true", "binary,scaled=true,stochastic=true"]


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(a: Tensor, b: Tensor) -> None:
    """Bits are the same; NaN equals NaN."""
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    as_bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    wrong = (a.contiguous().view(as_bits) != b.contiguous().view(as_bits)) & ~(a.isnan() & b.isnan())
    assert not wrong.any(), f"{a[wrong][:4]!r} and {b[wrong][:4]!r}"


def expected(x: Tensor, fmt: FormatFamily, seed: int = 0) -> Tensor:
    """The oracle's result for every row of a matrix."""
    rows = x.double().tolist()
    noise = [[Fraction(u) for u in row] for row in philox.uniform(x.shape, seed, x.device).double().tolist()]
    done = [oracle.quantized(row, fmt, u if fmt.is_random else None) for row, u in zip(rows, noise, strict=True)]
    largest = torch.finfo(x.dtype).max
    return (torch.tensor(done, dtype=torch.float64) + 0.0).clamp(-largest, largest).to(x.dtype)


# Every code, every midpoint, and their neighbours


def codes(fmt: FormatFamily) -> list[float]:
    """The magnitudes of all codes of a scalar format, ascending, decoded from the fields of the code."""
    if isinstance(fmt, Integer):
        return [k * 2.0**-fmt.frac for k in range(2 ** (fmt.width - 1) + 1)]
    if isinstance(fmt, Binary):
        return [0.0, 1.0]
    bits = fmt.exponent_bits  # pyright: ignore
    bias, m = oracle.bias_of(fmt, bits), fmt.width - bits - 1
    pairs = [(field, k) for field in range(2**bits) for k in range(2**m)]
    if isinstance(fmt, MinifloatIEEE):
        values = [math.ldexp(k + 2**m * (field > 0), max(field, 1) - bias - m) for field, k in pairs]
    else:
        values = [math.ldexp(1 if isinstance(fmt, Log) else k, field - bias - m) for field, k in pairs]
    return sorted(set(values))


@pytest.mark.parametrize("text", SCALARS)
def test_scalar_formats_over_the_whole_code_space(text):
    fmt = parse_format(text)
    grid = np.array(codes(fmt))
    between = [(grid[1:] + grid[:-1]) / 2, np.sqrt(grid[1:] * grid[:-1])]
    points = np.concatenate([grid, *between, grid[-1:] * 1.5]).astype("f4")
    points = np.concatenate([points, *(np.nextafter(points, np.float32(limit)) for limit in (-np.inf, np.inf))])
    x = torch.from_numpy(np.concatenate([points, -points, np.array([math.inf, -math.inf, math.nan], "f4")]))
    result = quantize(x, fmt)
    same(result, expected(x[None], fmt)[0])
    assert set(result[~result.isnan()].abs().tolist()) <= set(grid.tolist())
    if not text.startswith("minifloat_denorm"):
        reached = grid[1:] if isinstance(fmt, Integer | Binary) else grid
        assert set(reached.tolist()) <= set(result.abs().tolist())
        same(quantize(result, fmt), result)


def test_every_scalar_family_is_walked():
    shared = {name for name in FAMILIES if any(text.startswith(name) for text in SHARED)}
    assert {text.partition(",")[0] for text in SCALARS} | shared == set(FAMILIES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", [*SCALARS, *WIDE, *SHARED, *STOCHASTIC])
def test_random_rows(text, dtype):
    fmt = parse_format(text)
    wide = draws(6, 21, seed=1) * torch.exp2(
        torch.randint(-12, 12, (6, 21), generator=torch.Generator().manual_seed(2))
    )
    x = torch.cat([draws(6, 21), draws(3, 21) * 2.0**-20, draws(3, 21) * 2.0**9, wide, torch.zeros(1, 21)]).to(dtype)
    x[1, ::3] = 0
    x[2, 5] = -0.0
    same(quantize(x, fmt, seed=7), expected(x, fmt, seed=7))


row = arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 12)), elements=st.floats(width=32))


@settings(max_examples=500)
@given(row, every_family, st.sampled_from(DTYPES), st.integers(-(2**63), 2**63 - 1))
def test_any_row_in_any_format(x, fmt, dtype, seed):
    x = torch.from_numpy(x).to(dtype)
    if isinstance(fmt, Binary | Ternary) or fmt.family == "binary_residual":
        x = x.nan_to_num(0, 1, 1).clamp(-1e3, 1e3).half().to(dtype)  # sums that float64 takes exactly
    same(quantize(x, fmt, seed=seed), expected(x, fmt, seed))


# Against other libraries


@pytest.mark.parametrize(("width", "bits"), [(4, 2), (6, 3), (6, 2)])
def test_ieee_minifloats_differ_from_ml_dtypes_only_where_rounding_carries(width, bits):
    m = width - bits - 1
    theirs = getattr(ml_dtypes, f"float{width}_e{bits}m{m}fn")  # no codes for infinities and NaN, saturating
    largest = float(ml_dtypes.finfo(theirs).max)
    x = np.concatenate([np.linspace(-1.1, 1.1, 40001), np.geomspace(1e-4, 10, 20001)]).astype("f4") * np.float32(
        largest
    )
    nearest = x.astype(theirs).astype("f4")
    ours = quantize(torch.from_numpy(x), MinifloatIEEE(width, bits)).numpy()
    smallest = 2.0 ** (2 - 2 ** (bits - 1))
    binade = np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 1e-9))), np.log2(smallest))
    carries = (np.abs(nearest) >= 2.0 ** (binade + 1)) | ((np.abs(x) < smallest) & (np.abs(nearest) == smallest))
    assert 0.01 < carries.mean() < 0.5
    assert np.array_equal(ours[~carries], nearest[~carries])
    held = np.where(np.abs(x) < smallest, smallest * (1 - 2.0**-m), 2.0**binade * (2 - 2.0**-m))
    assert np.array_equal(np.abs(ours[carries]), held[carries])


@pytest.mark.parametrize(("width", "frac"), [(8, 4), (4, 2), (4, 7), (8, 0)])
def test_integers_are_those_of_torch(width, frac):
    x = torch.cat([draws(4096) * 3, torch.arange(-64, 64) / 32, torch.tensor([1e9, -1e9])])
    theirs = torch.fake_quantize_per_tensor_affine(x, 2.0**-frac, 0, -(2 ** (width - 1)), 2 ** (width - 1) - 1)
    assert torch.equal(quantize(x, Integer(width, frac)), theirs)


# What shares a mean


def test_means_are_those_of_the_axis():
    w = draws(5, 30)
    scale = w.double().abs().mean(-1, keepdim=True).float()
    assert torch.equal(quantize(w, "binary,scaled=true"), torch.where(w >= 0, scale, -scale))
    assert torch.equal(quantize(w.T, "binary,scaled=true", axis=0), torch.where(w >= 0, scale, -scale).T)
    whole = w.double().abs().mean().float()
    assert torch.equal(quantize(w, "binary,scaled=true", axis=(0, 1)), torch.where(w >= 0, whole, -whole))


@pytest.mark.parametrize("text", ["ternary", "binary,scaled=true", "binary_residual", "block_fp@8,width=4"])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 1, 3, 7)])
def test_tensors_of_any_shape_are_quantized_row_by_row(text, shape):
    x = draws(*shape)
    rows = [quantize(row, text) for row in x.reshape(-1, 7)]
    assert torch.equal(quantize(x, text), torch.stack(rows).reshape(shape))


def test_ternary_by_hand():
    w = torch.tensor([[4.0, -2.0, 1.5, -0.5], [1.0, 1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    # The means are 2, 1 and 0, so the thresholds 1.5 (which 1.5 is not above), 0.75 and 0.
    assert quantize(w, "ternary").tolist() == [[3.0, -3.0, 0.0, 0.0], [1.0, 1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]


def test_residual_binary_by_hand():
    # Means 2 and 1: 3 = 2 + 1, 1 = 2 - 1, -3 = -2 - 1, -1 = -2 + 1.
    w = torch.tensor([3.0, 1.0, -3.0, -1.0])
    assert quantize(w, "binary_residual,levels=1").tolist() == [2.0, 2.0, -2.0, -2.0]
    assert torch.equal(quantize(w, "binary_residual,levels=2"), w)


def test_more_levels_leave_less():
    x = draws(16, 256)
    errors = [(quantize(x, f"binary_residual,levels={n}") - x).square().mean().item() for n in (1, 2, 3)]
    # Of normal values a scaled sign leaves 1 - 2/pi; each level that follows leaves less.
    assert errors[0] == pytest.approx(1 - 2 / math.pi, rel=0.05)
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.5 * errors[1]


# Stochastic signs


def test_signs_are_drawn_with_the_probability_of_binary_connect():
    x = torch.tensor([-5.0, -1.0, -0.5, 0.0, 0.25, 1.0, 3.0]).expand(20000, 7)
    share = (quantize(x, "binary,stochastic=true", seed=0) == 1).double().mean(0)
    assert share[[0, 1, 5, 6]].tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(share[2:5], torch.tensor([0.25, 0.5, 0.625]).double(), atol=0.015, rtol=0)


def test_scaled_signs_are_drawn_so_that_their_mean_is_the_clipped_value():
    w = draws(1, 8) * 0.01
    scale = quantize(w, "binary,scaled=true").abs()
    mean = sum(quantize(w, "binary,scaled=true,stochastic=true", seed=s).double() for s in range(2000)) / 2000
    torch.testing.assert_close(mean, w.double().clamp(-scale, scale), atol=6e-4, rtol=0)


def test_a_number_drawn_equal_to_the_probability_gives_minus_one():
    u = philox.uniform((1000,), 3, torch.device("cpu"))
    above = torch.nextafter(2 * u - 1, torch.tensor(2.0))
    assert (quantize(2 * u - 1, "binary,stochastic=true", seed=3) == -1).all()
    assert (quantize(above, "binary,stochastic=true", seed=3) == 1).all()


def test_the_seed_decides():
    x = draws(4, 50)
    fixed = [quantize(x, "binary,stochastic=true", seed=s) for s in (1, 1, 2)]
    assert torch.equal(fixed[0], fixed[1])
    assert not torch.equal(fixed[0], fixed[2])
    torch.manual_seed(5)
    drawn = [quantize(x, "binary,stochastic=true") for _ in range(2)]
    assert not torch.equal(*drawn)
    torch.manual_seed(5)
    assert torch.equal(quantize(x, "binary,stochastic=true"), drawn[0])


# NaN, infinities, zeros


@pytest.mark.parametrize("text", SCALARS)
def test_alone_nan_stays_and_infinities_saturate(text):
    x = torch.tensor([math.nan, math.inf, -math.inf, 2.0**127, -(2.0**127), 0.3])
    y = quantize(x, text)
    assert y.isnan().tolist() == [True, *[False] * 5]
    assert y[1:3].tolist() == y[3:5].tolist()
    assert y[5] == quantize(x[5:], text)[0]


@pytest.mark.parametrize("text", SHARED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_among_others_they_make_a_block_nan(text, bad):
    x = draws(3, 16)
    clean = quantize(x, text)
    x[1, 2] = bad
    y = quantize(x, text)
    size = parse_format(text).block_size or 16
    assert y[1, :size].isnan().all()
    assert torch.equal(y[1, size:], clean[1, size:])
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("text", [*SCALARS, *SHARED, "binary,scaled=true,stochastic=true"])
def test_zeros(text):
    fmt = parse_format(text)
    y = quantize(torch.tensor([[0.0, -0.0, 0.0, -0.0]]), fmt, seed=0)
    assert not y.signbit().any()
    assert len(y.unique()) == 1
    if fmt.family == "log":
        assert y[0, 0] == 2.0**fmt.emin
    elif fmt.family == "block_log":
        assert y[0, 0] == 2.0 ** (1 - 2 ** (fmt.bias_bits - 1))
    elif fmt == Binary():
        assert y[0, 0] == 1
    else:
        assert y[0, 0] == 0


def test_what_the_dtype_cannot_hold_saturates():
    x = torch.tensor([60000.0, -60000.0, math.inf], dtype=torch.float16)
    assert quantize(x, "log,width=8").tolist() == [65504.0, -65504.0, 65504.0]
    assert quantize(torch.tensor([60000.0]), "log,width=8").tolist() == [65536.0]


# The door


def gradient(x: Tensor, text: str) -> Tensor:
    x = x.clone().requires_grad_()
    quantize(x, text, seed=0).mul(torch.arange(x.numel()).reshape(x.shape)).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("text", EVERY_TEXT)
def test_the_gradient_passes_straight_through(text):
    x = draws(3, 8) * 50
    assert torch.equal(gradient(x, text), torch.arange(24.0).reshape(3, 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", EVERY_TEXT)
def test_every_way_in_gives_the_same(text, dtype):
    x = draws(6, 5, 12).to(dtype).permute(2, 0, 1)
    before = x.clone()
    for axis in (0, -1, (0, 2)):
        result = quantize(x, text, axis=axis, seed=3)
        assert result.stride() == torch.empty_like(x).stride()
        same(quantize(x, parse_format(text), axis=axis, seed=3, backend="reference"), result)
        out = torch.empty_like(x)
        assert quantize(x, text, axis=axis, seed=3, out=out) is out
        same(out, result)
        again = x.clone()
        assert quantize_(again, text, axis=axis, seed=3) is again
        same(again, result)
    assert torch.equal(x, before)


@pytest.mark.parametrize("text", EVERY_TEXT)
@pytest.mark.parametrize("shape", [(0,), (0, 8), (4, 0)])
def test_empty_tensors(text, shape):
    assert quantize(torch.zeros(shape), text).shape == shape
    assert quantize_(torch.zeros(shape), text).shape == shape


@pytest.mark.parametrize("text", EVERY_TEXT)
def test_compiled_code_gives_the_same(text):
    torch._dynamo.reset()
    x = draws(4, 16)
    compiled = torch.compile(lambda x: quantize(x * 2, text, seed=1) + 1, fullgraph=True, backend="eager")
    same(compiled(x), quantize(x * 2, text, seed=1) + 1)


def message(function, *args, **kwargs) -> str:
    with pytest.raises(FormatError) as error:
        function(*args, **kwargs)
    return str(error.value)


@pytest.mark.parametrize("function", [quantize, quantize_])
def test_what_the_quantizers_do_not_have(function):
    for x in (draws(4), draws(0)):
        said = message(function, x, "ternary", numerics="microxcaling")
        assert "microxcaling" in said
        assert "ternary" in said
        assert "use 'exact'" in said
        for backend in ("native", "cuda"):
            said = message(function, x, "integer,width=8,frac=4", backend=backend)
            assert f"backend is {backend!r}" in said
            assert "integer,width=8,frac=4" in said
            assert "'auto' or 'reference'" in said


def test_other_errors_are_those_of_every_format():
    assert "axis is 2" in message(quantize, draws(3, 4), "ternary", axis=2)
    assert "torch.float64" in message(quantize, draws(4).double(), "ternary")
    assert "numerics is 'exakt'" in message(quantize, draws(4), "ternary", numerics="exakt")
    assert "out is torch.float32 of shape (3,)" in message(quantize, draws(4), "ternary", out=draws(3))
    assert "seed is 'x'" in message(quantize, draws(4), "binary,stochastic=true", seed="x")
    assert "requires a gradient" in message(quantize_, draws(4).requires_grad_(), "ternary")
    assert "did you mean 'ternary'" in message(quantize, draws(4), "ternery")
