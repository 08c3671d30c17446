"""The fitted transform: both operands in the basis it promises, products unchanged, saved with the model."""

import pytest
import torch
from ptq.test_pipeline import logits, quantized
from transformers import AutoModelForCausalLM

import mxlab
from mxlab.errors import ConversionError, SpecError
from mxlab.model.saved import conversion_of
from mxlab.numerics.transforms import inverse_transposed, transform
from mxlab.ptq import wush
from mxlab.recipe.transform import Wush, parse_transform

from support.llama import tiny


def operands():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 64, generator=generator) * torch.logspace(-1, 1, 64)
    weights = [torch.randn(n, 64, generator=generator) @ torch.randn(64, 64, generator=generator) for n in (96, 48)]
    return x, weights


def test_weights_and_activations_have_equal_second_moments():
    x, weights = operands()
    found = wush.fit(weights, x, 32)
    of_x = transform(x, found)
    of_w = torch.cat([transform(w, inverse_transposed(found)) for w in weights])
    for block in range(2):
        a, b = (t[:, 32 * block :][:, :32] for t in (of_x, of_w))
        a, b = a.t() @ a / len(a), b.t() @ b / len(b)
        assert (a - b).norm() < 0.1 * a.norm()
        # The Hadamard matrix has spread what there is evenly over the block.
        assert a.diagonal().max() < 1.2 * a.diagonal().min()


def test_products_stay_what_they_are():
    x, (weight, _) = operands()
    found = wush.fit([weight], x, 32)
    y = transform(x, found) @ transform(weight, inverse_transposed(found)).t()
    assert torch.allclose(y, x @ weight.t(), rtol=1e-4, atol=1e-4 * float(y.abs().max()))


def test_it_survives_a_cast_to_bfloat16():
    x, weights = operands()
    found = wush.fit(weights, x, 16)
    assert torch.equal(found.bfloat16().float(), found)


def test_inputs_that_are_always_zero_and_one_row_are_fitted_all_the_same():
    x, (weight, _) = operands()
    x = x[:1].clone()
    x[:, :32] = 0
    assert torch.isfinite(wush.fit([weight], x, 32)).all()


def test_without_rounding_the_model_is_what_it_was():
    before = logits(tiny().eval())
    model = quantized({"gptq": {"correction": 0}}, fmt="int8@16", linear="wush@16")
    plain = quantized({"gptq": {"correction": 0}}, fmt="int8@16", linear=None)
    assert (logits(model) - before).norm() < 1.5 * (logits(plain) - before).norm()


def test_a_saved_model_is_loaded_with_its_transforms(tmp_path):
    model = quantized(linear="wush@16")
    layer = model.model.layers[0]
    assert torch.equal(layer.mlp.gate_proj.input_transform, layer.mlp.up_proj.input_transform)
    assert not torch.equal(layer.self_attn.q_proj.input_transform, layer.self_attn.o_proj.input_transform)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_layers_that_share_an_input_transform_it_once(monkeypatch):
    model = quantized(linear="wush@16", kv=None)
    calls = []
    real = mxlab.numerics.transforms.transform_quantize
    counted = lambda *a, **k: calls.append(1) or real(*a, **k)  # noqa: E731
    monkeypatch.setattr(mxlab.numerics.transforms, "transform_quantize", counted)
    logits(model)
    assert len(calls) == 4 * len(model.model.layers)


def test_its_matrices_are_counted_once_for_an_input():
    plain, fitted = quantized(linear=None), quantized(linear="wush@16")
    sizes = fitted.config.hidden_size, fitted.config.intermediate_size
    matrices = 2 * (3 * sizes[0] + sizes[1]) * 16  # of q, k, v; o; gate, up; down in two layers
    parameters = sum(p.numel() for p in plain.parameters())
    more = conversion_of(fitted).bits_per_parameter - conversion_of(plain).bits_per_parameter
    assert more * parameters == pytest.approx(16 * matrices)


def test_weights_that_it_was_not_fitted_to_are_refused():
    from ptq.test_pipeline import recipe

    with pytest.raises(ConversionError, match="fitted by calibration"):
        mxlab.apply(tiny().eval(), recipe(linear="wush@16"))


def test_bad_sizes_and_places_are_named():
    from ptq.test_pipeline import recipe

    with pytest.raises(SpecError, match="lies between 2 and 128"):
        parse_transform("wush@1")
    assert parse_transform("wush") == Wush(32)
    with pytest.raises(SpecError, match="fitted to a linear layer"):
        recipe(kv="wush@16")
    with pytest.raises(ConversionError, match="multiple of 24 inputs"):
        mxlab.apply(tiny().eval(), recipe(linear="wush@24"))
