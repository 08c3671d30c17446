"""Products in integers: exact within a block, in float32 over the blocks, and the same bits everywhere."""

from fractions import Fraction

import pytest
import torch

from mxlab import quantize
from mxlab.errors import FormatError
from mxlab.formats import MXFormat
from mxlab.numerics.kernels import native
from mxlab.packed import MXTensor, linear
from mxlab.packed.matmul import IntegerActivation, multiply, obstacle

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason="the native kernels are missing")
# Weight and activation.
PAIRS = (
    ("fp4_e2m1@32", "fp6_e2m3@32"), ("fp4_e2m1@32", "fp4_e2m1@32"), ("fp4_e2m1@32", "int8@32"),
    ("fp6_e2m3@32", "fp6_e2m3@32"), ("fp6_e2m3@32", "int8@32"), ("int8@32", "int8@32"), ("int4@32", "int8@32"),
    ("int8@32", "fp4_e2m1@32"), ("int5@16", "fp4_e2m1@16"), ("fp4_e2m1@64", "fp6_e2m3@64"), ("int8@128", "int8@128"),
    ("fp4_e2m1@8", "int6@8"), ("fp6_e2m3@96", "int8@96"), ("int3@32", "int2@32"),
    ("int4@32,scale_rule=mase_int", "int8@32,scale_rule=mase_int"),
    ("fp4_e2m1@32,scale_rule=mse", "int8@32,scale_rule=mse"),
)  # fmt: skip
NVFP4 = ("nvfp4", "nvfp4")


def operands(pair, rows, inputs, outputs, spread=4):
    g = torch.Generator().manual_seed(rows * inputs + outputs)
    x, w = torch.randn(rows, inputs, generator=g), torch.randn(outputs, inputs, generator=g)
    x *= 2.0 ** torch.randint(-spread, spread, (1, inputs), generator=g)
    w *= 2.0 ** torch.randint(-spread, spread, (outputs, 1), generator=g)
    return x, MXTensor.from_float(w, pair[0])


def by_blocks(x, weight, activation):
    """The product as it is defined: exact sums of blocks, added to a float32 in their order, rounded once each time."""
    fmt = MXFormat.parse(activation)
    a, w, size = quantize(x, fmt), weight.dequantize(), fmt.block_size
    sums = [[0.0] * w.shape[0] for _ in range(a.shape[0])]
    for start in range(0, a.shape[1], size):
        for i, row in enumerate(a[:, start : start + size].tolist()):
            for j, column in enumerate(w[:, start : start + size].tolist()):
                exact = sum((Fraction(p) * Fraction(q) for p, q in zip(row, column, strict=True)), Fraction(sums[i][j]))
                sums[i][j] = rounded_to_float32(exact)
    return torch.tensor(sums)


def rounded_to_float32(x: Fraction) -> float:
    """The nearest float32, ties to even, of a number that is neither tiny nor huge."""
    if not x:
        return 0.0
    exponent = x.numerator.bit_length() - x.denominator.bit_length() - 24
    unit = Fraction(2) ** exponent
    while abs(x) / unit >= 2**24:
        unit *= 2
    while abs(x) / unit < 2**23:
        unit /= 2
    return float(round(x / unit) * unit)  # Python rounds ties of fractions to even


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("shape", [(1, 64, 17), (5, 200, 16), (4, 33, 3)])
def test_it_is_the_product_in_rational_arithmetic(pair, shape, instruction_set):
    x, weight = operands(pair, *shape)
    assert obstacle(x, MXFormat.parse(pair[1]), weight.fmt) is None
    found = linear(x, weight, pair[1])
    assert torch.equal(found, by_blocks(x, weight, pair[1]))


@pytest.mark.parametrize("pair", [*PAIRS, NVFP4])
def test_long_rows_and_every_number_of_rows(pair, instruction_set):
    x, weight = operands(pair, 210, 3360, 37)
    found = linear(x, weight, pair[1])
    exact = quantize(x, pair[1]).double() @ weight.dequantize().double().T
    assert (found.double() - exact).abs().max() <= 1e-5 * exact.abs().max()
    for rows in (*range(1, 15), 191, 193):
        assert torch.equal(linear(x[:rows].contiguous(), weight, pair[1]), _rows(found, pair, x, rows, weight))


def _rows(found, pair, x, rows, weight):
    # NVFP4 scales a whole tensor: fewer rows are other numbers.
    return found[:rows] if pair is not NVFP4 else _float64(x[:rows], weight, pair[1], linear(x[:rows], weight, pair[1]))


def _float64(x, weight, activation, found):
    exact = quantize(x, activation).double() @ weight.dequantize().double().T
    assert (found.double() - exact).abs().max() <= 1e-5 * exact.abs().max()
    return found


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_those_of_every_instruction_set_and_number_of_threads(pair, dtype):
    x, weight = operands(pair, 50, 1600, 70)
    x, bias = x.to(dtype), torch.randn(70, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, threads, found = native.instruction_set(), torch.get_num_threads(), []
    try:
        for name in native._native.instruction_sets():
            native._native.use(name)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(linear(x, weight, pair[1], bias))
    finally:
        native._native.use(before)
        torch.set_num_threads(threads)
    assert found[0].dtype == dtype
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_is_added_in_float32_and_the_sum_rounded_once(dtype):
    x, weight = operands(PAIRS[0], 9, 64, 21)
    x = x.to(dtype)
    bias = torch.randn(21, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain = linear(x.float(), weight, "fp6_e2m3@32")
    assert torch.equal(linear(x, weight, "fp6_e2m3@32", bias), (plain + bias.float()).to(dtype))


def test_zeros_and_what_is_no_number():
    x, weight = operands(PAIRS[0], 6, 96, 20)
    x[0] = 0
    x[1, 40], x[2, 50] = torch.nan, torch.inf
    x[3, 32:64] = 0
    found = linear(x, weight, "fp6_e2m3@32")
    assert torch.equal(found[0], torch.zeros(20))
    assert found[1:3].isnan().all()
    assert torch.equal(found[3:], by_blocks(x[3:], weight, "fp6_e2m3@32"))


@pytest.mark.parametrize(("of_x", "of_weight"), [(-126, 0), (-70, -70), (100, 20), (0, 120), (-149, 100)])
def test_scales_near_the_ends_of_float32_give_what_the_values_give(of_x, of_weight):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 64, generator=g) * 2.0**of_x, torch.randn(18, 64, generator=g) * 2.0**of_weight
    weight = MXTensor.from_float(w, "fp4_e2m1@32")
    values = quantize(x, "fp6_e2m3@32") @ weight.dequantize().T
    found = linear(x, weight, "fp6_e2m3@32")
    assert torch.allclose(found, values, rtol=1e-5, atol=2.0**-140, equal_nan=True)


@pytest.mark.parametrize("activation", ["fp8_e4m3@32", "fp6_e3m2@32", "int8@16", "int8@32,rounding=dither", None])
def test_other_formats_multiply_values(activation):
    x, weight = operands(PAIRS[0], 3, 64, 5)
    torch.manual_seed(0)
    found = linear(x, weight, activation)
    torch.manual_seed(0)
    inputs = x if activation is None else quantize(x, activation)
    assert torch.equal(found, torch.nn.functional.linear(inputs, weight.dequantize()))
    if activation is not None:
        reason = obstacle(x, MXFormat.parse(activation), weight.fmt)
        assert reason
        with pytest.raises(FormatError, match="multiply the values instead"):
            IntegerActivation.from_float(x, MXFormat.parse(activation), weight.fmt)


def test_gradients_reach_the_activation():
    x, weight = operands(PAIRS[0], 3, 64, 5)
    x.requires_grad_()
    linear(x, weight, "fp6_e2m3@32").sum().backward()
    assert torch.allclose(x.grad, weight.dequantize().sum(0).expand(3, -1))


def test_shapes_that_do_not_fit():
    x, weight = operands(PAIRS[0], 3, 64, 5)
    with pytest.raises(FormatError, match=r"x is \(3, 32\) and the weight \(5, 64\) in blocks along axis 1"):
        linear(x[:, :32], weight, "fp6_e2m3@32")
    with pytest.raises(FormatError, match="in blocks along axis 0"):
        linear(x, MXTensor.from_float(torch.randn(64, 64), "fp4_e2m1@32", axis=0), "fp6_e2m3@32")


def test_memory_that_was_lent_is_used_and_one_activation_serves_many_weights():
    x, weight = operands(PAIRS[0], 40, 64, 20)
    other = MXTensor.from_float(torch.randn(7, 64), "fp4_e2m1@32")
    memory = torch.empty(40 * 64)
    fmt = MXFormat.parse("fp6_e2m3@32")
    lent = IntegerActivation.from_float(x, fmt, weight.fmt, memory)
    assert lent.memory.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
    assert torch.equal(multiply(lent, weight), linear(x, weight, fmt))
    assert torch.equal(multiply(lent, other), linear(x, other, fmt))
    for wrong in (
        MXTensor.from_float(torch.randn(7, 64), "int4@32"),
        MXTensor.from_float(torch.randn(7, 32), weight.fmt),
    ):
        with pytest.raises(FormatError, match="quantize the activation for it"):
            multiply(lent, wrong)
    small = IntegerActivation.from_float(x, fmt, weight.fmt, torch.empty(8))
    assert torch.equal(multiply(small, weight), linear(x, weight, fmt))
