"""microxcaling's linear, matmul, bmm and Linear, forward and backward."""

import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mxlab import MXFormat, quantize, round_elementwise
from mxlab.compat.mx import Linear, MxSpecs, bmm, finalize_mx_specs, linear, matmul
from mxlab.errors import FormatError, SpecError

from golden.make_linear_selection import read
from support.paths import TESTS

SELECTION = TESTS / "golden"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMATS = {
    "w_elem_format": "int8",
    "a_elem_format": "fp6_e3m2",
    "w_elem_format_bp": "fp8_e4m3",
    "a_elem_format_bp": "fp8_e5m2",
    "a_elem_format_bp_ex": "int4",
    "a_elem_format_bp_os": "fp6_e2m3",
}


def everything(seed: int, **more: object) -> dict:
    """Options that quantize every step; over several seeds no rounding can stand in for another."""
    draw = random.Random(seed)
    roundings = {name: draw.choice(["nearest", "even", "floor"]) for name in MxSpecs() if name.startswith("round_")}
    return {**FORMATS, **roundings, "block_size": 4, "bfloat": 12, **more}


def leaves(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def gradients(y: Tensor, inputs: list[Tensor], seed: int = 9) -> list[Tensor]:
    return list(torch.autograd.grad(y, inputs, *leaves(y.shape, seed=seed, dtype=y.dtype)))


class Composed:
    """The same steps, written out with mxlab's own functions."""

    def __init__(self, specs: dict, numerics: str) -> None:
        self.specs, self.numerics = specs, numerics

    def r(self, x: Tensor, rounding: str) -> Tensor:
        rounding = self.specs[f"round_{rounding}"]
        return round_elementwise(x.detach(), bfloat=12, rounding=rounding, numerics=self.numerics)

    def q(self, x: Tensor, fmt: str, rounding: str, axis: int) -> Tensor:
        fmt, rounding = self.specs[fmt], self.specs[f"round_mx_{rounding}"]
        return quantize(x, MXFormat(fmt, block_size=4, rounding=rounding), axis=axis, numerics=self.numerics)


# ---- golden vectors


def check(case: dict, arrays: dict[str, np.ndarray]) -> None:
    dtype = DTYPES[case["dtype"]]

    def array(name: str) -> Tensor | None:
        found = arrays.get(f"{case['id']}_{name}")
        return None if found is None else torch.from_numpy(np.array(found)).view(dtype)

    x, w, b = (t if t is None else t.requires_grad_() for t in map(array, ("x", "w", "b")))
    y = linear(x, w, b, mx_specs=finalize_mx_specs(dict(case["raw_specs"])))
    y.backward(array("grad_out"))
    got = {"y": y, "gx": x.grad, "gw": w.grad, "gb": b if b is None else b.grad}
    assert [name for name, found in got.items() if found is not None] == case["outputs"]
    for name in case["outputs"]:
        torch.testing.assert_close(got[name], array(name), **case["tol"], msg=lambda m: f"{case['id']} {name}: {m}")  # noqa: B023


@pytest.mark.parametrize("case", json.loads((SELECTION / "linear.json").read_text()), ids=lambda case: case["id"])
def test_selection(case):
    check(case, dict(np.load(SELECTION / "linear.npz")))


def test_whole_set(shared):
    folder = shared / "golden" / "open"
    if not folder.is_dir():
        pytest.skip("the whole set of golden vectors is not published; the selection was checked")
    cases, arrays = read(folder)
    assert len(cases) == 60
    for case in cases:
        check(case, arrays)


# ---- every step has the option that is its own


@pytest.mark.parametrize("custom_cuda", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_linear_step_by_step(seed, custom_cuda):
    x, w, b = leaves((2, 3, 10), (6, 10), (6,))
    specs = finalize_mx_specs(everything(seed, custom_cuda=custom_cuda))
    c = Composed(specs, "exact" if custom_cuda else "microxcaling")
    rx, rw = c.r(x, "output"), c.r(w, "weight")
    product = c.q(rx, "a_elem_format", "output", -1) @ c.q(rw, "w_elem_format", "output", -1).T
    y = linear(x, w, b, mx_specs=specs)
    assert torch.equal(y, c.r(c.r(product, "output") + c.r(b, "weight"), "output"))

    (g,) = leaves(y.shape, seed=9)
    g = c.r(g, "grad_input")
    gx = c.q(g, "a_elem_format_bp_os", "grad_output_grad_input", -1)
    gx = gx @ c.q(rw, "w_elem_format_bp", "weight_grad_input", 0)
    gw = c.q(g, "a_elem_format_bp_ex", "grad_output_grad_weight", -2).reshape(6, 6).T
    gw = gw @ c.q(rx, "a_elem_format_bp", "input_grad_weight", -2).reshape(6, 10)
    expected = [c.r(gx, "grad_input"), c.r(gw, "grad_weight"), c.r(g.sum((0, 1)), "grad_weight")]
    for found, wanted in zip(gradients(y, [x, w, b]), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("custom_cuda", [False, True])
@pytest.mark.parametrize("mode", ["aa", "aw", "wa"])
@pytest.mark.parametrize("seed", range(6))
def test_matmul_step_by_step(seed, mode, custom_cuda):
    in1, in2, b = leaves((2, 3, 5, 10), (3, 10, 6), (1, 6))
    specs = finalize_mx_specs(everything(seed, custom_cuda=custom_cuda))
    c = Composed(specs, "exact" if custom_cuda else "microxcaling")
    first, second = (f"{letter}_elem_format" for letter in mode)
    r1, r2 = c.r(in1, "output"), c.r(in2, "output")
    product = c.q(r1, first, "output", -1) @ c.q(r2, second, "output", -2)
    y = matmul(in1, in2, bias=b, mx_specs=specs, mode_config=mode)
    assert torch.equal(y, c.r(c.r(product, "output") + c.r(b, "weight"), "output"))

    (g,) = leaves(y.shape, seed=9)
    g = c.r(g, "grad_input")
    os, operands = ("a_elem_format_bp_os", "grad_output_grad_input"), "input_grad_input"
    g1 = c.q(g, *os, -1) @ c.q(r2, f"{second}_bp", operands, -1).mT
    g2 = c.q(r1, f"{first}_bp", operands, -2).mT @ c.q(g, *os, -2)
    gb = c.r(g.sum((0, 1, 2)), "grad_weight").reshape(1, 6)
    expected = [c.r(g1, "grad_input"), c.r(g2, "grad_input").sum(0), gb]
    for found, wanted in zip(gradients(y, [in1, in2, b]), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_bmm_is_matmul_of_activations():
    in1, in2 = leaves((4, 5, 10), (4, 10, 6))
    specs = finalize_mx_specs(everything(0))
    found, wanted = bmm(in1, in2, mx_specs=specs), matmul(in1, in2, mx_specs=specs)
    assert torch.equal(found, wanted)
    for a, b in zip(gradients(found, [in1, in2]), gradients(wanted, [in1, in2]), strict=True):
        assert torch.equal(a, b)


def test_a_backward_pass_without_quantization():
    x, w, b = leaves((2, 3, 10), (6, 10), (6,))
    specs = finalize_mx_specs(everything(0, quantize_backprop=False))
    y = linear(x, w, b, mx_specs=specs)
    assert not torch.allclose(y, F.linear(x, w, b), rtol=1e-3)
    for found, wanted in zip(gradients(y, [x, w, b]), gradients(F.linear(x, w, b), [x, w, b]), strict=True):
        torch.testing.assert_close(found, wanted)


def test_kernels_without_a_gpu():
    x, w = leaves((3, 64), (8, 64), dtype=torch.bfloat16)
    specs = finalize_mx_specs({"w_elem_format": "fp4", "a_elem_format": "fp4", "block_size": 32, "custom_cuda": True})
    expected = F.linear(quantize(x, "fp4_e2m1@32"), quantize(w, "fp4_e2m1@32"))
    assert torch.equal(linear(x, w, mx_specs=specs), expected)
    specs["custom_cuda"] = False
    assert not torch.equal(linear(x, w, mx_specs=specs), expected)


# ---- with quantization off it is torch


@pytest.mark.parametrize("specs", [None, {}, {"quantize_backprop": False, "custom_cuda": True}])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_where_nothing_is_quantized(specs, bias, dtype):
    specs = None if specs is None else finalize_mx_specs(dict(specs), early_exit=False)
    x, w, m, b = leaves((4, 3, 17), (9, 17), (17, 9), (9,), dtype=dtype)
    in1, in2 = leaves((4, 3, 17), (4, 17, 9), dtype=dtype)
    given = b if bias else None
    added = b if bias else 0
    pairs = [
        (linear(x, w, given, mx_specs=specs), F.linear(x, w, given), [x, w]),
        (matmul(x, m, given, mx_specs=specs), torch.matmul(x, m) + added, [x, m]),
        (matmul(x[0], m, given, mx_specs=specs), torch.matmul(x[0], m) + added, [x, m]),
        (bmm(in1, in2, mx_specs=specs) + added, torch.bmm(in1, in2) + added, [in1, in2]),
    ]
    for found, wanted, inputs in pairs:
        torch.testing.assert_close(found, wanted)
        inputs = [*inputs, b] if bias else inputs
        for a, e in zip(gradients(found, inputs), gradients(wanted, inputs), strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize(("first", "second"), [((10,), (10, 6)), ((5, 10), (10,)), ((10,), (10,)), ((3, 5, 10), (10,))])
def test_vectors(first, second):
    in1, in2 = leaves(first, second)
    specs = finalize_mx_specs({"bfloat": 16, "custom_cuda": True, "quantize_backprop": False})
    expected = torch.matmul(in1.bfloat16().float(), in2.bfloat16().float()).bfloat16().float()
    found = matmul(in1, in2, mx_specs=specs)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-3)
    assert found.shape == expected.shape
    for a, e in zip(gradients(found, [in1, in2]), gradients(in1 @ in2, [in1, in2]), strict=True):
        torch.testing.assert_close(a, e)


def test_gradients_that_nobody_wants_are_not_computed(monkeypatch):
    x, w, b = leaves((3, 10), (6, 10), (6,))
    y = linear(x.detach(), w.detach(), b, mx_specs=finalize_mx_specs(everything(0)))
    monkeypatch.setattr(torch, "matmul", None)
    assert gradients(y, [b])[0].shape == (6,)


def test_no_second_derivative():
    x, w, g = leaves((3, 10), (6, 10), (3, 6))
    y = linear(x, w, mx_specs=finalize_mx_specs({"bfloat": 16}))
    (gx,) = torch.autograd.grad(y, x, g, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gx.sum().backward()


# ---- the layer


def test_the_layer():
    specs = finalize_mx_specs({"w_elem_format": "fp4", "a_elem_format": "fp6_e2m3", "block_size": 16, "bfloat": 16})
    layer = Linear(32, 8, mx_specs=specs, name="up")
    assert isinstance(layer, torch.nn.Linear)
    (x,) = leaves((2, 32))
    assert torch.equal(layer(x), linear(x, layer.weight, layer.bias, mx_specs=specs))
    layer.append_name("_proj")
    assert layer.name == "up_proj"
    assert layer.mx_specs == specs

    plain = torch.nn.Linear(32, 8)
    plain.load_state_dict(layer.state_dict())
    assert not torch.allclose(layer(x), plain(x), rtol=1e-3)
    layer.apply_mx_specs(None)
    assert layer.mx_none
    assert torch.equal(layer(x), plain(x))
    layer.prequantize_weights()  # there is nothing to do
    assert layer.weight.dtype == torch.float32
    layer.apply_mx_specs({"bfloat": 16})
    assert layer.mx_specs == MxSpecs(bfloat=16)
    assert Linear(4, 2, bias=False, mx_specs=None).bias is None


@pytest.mark.parametrize("custom_cuda", [False, True])
def test_prequantized_weights(custom_cuda):
    options = {"w_elem_format": "fp8_e4m3", "a_elem_format": "fp8_e4m3", "block_size": 16, "bfloat": 16}
    specs = finalize_mx_specs({**options, "round": "even", "custom_cuda": custom_cuda})
    layer = Linear(64, 8, mx_specs=specs).eval()
    (x,) = leaves((3, 64))
    before = layer(x)
    layer.prequantize_weights()
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    after = layer(x)
    assert after.dtype == torch.float32
    if custom_cuda:
        assert torch.equal(before, after)
    with pytest.raises(SpecError, match="prequantized weights cannot be trained: leave prequantized_weights out"):
        after.sum().backward()
    with pytest.raises(SpecError, match=r"call eval\(\) first"):
        layer.train()(x)


@pytest.mark.parametrize("options", [{"bfloat": 12}, {"bfloat": 16}, {"bfloat": 16, "bfloat_subnorms": False}])
def test_weights_that_cannot_be_prequantized(options):
    layer = Linear(4, 4, mx_specs=finalize_mx_specs({"round": "nearest" if len(options) == 1 else "even", **options}))
    with pytest.raises(SpecError, match=r"(bfloat|bfloat_subnorms|round) is .*: to prequantize weights it must be"):
        layer.prequantize_weights()
    assert layer.weight.dtype == torch.float32


# ---- what is refused


def test_bad_calls():
    x, w, b = leaves((3, 10), (6, 10), (6,))
    specs = finalize_mx_specs({"bfloat": 16, "a_elem_format": "int8"})
    with pytest.raises(SpecError, match="mode_config is 'ww': it must be one of aa, aw, wa"):
        matmul(x, w.T, mx_specs=specs, mode_config="ww")
    with pytest.raises(SpecError, match="weight and bias must be bfloat16"):
        linear(x, w, mx_specs=specs, prequantized_weights=True)
    with pytest.raises(SpecError, match="weight and bias must be bfloat16"):
        linear(x, w.bfloat16(), b, mx_specs=specs, prequantized_weights=True)
    with pytest.raises(KeyError, match="did you mean 'block_size'"):
        linear(x, w, mx_specs={"blocksize": 32})
    with pytest.raises(FormatError, match=r"cannot quantize torch\.float64"):
        linear(x.double(), w.double(), mx_specs=specs)
    with pytest.raises(RuntimeError, match="3D tensor"):
        bmm(x, w.T, mx_specs=specs)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        linear(x, w.T, mx_specs=specs)


def test_assert_mode_reaches_every_function(monkeypatch):
    monkeypatch.setenv("MX_ASSERT", "True")
    x, w, m = leaves((3, 10), (6, 10), (1, 10, 6))
    for call in (lambda: linear(x, w), lambda: matmul(x, w.T), lambda: bmm(x[None], m), lambda: Linear(2, 3)):
        with pytest.raises(SpecError, match="MX_ASSERT is True"):
            call()
