"""microxcaling's operators against its recorded outputs and gradients, and what is ours about them."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mxlab.compat.mx as mx
from mxlab.compat.mx import finalize_mx_specs
from mxlab.compat.mx.batchnorm import batch_norm
from mxlab.compat.mx.mx_mapping import injected
from mxlab.errors import SpecError

from golden.operators import CASES, SPECS, arithmetic, run
from support.paths import TESTS


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return dict(np.load(TESTS / "golden" / "operators.npz"))


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    """What is recorded was added up by two threads, in their order."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def is_same_machine(recorded, two_threads) -> bool:
    return np.array_equal(arithmetic(), recorded["arithmetic"])


@pytest.mark.parametrize("case", CASES)
def test_recorded(case, recorded, is_same_machine):
    compared = 0
    for specs in SPECS:
        if (expected := recorded.get(f"{case}-{specs}")) is None:
            continue
        found = run(case, specs, mx, finalize_mx_specs)
        if is_same_machine:
            np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32), err_msg=specs)
        else:  # its exponentials and sums differ in the last bit, and what is rounded after them by a step
            np.testing.assert_allclose(found, expected, rtol=0.2, atol=0.2, err_msg=specs)
        compared += 1
    assert compared >= len(SPECS) - 1


# ---- what is not in the recorded data


@pytest.fixture
def specs():
    return finalize_mx_specs({"bfloat": 16, "w_elem_format": "fp8_e4m3", "a_elem_format": "fp8_e4m3", "block_size": 8})


def test_torch_where_no_options_are_given():
    x, image, sequence = torch.randn(2, 4, 8), torch.randn(2, 4, 6, 6), torch.randn(3, 2, 4)
    pairs = [
        *(
            (getattr(mx, name)(x), getattr(F, name)(x))
            for name in ("sigmoid", "tanh", "relu", "relu6", "leaky_relu", "silu")
        ),
        (mx.gelu(x), F.gelu(x, approximate="tanh")),
        (mx.softmax(x), x.softmax(-1)),
        (mx.simd_reduce_mean(x, [0, 1]), x.mean((0, 1))),
        (mx.simd_norm(x), x.norm()),
        (mx.layer_norm(x, (8,), x[0, 0], x[1, 0]), F.layer_norm(x, (8,), x[0, 0], x[1, 0], 1e-12)),
        (mx.adaptive_avg_pool2d(image, (3, None)), F.adaptive_avg_pool2d(image, (3, None))),
        (mx.conv2d(image, image[:, :, :3, :3], padding="same"), F.conv2d(image, image[:, :, :3, :3], padding="same")),
    ]
    for ours, theirs, given in [
        (mx.BatchNorm2d, torch.nn.BatchNorm2d, image),
        (mx.Conv2d, torch.nn.Conv2d, image),
        (mx.ConvTranspose2d, torch.nn.ConvTranspose2d, image),
        (mx.GroupNorm, torch.nn.GroupNorm, image),
        (mx.LSTM, torch.nn.LSTM, sequence),
    ]:
        arguments = {"BatchNorm2d": (4,), "GroupNorm": (2, 4), "LSTM": (4, 5)}.get(theirs.__name__, (4, 3, 2))
        made, plain = ours(*arguments), theirs(*arguments)
        plain.load_state_dict(made.state_dict())
        found, wanted = made(given), plain(given)
        pairs += zip(found[:1], wanted[:1], strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted)


def test_norms_without_parameters_and_paddings_of_torch(specs):
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    layers = [
        mx.GroupNorm(2, 4, mx_specs=specs, affine=False),
        mx.BatchNorm2d(4, mx_specs=specs, affine=False),
        mx.LayerNorm(6, mx_specs=specs, elementwise_affine=False),
        mx.Conv2d(4, 3, 3, padding="same", mx_specs=specs),
        mx.Conv2d(4, 3, 3, padding=1, padding_mode="circular", mx_specs=specs),
    ]
    for layer in layers:
        y = layer(x)
        layer.apply_mx_specs(None)
        torch.testing.assert_close(y, layer(x), rtol=0.1, atol=0.1)
        y.sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, s: mx.simd_add(1.0, x, mx_specs=s), "the first operand is 1.0: it must be a tensor"),
        (lambda x, s: mx.softmax(x, None, mx_specs=s), "name the dimension, such as dim=-1"),
        (lambda x, s: mx.layer_norm(x, x.shape, None, None, mx_specs=s), "it must be \\(8,\\), the last dimension"),
        (lambda x, s: mx.conv2d(x, x, mx_specs=s), "input has 2 dimensions: with mx_specs it takes 4"),
        (lambda x, s: mx.adaptive_avg_pool2d(x, 2, mx_specs=s), "input has 2 dimensions"),
        (
            lambda x, s: mx.conv1d(x[None], x[None], padding="same", mx_specs=s),
            "'same' for a stride of 1 and odd kernels",
        ),
        (lambda x, s: mx.GroupNorm(2, 4, mx_specs=s)(x[None, :3]), "3 channels do not divide into 2 groups"),
        (lambda x, s: mx.LSTM(4, 4, batch_first=True, mx_specs=s), "neither batch_first nor proj_size"),
        (lambda x, s: batch_norm(x, None, None, mx_specs=s), "needs running_mean and running_var"),
    ],
)
def test_what_is_refused(call, message, specs):
    with pytest.raises(SpecError, match=message):
        call(torch.ones(4, 8), specs)


def test_injection(specs):
    x, before = torch.randn(4, 8), (torch.matmul, F.linear, torch.nn.Conv2d)
    calls = Counter()
    with injected(specs, calls):
        assert torch.equal(torch.mm(x, x.T), mx.matmul(x, x.T, mx_specs=specs))
        assert torch.softmax(x, dim=-1, dtype=torch.float64).dtype == torch.float64
        assert torch.add(torch.arange(3), 1).tolist() == [1, 2, 3]  # not floating-point: torch's
        assert torch.equal(torch.norm(x), mx.simd_norm(x, mx_specs=specs))
        with pytest.raises(SpecError, match="p must be 'fro' or 2"):
            torch.norm(x, 1)
        layer = torch.nn.Conv2d(4, 2, 3, 1, 1, 1, 1, False, "reflect")  # in torch's order
        assert (layer.padding_mode, layer.mx_specs["bfloat"]) == ("reflect", 16)
        assert isinstance(torch.nn.GroupNorm(2, 4, 1e-3), mx.GroupNorm)
        with injected(None):
            assert torch.equal(torch.matmul(x, x.T), x @ x.T)
            assert torch.equal(F.linear(x, x), before[1](x, x))
        assert torch.equal(F.silu(x), mx.silu(x, mx_specs=specs))
    assert (torch.matmul, F.linear, torch.nn.Conv2d) == before
    assert calls == {"mm": 1, "softmax": 1, "norm": 2, "silu": 1}
