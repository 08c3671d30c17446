"""Transforms by matrices: their bits by sums in order, and that quantizing in the same pass changes none."""

from itertools import product

import pytest
import torch

from mxlab import quantize
from mxlab.errors import FormatError
from mxlab.formats import MXFormat
from mxlab.numerics import hadamard, operators
from mxlab.numerics.kernels import native
from mxlab.numerics.transforms import transform, transform_quantize

from support.bits import same
from support.kernels import every_way, threads
from support.strategies import DTYPES

FORMATS = [
    ("fp4_e2m1@32,scale_rule=even,rounding=even", "exact"),
    ("nvfp4", "exact"),
    ("int4@0,scale_rule=mase_int", "exact"),
    ("fp6_e3m2@100,scale_rule=mse", "exact"),
    ("fp8_e4m3@16,rounding=dither", "exact"),
    ("fp4_e2m1@16,scale_rule=quest", "exact"),  # has no kernels
    ("int8@32", "microxcaling"),
    ("integer,width=8,frac=4", "exact"),
]


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matrices(size, blocks=0, seed=1):
    return numbers(*((blocks,) if blocks else ()), size, size, seed=seed) / size**0.5


def by_sums_in_order(x, given):
    """Add up products in float32, each rounded, in the order of the index."""
    blocks = x.float().unflatten(-1, (-1, given.shape[-1]))
    total = torch.zeros_like(blocks)
    for j in range(given.shape[-1]):
        total = total + blocks[..., j, None] * given[..., j, :]
    return total.flatten(-2).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [2, 12, 16, 20, 32, 60, 64, 128])
@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.skipif(native.MISSING is not None, reason="no native kernels")
def test_sums_are_added_up_in_order_by_every_instruction_set_and_number_of_threads(dtype, size, is_shared):
    for rows in (1, 7, 301):
        x, given = numbers(rows, 3 * size, dtype=dtype), matrices(size, 0 if is_shared else 3)
        expected = by_sums_in_order(x, given)
        for _ in every_way():
            same(transform(x, given), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("text", "numerics"), FORMATS)
@pytest.mark.parametrize("size", [12, 32, 128])
def test_quantizing_in_the_same_pass_changes_no_bit(size, text, numerics, dtype):
    for rows, blocks in ((1, 0), (130, 0), (130, 4)):
        x, given = numbers(rows, 4 * size, dtype=dtype), matrices(size, blocks)
        for _ in every_way():
            expected = quantize(transform(x, given), text, numerics=numerics, seed=3)
            same(transform_quantize(x, given, text, numerics=numerics, seed=3), expected)
            out = torch.empty_like(x)
            assert transform_quantize(x, given, text, numerics=numerics, seed=3, out=out) is out
            same(out, expected)
            x_itself = x.clone()
            same(transform_quantize(x_itself, given, text, numerics=numerics, seed=3, out=x_itself), expected)


VIEWS = {
    "permuted": lambda x: x.view(5, 8, 3, 64).permute(0, 2, 1, 3),
    "transposed": lambda x: x.view(64, 120).T,
    "strided": lambda x: x[::2],
    "slice of rows": lambda x: x[:, 32:],
    "expanded": lambda x: x[:1].expand(7, 192),
    "one row": lambda x: x[0],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("rounding", ["even", "dither"])
def test_any_layout(view, rounding):
    x, given = VIEWS[view](numbers(40, 192)), matrices(32)
    fmt = MXFormat("fp4_e2m1", rounding=rounding)
    same(transform(x, given), transform(x.contiguous(), given))
    assert transform(x, given).stride() == torch.empty_like(x).stride()
    expected = quantize(transform(x.contiguous(), given), fmt, seed=1)
    same(transform_quantize(x, given, fmt, seed=1), expected)
    same(transform_quantize(x, given, fmt, seed=1, out=torch.empty(x.shape)), expected)


@pytest.mark.parametrize("size", [32, 160])
def test_torch_multiplies_where_there_are_no_kernels_and_by_large_matrices(monkeypatch, size):
    for blocks in (0, 2):
        x, given = numbers(3, 5, 2 * size), matrices(size, blocks)
        natively = transform(x, given)
        with monkeypatch.context() as patch:
            patch.setattr(operators, "choose", lambda *_: "reference")
            assert torch.allclose(transform(x, given), natively, atol=1e-5)
            same(transform_quantize(x, given, "fp4@32"), quantize(transform(x, given), "fp4@32"))
        assert torch.allclose(natively, by_sums_in_order(x, given), atol=1e-5)


@pytest.mark.parametrize("fmt", [None, "fp4@32"])
def test_the_gradient_is_that_of_the_product(fmt):
    x, given = numbers(4, 96).requires_grad_(), matrices(32, 3)
    y = x.detach().clone().requires_grad_()
    expected = torch.einsum("...bj,bjk->...bk", y.unflatten(-1, (3, 32)), given).flatten(-2)
    found = transform(x, given) if fmt is None else transform_quantize(x, given, fmt)
    found.mul(numbers(4, 96, seed=2)).sum().backward()
    expected.mul(numbers(4, 96, seed=2)).sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-6)


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("is_learned_alone", [True, False])
def test_the_matrices_have_a_gradient_too(is_shared, is_learned_alone):
    x, given = numbers(2, 5, 96), matrices(32, 0 if is_shared else 3).requires_grad_()
    x.requires_grad_(not is_learned_alone)
    weights = numbers(2, 5, 96, seed=2)
    (transform(x, given) * weights).sum().backward()
    alike = given.detach().clone().requires_grad_()
    blocks = x.detach().unflatten(-1, (3, 32)).unsqueeze(-2)
    ((blocks @ alike).flatten(-3) * weights).sum().backward()
    assert torch.allclose(given.grad, alike.grad, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function:DeprecationWarning")  # torch's own tracing
@pytest.mark.parametrize("is_training", [False, True])
def test_compiled_code_has_the_operators_in_one_graph(is_training):
    fmt = MXFormat.parse("fp4@32")

    def f(x):
        first = hadamard.transform_quantize(x + 1, 32, fmt)
        return hadamard.transform(first, 64, inverse=True) * 2

    x = numbers(4, 64).requires_grad_(is_training)
    same(torch.compile(f, fullgraph=True, backend="aot_eager")(x).detach(), f(x).detach())


def test_meta_tensors():
    x = torch.empty(4, 64, device="meta")
    given = torch.empty(32, 32, device="meta")
    assert transform(x, given).device.type == "meta"
    assert transform_quantize(x, given, "fp4@32").shape == (4, 64)
    assert transform_quantize(x, given, "fp4@32", out=x) is x


def test_into_another_tensor_counts_as_a_change_and_refuses_a_gradient():
    x, out = numbers(4, 64), torch.empty(4, 64)
    version = out._version
    transform_quantize(x, matrices(32), "fp4@32", out=out)
    assert out._version > version
    with pytest.raises(FormatError, match="out is"):
        transform_quantize(x, matrices(32), "fp4@32", out=torch.empty(4, 32))
    with pytest.raises(FormatError, match="no_grad"):
        transform_quantize(x.requires_grad_(), matrices(32), "fp4@32", out=out)


@pytest.mark.parametrize("shape", [(48, 48), (32,), (32, 64), (3, 32, 32), (0, 0)])
def test_matrices_that_do_not_fit(shape):
    with pytest.raises(FormatError, match=r"matrices are .* blocks of an axis of 64 take float32"):
        transform(numbers(2, 64), torch.ones(shape))
    with pytest.raises(FormatError, match=r"matrices are torch\.float64"):
        transform_quantize(numbers(2, 64), matrices(32).double(), "fp4@32")


@pytest.mark.parametrize(("size", "axis"), list(product([32, 64, 0], [-1, 0])))
def test_the_hadamard_transform_quantized_is_the_transform_and_then_quantize(size, axis):
    x = numbers(192, 192)
    expected = quantize(hadamard.transform(x, size, axis), "fp4@32", axis=axis)
    same(hadamard.transform_quantize(x, size, MXFormat.parse("fp4@32"), axis), expected)


def test_many_rows():
    x, given = numbers(5000, 64), matrices(64)
    with threads(2):
        same(transform_quantize(x, given, "fp4@32"), quantize(by_sums_in_order(x, given), "fp4@32"))
