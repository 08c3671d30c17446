"""What holds for every format, rounding and input of the ``exact`` numerics; and the gradient of both numerics."""

import dataclasses
import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mxlab.formats import NUMERICS, ROUNDINGS, MXFormat, element
from mxlab.formats.scales import SCALE_RULES
from mxlab.numerics import philox, quantize, round_elementwise

from support.bits import same
from support.strategies import (
    DTYPES,
    EVERY_NAME,
    NUMERICS_ROUNDINGS,
    deterministic,
    dtypes,
    float_scaled,
    formats,
    full_range,
    moderate,
    refused,
    tensors,
)

SHARED = [rule for rule in SCALE_RULES if rule != "none"]


# Values


@given(tensors(), formats(rules=("floor", "ceil", "even", "rceil", "none")))
def test_idempotent(x, fmt):
    once = quantize(x, fmt, seed=1)
    same(quantize(once, fmt, seed=2), once)


@given(tensors(elements=moderate), formats(deterministic, rules=("mse",)))
def test_idempotent_where_squared_errors_are_float32_numbers(x, fmt):
    once = quantize(x, fmt)
    same(quantize(once, fmt), once)


@given(tensors(), st.one_of(formats(rules=[r for r in SCALE_RULES if r != "mase_int"]), float_scaled()))
def test_symmetric(x, fmt):
    same(quantize(-x, fmt, seed=1), -quantize(x, fmt, seed=1) + 0.0)


@given(
    tensors(dims=(1, 1), side=24),
    st.one_of(
        formats(deterministic, [r for r in SCALE_RULES if r != "none"], block_size=0),
        float_scaled(deterministic).map(lambda fmt: dataclasses.replace(fmt, block_size=0)),
    ),
)
def test_monotonic_inside_a_block(x, fmt):
    result = quantize(x.sort().values, fmt)
    if not result.isnan().any():
        assert (result.diff() >= 0).all()


@given(tensors(elements=moderate), full_range(), st.integers(-8, 5))
def test_equivariant_under_powers_of_two(x, fmt, k):
    x = x.float()
    if element(fmt.element).emax > 20:
        k = 0  # the scale of bf16 and of wide parametric elements is near its limit already
    same(quantize(x * 2.0**k, fmt, seed=1), quantize(x, fmt, seed=1) * 2.0**k)


@given(tensors(), formats())
def test_a_result_is_a_code_times_the_scale(x, fmt):
    result = quantize(x, fmt, seed=1).float()
    codes = torch.tensor(element(fmt.element).magnitudes(), dtype=torch.float64)
    for value in result[result.isfinite()].abs().double().unique():
        # Some power of two takes it to a code: compare odd parts.
        odd = {math.frexp(c)[0] for c in codes.tolist()}
        assert math.frexp(value.item())[0] in odd


@given(tensors(), st.one_of(formats(), float_scaled()))
def test_zero_is_positive(x, fmt):
    result = quantize(x, fmt, seed=1)
    assert not result[result == 0].signbit().any()
    for subnormals in (True, False):
        elementwise = round_elementwise(x, fp=7, rounding=fmt.rounding, subnormals=subnormals, seed=1)
        assert not elementwise[elementwise == 0].signbit().any()


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", EVERY_NAME)
def test_every_code_is_a_fixed_point(name, rounding):
    facts = element(name)
    codes = torch.tensor(facts.magnitudes(), dtype=torch.float64)
    codes = torch.cat([codes.flip(0), -codes[1:]])  # the largest first
    exponents = [0] if name in ("fp16", "bf16") else [0, -1, 7, -30]
    exponents += [127 - facts.emax, -127]  # both ends of the scale
    for exponent, dtype in product(exponents, DTYPES):
        x = (codes * 2.0**exponent).to(dtype)
        fits = x.double() == codes * 2.0**exponent
        if fits[0]:  # the largest code is there and holds the scale
            x = x[fits]
            same(quantize(x, MXFormat(name, 0, rounding=rounding), seed=3), x)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("name", EVERY_NAME)
def test_every_code_is_a_fixed_point_of_dither_whatever_is_drawn(name, u, monkeypatch):
    monkeypatch.setattr(philox, "uniform", lambda shape, seed, device: torch.full(shape, u))
    codes = torch.tensor(element(name).magnitudes())
    same(quantize(codes, MXFormat(name, 0, rounding="dither"), backend="reference"), codes)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("bits", [*range(10, 32), -7, -8, -16, -29])
def test_every_element_wise_value_is_a_fixed_point(bits, rounding):
    width = {"bfloat": bits} if bits > 0 else {"fp": -bits}
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 2**32, 5000, dtype=np.uint32).view(np.float32))
    once = round_elementwise(x, **width, rounding="floor")
    same(round_elementwise(once, **width, rounding=rounding, seed=3), once)


# Blocks


@given(tensors(dims=(2, 3)), st.one_of(formats(deterministic), float_scaled(deterministic)), st.data())
def test_an_axis_is_the_last_axis_of_the_transposed_tensor(x, fmt, data):
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    expected = quantize(x.movedim(axis, -1).contiguous(), fmt).movedim(-1, axis)
    same(quantize(x, fmt, axis=axis), expected)
    same(quantize(x, fmt, axis=[axis]), expected)


@given(tensors(dims=(2, 3)), formats(), st.sampled_from(NUMERICS), st.data())
def test_the_layout_in_memory_does_not_matter(x, fmt, numerics, data):
    assume(not refused(x, fmt, numerics))
    axes = data.draw(st.lists(st.integers(0, x.ndim - 1), min_size=1, unique=True))
    kwargs = {"axis": axes, "numerics": numerics, "seed": 5}
    expected = quantize(x, fmt, **kwargs)
    strided = torch.stack([x, torch.full_like(x, math.nan)], -1).flatten(-2)[..., ::2]
    same(quantize(strided, fmt, **kwargs), expected)
    transposed = x.transpose(0, -1).contiguous().transpose(0, -1)
    same(quantize(transposed, fmt, **kwargs), expected)
    elementwise = {"fp": 9, "rounding": fmt.rounding, "numerics": numerics, "seed": 5}
    same(round_elementwise(transposed, **elementwise), round_elementwise(x, **elementwise))


def test_an_expanded_tensor_is_like_its_copy():
    x = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).expand(3, 40)
    same(quantize(x, "fp4@16"), quantize(x.clone(), "fp4@16"))


@given(tensors(dims=(1, 2), side=20), st.one_of(formats(deterministic), float_scaled(deterministic)))
def test_a_partial_block_is_a_block_padded_with_zeros(x, fmt):
    missing = -x.shape[-1] % fmt.block_size if fmt.block_size else 3
    padded = torch.nn.functional.pad(x, (0, missing))
    same(quantize(x, fmt), quantize(padded, fmt)[..., : x.shape[-1]])


@given(tensors(dims=(1, 2), side=20), st.one_of(formats(deterministic, SHARED), float_scaled(deterministic, ["e5m3"])))
def test_each_block_is_on_its_own(x, fmt):
    """Neither padding nor a neighbour, nor the row before, leaks into a block."""
    whole = dataclasses.replace(fmt, block_size=0)
    size = fmt.block_size or x.shape[-1]
    rows = [[quantize(part, whole) for part in row.split(size)] for row in x.reshape(-1, x.shape[-1])]
    same(quantize(x, fmt), torch.stack([torch.cat(row) for row in rows]).reshape(x.shape))


@given(
    tensors(dims=(2, 3), side=7),
    st.one_of(formats(deterministic, SHARED), float_scaled(deterministic, ["e5m3"])),
    st.data(),
)
def test_several_axes_form_joint_tiles(x, fmt, data):
    axes = data.draw(st.lists(st.integers(0, x.ndim - 1), min_size=2, max_size=x.ndim, unique=True))
    whole = dataclasses.replace(fmt, block_size=0)
    cuts = []
    for axis, length in enumerate(x.shape):
        size = (fmt.block_size or length) if axis in axes else 1
        cuts.append([slice(i, i + size) for i in range(0, length, size)])
    expected = torch.empty_like(x)
    for tile in product(*cuts):
        expected[tile] = quantize(x[tile].flatten(), whole).reshape(x[tile].shape)
    same(quantize(x, fmt, axis=axes), expected)
    same(quantize(x, fmt, axis=[a - x.ndim for a in reversed(axes)]), expected)


@given(tensors(), formats(scale_rule="none"), st.integers(0, 9))
def test_without_a_shared_scale_each_element_is_a_block(x, fmt, block_size):
    alone = MXFormat(fmt.element, 1, "e8m0", fmt.scale_bits, "floor", fmt.rounding, fmt.flush_fp32_subnorms)
    same(quantize(x, fmt, seed=1), quantize(x, alone, seed=1))


@given(
    tensors(dims=(1, 2), side=20, elements=moderate),
    st.one_of(full_range(rules=("floor", "even", "mse")), float_scaled(scales=["e5m3"])),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.data(),
)
def test_nan_and_infinity_poison_exactly_their_block(x, fmt, poison, data):
    clean = quantize(x, fmt, seed=1)
    assert clean.isfinite().all()
    where = data.draw(st.tuples(*(st.integers(0, n - 1) for n in x.shape)))
    x[where] = poison
    size = fmt.block_size or x.shape[-1]
    start = where[-1] // size * size
    clean[(*where[:-1], slice(start, start + size))] = math.nan
    same(quantize(x, fmt, seed=1), clean)


@given(formats(flush_fp32_subnorms=False), st.integers(-127, 127), dtypes)
def test_a_scale_too_large_is_nan_and_one_too_small_is_raised(fmt, exponent, dtype):
    top = element(fmt.element).emax
    x = torch.full((3,), 2.0).pow(torch.tensor(float(exponent))).to(dtype)
    wanted = exponent - top
    result = quantize(x, MXFormat(fmt.element, 3, scale_bits=fmt.scale_bits))
    if not x.isfinite().all() or wanted > fmt.scale_emax:
        assert result.isnan().all()
    elif (x != 0).all() and wanted >= -fmt.scale_emax:
        same(result, x)
    else:
        assert ((result == x) | (result.abs() <= x.abs() * 2)).all()


def test_clamped_scales_keep_the_subnormals_of_the_element():
    # L = 1: the scale cannot go below 1/2, so the grid of FP4 stays 1/4.
    x = torch.tensor([0.3, 0.2, 0.125, 0.12, -0.1])
    expected = torch.tensor([0.25, 0.25, 0.25, 0.0, 0.0])
    same(quantize(x, MXFormat("fp4", 0, scale_bits=2)), expected)


def test_flush():
    below, at = 2.0**-126 - 2.0**-149, 2.0**-126
    x = torch.tensor([[below, -below / 2], [at, -below / 2]])
    kept = quantize(x, MXFormat("fp8_e5m2", 0))
    flushed = quantize(x, MXFormat("fp8_e5m2", 0, flush_fp32_subnorms=True))
    assert (kept[0] != 0).all()
    assert (flushed[0] == 0).all()
    same(flushed[1], kept[1])
    assert flushed[1, 0] == at


# Gradients


@pytest.mark.parametrize(("numerics", "rounding"), NUMERICS_ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_passes_straight_through(numerics, rounding, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 40, generator=generator)
    x[1, 3], x[2, 3], x[3] = math.nan, math.inf, 0.0
    x[4] *= 2.0**-140
    upstream = torch.randn(5, 40, generator=generator).to(dtype)
    upstream[0, 0], upstream[1, 1] = math.inf, -0.0
    functions = [
        lambda t: quantize(t, MXFormat("fp4", 16, rounding=rounding), numerics=numerics),
        lambda t: quantize(t, MXFormat("int8", 16, rounding=rounding, scale_bits=2), axis=(0, 1), numerics=numerics),
        lambda t: round_elementwise(t, bfloat=12, rounding=rounding, numerics=numerics),
        lambda t: round_elementwise(t, fp=8, rounding=rounding, subnormals=False, numerics=numerics),
        lambda t: round_elementwise(t, bfloat=32, rounding=rounding, numerics=numerics),
    ]
    for function in functions:
        leaf = x.to(dtype, copy=True).requires_grad_()
        result = function(leaf)
        assert result.requires_grad
        result.backward(upstream)
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, upstream)
        assert not function(leaf.detach()).requires_grad
        with torch.no_grad():
            assert not function(leaf).requires_grad


def test_the_result_is_the_same_with_and_without_a_gradient():
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    same(quantize(x.clone().requires_grad_(), "fp4@32").detach(), quantize(x, "fp4@32"))


# Dither


@pytest.mark.parametrize("name", ["fp4_e2m1", "fp8_e4m3", "int8", "int2", "fp6_e3m2"])
def test_dither_is_unbiased(name):
    """A point p of the way from one code to the next goes up with probability p."""
    magnitudes = element(name).magnitudes()
    low, high = magnitudes[len(magnitudes) // 2 - 1 :][:2]
    count = 20_000
    for p in (0.1, 0.5, 0.75):
        x = torch.full((count, 2), low + p * (high - low))
        x[:, 1] = element(name).max
        result = quantize(x, MXFormat(name, 2, rounding="dither"), seed=17)[:, 0]
        assert ((result == low) | (result == high)).all()
        up = (result == high).double().mean().item()
        assert abs(up - p) < 5 * math.sqrt(p * (1 - p) / count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numerics", NUMERICS)
def test_dither_goes_to_a_neighbour(numerics, dtype):
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    down = quantize(x, "int4@32,rounding=floor", numerics=numerics).float()
    result = quantize(x, "int4@32,rounding=dither", numerics=numerics, seed=0).float()
    scale = x.float().abs().amax(-1, keepdim=True).log2().floor().exp2()
    steps = (result.abs() - down.abs()) / scale / 2.0**-2
    assert set(steps.flatten().tolist()) == {0.0, 1.0}


@given(tensors(), formats(rounding=st.just("dither")), st.sampled_from(NUMERICS), st.integers(0, 2**64 - 1))
def test_dither_is_reproducible(x, fmt, numerics, seed):
    assume(not refused(x, fmt, numerics))
    same(quantize(x, fmt, numerics=numerics, seed=seed), quantize(x, fmt, numerics=numerics, seed=seed))


@pytest.mark.parametrize("numerics", NUMERICS)
def test_dither_draws_its_seed_from_torch(numerics):
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))

    def draw():
        return (
            quantize(x, "fp4@32,rounding=dither", numerics=numerics),
            round_elementwise(x, bfloat=10, rounding="dither", numerics=numerics),
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first, second = draw(), draw()
        torch.manual_seed(1)
        again = draw()
        torch.manual_seed(2)
        other = draw()
    for a, b, c, d in zip(first, second, again, other, strict=True):
        same(a, c)
        assert not torch.equal(a, b)
        assert not torch.equal(a, d)


def test_only_dither_looks_at_the_seed():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        for rounding in ("nearest", "even", "floor"):
            fmt = MXFormat("fp4", rounding=rounding)
            same(quantize(x, fmt, seed=1), quantize(x, fmt, seed=2))
            same(quantize(x, fmt), quantize(x, fmt, seed=2))
            round_elementwise(x, bfloat=10, rounding=rounding)
        quantize(x, "fp4@32,rounding=dither", seed=3)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("numerics", NUMERICS)
def test_dither_depends_on_the_index_alone(numerics):
    """How blocks are cut, and which rows come after, change nothing where the scale stays."""
    x = torch.full((6, 8), 1.3)  # between two codes of int4, in blocks of any cut
    fmt = MXFormat("int4", 4, rounding="dither")
    first = quantize(x, fmt, numerics=numerics, seed=9)
    assert set(first.flatten().tolist()) == {1.25, 1.5}
    same(quantize(x[:2], fmt, numerics=numerics, seed=9), first[:2])
    for block_size, axis in product((0, 1, 3, 5, 8), (-1, 0, (0, 1))):
        other = MXFormat("int4", block_size, rounding="dither")
        same(quantize(x, other, axis=axis, numerics=numerics, seed=9), first)
    same(quantize(x.flatten(), fmt, numerics=numerics, seed=9), first.flatten())
    assert not torch.equal(quantize(x, fmt, numerics=numerics, seed=10), first)
    assert not torch.equal(quantize(x, fmt, numerics=numerics, seed=9 + 2**32), first)
