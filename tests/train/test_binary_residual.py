"""Residual binarization with learnable means: begins as the format, then learns."""

import pytest
import torch

from mxlab.errors import FormatError
from mxlab.numerics import quantize
from mxlab.train.binary_residual import BinaryResidual


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("axis", [-1, 0, (0, 1)])
def test_it_begins_as_the_format(levels, axis):
    w = weight(24, 40)
    module = BinaryResidual.from_data(w, levels, axis)
    expected = quantize(w, f"binary_residual,levels={levels}", axis=axis)
    torch.testing.assert_close(module(w).detach(), expected, rtol=1e-6, atol=1e-6)
    assert module.means.shape == (levels, *w.mean(axis, keepdim=True).shape)


def test_the_result_has_two_to_the_levels_values_for_each_channel():
    w = weight(6, 200)
    y = BinaryResidual.from_data(w, 3)(w)
    assert [len(row.unique()) for row in y] == [8] * 6


def test_gradients():
    w = weight(4, 10).requires_grad_()
    module = BinaryResidual.from_data(w, 2)
    upstream = weight(4, 10) * 2
    module(w).backward(upstream)
    assert torch.equal(w.grad, upstream)
    signs = torch.where(w.detach() >= 0, 1.0, -1.0)
    expected = (upstream * signs).sum(-1, keepdim=True)
    torch.testing.assert_close(module.means.grad[0], expected)
    rest = w.detach() - module.means[0].detach() * signs
    torch.testing.assert_close(
        module.means.grad[1], (upstream * torch.where(rest >= 0, 1.0, -1.0)).sum(-1, keepdim=True)
    )


def test_means_learn_what_fits_best():
    w = weight(8, 64)
    wrong = BinaryResidual.from_data(w, 2)
    with torch.no_grad():
        wrong.means.mul_(0.3)
    optimizer = torch.optim.SGD(wrong.parameters(), lr=0.05)
    before = (wrong(w) - w).square().mean().item()
    for _ in range(60):
        optimizer.zero_grad()
        (wrong(w) - w).square().sum(-1).mean().backward()
        optimizer.step()
    after = (wrong(w) - w).square().mean().item()
    assert after < 0.5 * before


def test_one_mean_for_activations_of_any_number_of_tokens():
    module = BinaryResidual.from_data(weight(2, 5, 16), 2, range(3))
    assert module.means.shape == (2, 1, 1, 1)
    for shape in [(1, 1, 16), (4, 9, 16), (2, 2, 3, 8)]:
        assert module(weight(*shape)).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept_and_zero_is_positive(dtype):
    module = BinaryResidual(torch.tensor([1.0, 0.5]).reshape(2, 1))
    y = module(torch.tensor([0.0, -0.0, 0.2, -3.0], dtype=dtype))
    assert y.dtype == dtype
    assert y.tolist() == [0.5, 0.5, 0.5, -1.5]


def test_state_is_saved_and_loaded():
    w = weight(4, 10)
    module, other = BinaryResidual.from_data(w, 2), BinaryResidual(torch.zeros(2, 4, 1))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(w), module(w))
    assert "levels=2" in repr(module)


@pytest.mark.parametrize("levels", [0, 4, True, 2.0])
def test_levels_out_of_range(levels):
    with pytest.raises(FormatError, match=r"levels is .*1 to 3"):
        BinaryResidual.from_data(weight(3, 4), levels)


def test_means_that_do_not_fit():
    module = BinaryResidual.from_data(weight(3, 4), 2)
    with pytest.raises(FormatError, match=r"\(3, 1\) meet x of shape \(5, 4\)"):
        module(weight(5, 4))
    with pytest.raises(FormatError, match=r"\(3, 1\) meet x of shape \(4,\)"):
        module(weight(4))
