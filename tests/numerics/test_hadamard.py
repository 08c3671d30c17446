"""Hadamard matrices by their definition, and the transform by them against the plain product."""

import pytest
import torch

from mxlab.errors import FormatError
from mxlab.numerics import hadamard

SIZES = [*hadamard.sizes_below(300), 576, 896, 1536, 2048, 3584]


def test_the_sizes_a_decoder_has_are_there():
    assert {32, 64, 96, 128, 576, 896, 1536, 2048, 3072, 4096, 8192, 14336}.issubset(hadamard.sizes_below(15000))
    assert not any(size % 4 for size in hadamard.sizes_below(700) if size > 2)


@pytest.mark.parametrize("size", SIZES)
def test_elements_are_of_one_magnitude_and_rows_orthogonal(size):
    matrix = hadamard.matrix(size).double() * size**0.5
    assert torch.equal(matrix.abs().round(), torch.ones_like(matrix))
    assert torch.allclose(matrix.round() @ matrix.round().t(), size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize(("size", "axis"), [(12, -1), (96, 1), (576, 1), (0, 1), (32, -2)])
def test_the_transform_is_the_product_with_the_matrix_and_can_be_undone(size, axis):
    x = torch.randn(64, 576, generator=torch.Generator().manual_seed(0))
    length = x.shape[axis]
    matrix = torch.block_diag(*[hadamard.matrix(size or length)] * (length // (size or length)))
    y = hadamard.transform(x, size, axis)
    expected = x @ matrix.t() if axis != -2 else matrix @ x
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.allclose(hadamard.transform(y, size, axis, inverse=True), x, atol=1e-5)


@pytest.mark.parametrize(("size", "length"), [(32, 48), (6, 36), (0, 172), (92, 92)])
def test_a_size_that_does_not_fit_is_named_with_those_that_do(size, length):
    with pytest.raises(FormatError, match=r"no Hadamard transform of size .* sizes that do are 2, 4"):
        hadamard.transform(torch.ones(2, length), size)
