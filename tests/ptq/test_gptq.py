"""GPTQ against least squares, input by input, and the correction against the solution in one step."""

import logging

import pytest
import torch

from mxlab import quantize
from mxlab.errors import ConversionError, SpecError
from mxlab.formats import ELEMENTS, MXFormat
from mxlab.numerics.kernels import native
from mxlab.ptq.calibration import sample
from mxlab.ptq.correction import correct
from mxlab.ptq.factor import factorized, inverse_factor
from mxlab.ptq.gptq import gptq, settle_in_torch
from mxlab.ptq.scales import block_scales, rounded
from mxlab.ptq.statistics import InputStatistics, input_statistics
from mxlab.recipe.algorithms import Calibration

from support.bits import same
from support.kernels import every_way

FP4 = MXFormat.parse("fp4_e2m1@32,scale_rule=even,rounding=even")
FORMATS = ["fp4_e2m1@32,scale_rule=even", "int4@32,scale_rule=mase_int", "fp6_e2m3@16", "nvfp4", "fp4@16,scale=e5m3"]


def toy(inputs=64, outputs=8, rows=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + torch.eye(inputs)
    return torch.randn(outputs, inputs, generator=generator), torch.randn(rows, inputs, generator=generator) @ mix


def by_least_squares(weight, x, scales, fmt, damping, order):
    """Fix one weight after the other; the others then minimise the error of the output, damped, in float64."""
    gram = (x.t() @ x).double()
    gram += damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    w, places = weight.double().clone(), list(order)
    for i, place in enumerate(places):
        fixed = rounded(w[:, place].float(), scales[:, place], fmt).double()
        error, later = w[:, place] - fixed, places[i + 1 :]
        w[:, place] = fixed
        if later:
            # What is added to the later weights minimises |(error e_place - change) X|^2.
            w[:, later] += torch.outer(error, torch.linalg.solve(gram[later][:, later], gram[later, place]))
    return w.float()


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("order", ["index", "activation"])
def test_the_loop_is_sequential_least_squares(text, order):
    fmt = MXFormat.parse(text)
    weight, x = toy()
    gram = x.t() @ x
    scales = block_scales(weight, fmt, gram.diagonal(), (0,))
    places = torch.argsort(gram.diagonal(), descending=True, stable=True) if order == "activation" else range(64)
    expected = by_least_squares(weight, x, scales, fmt, 0.01, [int(p) for p in places])
    found = gptq(weight, factorized(gram, 0.01, order), scales, fmt)
    assert (found != expected).float().mean() < 0.01  # float32 may decide a tie otherwise, and all behind it


@pytest.mark.parametrize("text", FORMATS)
def test_it_loses_less_of_the_output_than_rounding_to_nearest_and_stays_on_the_grid(text):
    fmt = MXFormat.parse(text)
    weight, x = toy(inputs=160, outputs=24, rows=600)
    gram = x.t() @ x
    scales = block_scales(weight, fmt, gram.diagonal(), (0,))
    found = gptq(weight, factorized(gram, 0.01, "activation"), scales, fmt)
    assert torch.equal(rounded(found, scales, fmt), found)
    lost = [(x @ (q - weight).t()).square().sum() for q in (found, quantize(weight, fmt))]
    assert lost[0] < 0.7 * lost[1]


KERNELS = [
    *(
        f"{name}@32,rounding={rounding}"
        for name in ELEMENTS
        for rounding in ("nearest", "nearest_zero", "even", "floor")
    ),
    *FORMATS,
    "int8@32,scale_rule=mase_int",
]


@pytest.mark.parametrize("text", KERNELS)
def test_the_kernel_has_the_bits_of_the_loop_in_torch(text):
    fmt = MXFormat.parse(text)
    for inputs, outputs in ((128, 576), (37, 71), (1, 3)):
        weight, x = toy(inputs, outputs, rows=2 * inputs, seed=inputs)
        scales = block_scales(weight, fmt, torch.ones(inputs), (-1, 0)).t().contiguous()
        factors = inverse_factor(x.t() @ x, 0.01).t().contiguous()
        given = weight.t().contiguous() * 1.5  # beyond the largest element, too
        expected = given.clone()
        errors = settle_in_torch(expected, scales, factors, fmt)
        for _ in every_way():
            found = given.clone()
            same(native.settle(found, scales, factors, fmt), errors)
            same(found, expected)


@pytest.mark.skipif(native.MISSING is not None, reason="no native kernels")
def test_the_kernel_makes_no_number_of_what_is_not_finite():
    weight = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0]])
    errors = native.settle(weight, torch.ones(1, 4), torch.ones(1, 1), FP4)
    assert weight.isnan().tolist() == errors.isnan().tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("text", ["fp4_e2m1@32,scale_rule=quest", "fp4_e2m1@32"])
def test_formats_without_kernels_and_machines_without_them_take_the_loop_in_torch(monkeypatch, text):
    fmt = MXFormat.parse(text)
    weight, x = toy(inputs=160)
    factor, scales = factorized(x.t() @ x, 0.01, "activation"), block_scales(weight, fmt, x.square().sum(0), (0,))
    expected = gptq(weight, factor, scales, fmt)
    monkeypatch.setattr("mxlab.numerics.operators.choose", lambda *_: "reference")
    same(gptq(weight, factor, scales, fmt), expected)


def test_scales_that_are_searched_leave_a_smaller_error():
    weight, x = toy(inputs=128, outputs=64)
    importance = x.square().sum(0)
    errors = [
        (importance * (weight - rounded(weight, block_scales(weight, FP4, importance, of), FP4)).square()).sum()
        for of in ((0,), (-1, 0, 1))
    ]
    assert errors[1] < errors[0]


def test_the_scales_of_the_rule_are_those_of_quantize():
    weight, _ = toy(inputs=128)
    for text in FORMATS:
        fmt = MXFormat.parse(text)
        same = rounded(weight, block_scales(weight, fmt, torch.ones(128), (0,)), fmt) == quantize(weight, fmt)
        assert same.float().mean() > 0.99  # NVFP4 multiplies by inverses, which may decide a tie otherwise


def test_the_correction_aims_at_the_output_of_the_unquantized_model():
    weight, x = toy()
    seen = quantize(x, FP4)
    statistics = InputStatistics(seen.t() @ seen, x.t() @ seen, seen, x)
    aimed = correct(weight, statistics, statistics.factor(1e-6, "activation"))
    expected = torch.linalg.lstsq(seen.double(), (x @ weight.t()).double()).solution.t().float()
    assert torch.allclose(aimed, expected, atol=1e-2)
    lost = [(seen @ w.t() - x @ weight.t()).square().sum() for w in (aimed, weight)]
    assert lost[0] < lost[1]


def test_an_input_that_is_always_zero_and_one_that_repeats_another(caplog):
    weight, x = toy()
    x[:, 3], x[:, 5] = 0, x[:, 4]
    gram = x.t() @ x
    found = gptq(weight, factorized(gram, 0.01, "activation"), block_scales(weight, FP4, gram.diagonal(), (0,)), FP4)
    assert found.isfinite().all()
    with caplog.at_level(logging.WARNING, "mxlab"):
        inverse_factor(x[:5].t() @ x[:5] - torch.eye(64), 1e-5)
    assert "damping is raised" in caplog.text


@pytest.mark.parametrize("order", ["index", "activation"])
def test_the_factor_is_that_of_the_inverse_and_made_once(order):
    _, x = toy()
    gram = x.t() @ x
    statistics = InputStatistics(gram, gram, x, x)
    factor = statistics.factor(0.01, order)
    assert statistics.factor(0.01, order) is factor
    assert torch.equal(factor.upper, factor.upper.triu())
    damped = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    assert torch.allclose(factor.divided(x).double() @ damped, x.double(), atol=1e-4)


def test_moments_that_cannot_be_repaired():
    with pytest.raises(ConversionError, match="not positive definite"):
        inverse_factor(torch.full((4, 4), torch.nan), 0.01)


def test_windows_are_drawn_by_the_seed_without_overlap():
    ids = torch.arange(1000)
    drawn = [sample(ids, Calibration(samples=6, length=100, held_out=2, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0].ids, drawn[1].ids)
    assert not torch.equal(drawn[0].ids, drawn[2].ids)
    assert len(drawn[0].ids.unique()) == 800
    assert drawn[0].ids.shape == (6 + drawn[0].held_out, 100)


def test_a_text_that_is_too_short():
    with pytest.raises(SpecError, match="has 999 tokens, 9 windows of 100: for 8 windows and 2 held out it takes 10"):
        sample(torch.arange(999), Calibration(samples=8, length=100))


def test_tokens_count_alike_whatever_their_size():
    x, y = (torch.randn(4, 25, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    sizes = torch.logspace(-1, 3, 100)[torch.randperm(100, generator=torch.Generator().manual_seed(2))].view(4, 25, 1)
    plain, scaled = (input_statistics(a, b, 0.25, "layer") for a, b in ((x, y), (x * sizes, y * sizes)))
    for name in ("gram", "cross", "held_out", "held_out_original"):
        was, now = (getattr(found, name) for found in (plain, scaled))
        assert torch.allclose(was / was.norm(), now / now.norm(), atol=1e-5)
    assert len(plain.held_out) == len(plain.held_out_original) == 25


def test_rows_of_zeros_and_rows_that_are_nearly_zero_stay_finite():
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    x[0, :5], x[1, 0] = 0, 1e-38
    found = input_statistics(x, torch.ones(2, 8, 16), 0.5, "layer")
    assert torch.isfinite(found.cross).all()
    assert torch.isfinite(input_statistics(torch.zeros(2, 8, 16), x, 0.5, "layer").gram).all()


@pytest.mark.parametrize("fmt", ["nvfp4", "fp4_e2m1@16,scale=e5m3", "int4@16,scale=e4m3"])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_scales_that_are_searched_are_numbers_of_their_format(fmt, size):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-4, 4, 64)[:, None] * size
    fmt = MXFormat.parse(fmt)
    scales = block_scales(weight, fmt, torch.ones(128), (-1, 0, 1))
    largest = fmt.element_format.max * fmt.scale_grid.max
    unit = weight.abs().max() / largest if fmt.scale_format.tensor_bits else torch.tensor(1.0)
    numbers = torch.tensor(fmt.scale_grid.magnitudes())
    numbers = numbers[numbers > 0]
    nearest = numbers[(scales / unit).flatten()[:, None].sub(numbers).abs().argmin(-1)].view_as(scales) * unit
    assert torch.allclose(scales, nearest, rtol=1e-5, atol=0)


def test_the_largest_of_a_block_becomes_four_where_that_is_nearer():
    weight = torch.tensor([[6.0, 5.0, 5.0, 5.0] * 4])  # 6 and 4 of scale 1; 4 and 3 of scale 3/2: 6 and 4.5
    fmt = MXFormat.parse("fp4_e2m1@16,scale=e5m3")
    assert (block_scales(weight, fmt, torch.ones(16), (-1, 0, 1)) == 1.5).all()
    assert (block_scales(weight, fmt, torch.ones(16), (0,)) == 1).all()


def test_a_block_whose_inputs_are_zero_keeps_the_scale_of_the_rule():
    weight, fmt = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), MXFormat.parse("fp4_e2m1@16")
    importance = torch.ones(32)
    importance[:16] = 0
    scales = block_scales(weight, fmt, importance, [-1, 0, 1])
    assert torch.equal(scales[:, :16], block_scales(weight, fmt, torch.ones(32), [0])[:, :16])
