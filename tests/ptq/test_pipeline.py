"""Transforms and calibrated weights in whole models: what they keep, what they win, and what is saved of them."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import mxlab
from mxlab.errors import ConversionError
from mxlab.ptq import layers, pipeline
from mxlab.ptq.calibration import Windows
from mxlab.ptq.divergence import divergence
from mxlab.ptq.pipeline import quantize_model
from mxlab.recipe import Recipe

from support.llama import tiny

FP4 = "fp4_e2m1@16,scale_rule=even,rounding=even"
FINE = "integer,width=31,frac=24"  # to 2^-24: no rounding that matters
IDS = torch.randint(0, 60, (6, 24), generator=torch.Generator().manual_seed(0))


def recipe(fmt=FP4, linear="hadamard@16", kv="hadamard", algorithms=None) -> Recipe:
    rules = [
        {"part": "mlp", "weight": fmt, "activation": fmt, "transform": linear},
        {"part": "attention", "weight": fmt, "activation": fmt, "transform": linear},
        {"part": "attention", "k": fmt, "v": fmt, "q": fmt, "transform": kv},
    ]
    rules = [{key: value for key, value in rule.items() if value} for rule in rules]
    return Recipe.from_dict({"name": "a", "rules": rules, "algorithms": algorithms or {}})


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def quantized(algorithms=None, **ways):
    model, original = tiny().eval(), tiny().eval()
    quantize_model(model, original, recipe(algorithms=algorithms or {"gptq": {}}, **ways), Windows(IDS, 2, IDS))
    return model


@pytest.mark.parametrize("linear", ["hadamard@16", "hadamard@4", "hadamard"])
def test_without_rounding_a_transform_changes_nothing(linear):
    model = tiny().eval()
    before = logits(model)
    mxlab.apply(model, recipe(FINE, linear))
    assert (logits(model) - before).abs().max() < 1e-5 * before.abs().max()


def test_a_calibrated_model_is_nearer_to_the_unquantized_one():
    before, nearest = logits(tiny().eval()), tiny().eval()
    mxlab.apply(nearest, recipe())
    lost = [(logits(model) - before).square().mean() for model in (quantized(), nearest)]
    assert lost[0] < lost[1]


def test_both_operands_lie_on_the_grid_in_the_basis_of_the_transform():
    model = quantized({"gptq": {"search": 0}})
    layer = model.model.layers[1].mlp.down_proj
    x = torch.randn(5, layer.weight.shape[1], generator=torch.Generator().manual_seed(1))
    for operand in (layer.weight, layer.mx.on_activation(x)):
        assert torch.equal(mxlab.quantize(operand, FP4), operand)
    assert torch.allclose(layer(x), layer.mx.on_activation(x) @ layer.weight.t())


def test_a_saved_model_is_loaded_without_rounding_anything_again(tmp_path):
    model = quantized()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(logits(again), expected)


def test_calibrating_again_gives_the_same_bits():
    assert torch.equal(logits(quantized()), logits(quantized()))


def test_the_unquantized_model_is_not_touched():
    model, original = tiny().eval(), tiny().eval()
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    quantize_model(model, original, recipe(algorithms={"gptq": {}}), Windows(IDS, 2, IDS[:4]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())


def test_a_recipe_with_algorithms_is_not_rounded_to_nearest_by_mistake():
    with pytest.raises(ConversionError, match="asks for gptq, which take a calibration text: use mxlab quantize"):
        mxlab.apply(tiny().eval(), recipe(algorithms={"gptq": {}}))


def test_a_size_that_does_not_fit_names_the_layer():
    with pytest.raises(ConversionError, match=r"model\.layers\.0\..*_proj: no Hadamard transform of size 7"):
        mxlab.apply(tiny().eval(), recipe(linear="hadamard@7"))


def test_a_weight_in_another_basis_is_not_taken_for_one_in_full_precision():
    model = tiny().eval()
    mxlab.apply(model, recipe())
    model.model.layers[0].mlp.up_proj.weight.data.add_(0.5)
    with pytest.raises(ConversionError, match="written to after it was transformed"):
        logits(model)
    model = tiny().eval()
    mxlab.apply(model, recipe())
    model.train()
    with pytest.raises(ConversionError, match=r"call train\(\) before"):
        model(IDS)


def test_loading_full_precision_weights_quantizes_them_anew():
    model = tiny().eval()
    mxlab.apply(model, recipe())
    expected = logits(model)
    state = dict(tiny().eval().state_dict())
    with torch.no_grad():
        other = {name: tensor * 1.5 if "up_proj" in name else tensor for name, tensor in state.items()}
    model.load_state_dict(other)
    assert not torch.equal(logits(model), expected)
    model.load_state_dict(state)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("which", ["model", "original"])
def test_inputs_that_are_not_finite_are_named(which):
    models = {"model": tiny().eval(), "original": tiny().eval()}
    models[which].model.layers[1].input_layernorm.weight.data[0] = torch.nan
    asked = recipe(algorithms={"gptq": {"correction": 0.5}})
    with pytest.raises(ConversionError, match=r"gives model\.layers\.1\.self_attn\.q_proj .* NaN or infinite"):
        quantize_model(models["model"], models["original"], asked, Windows(IDS, 2, IDS[:4]))


@pytest.mark.parametrize("change", ["numerics", "format"])
def test_what_gptq_cannot_do_is_refused(change):
    wrong = replace(recipe("fp4_e2m1@16", None, None, {"gptq": {}}), numerics="microxcaling")
    if change == "format":
        wrong = recipe("integer,width=8,frac=4", algorithms={"gptq": {}})
    with pytest.raises(ConversionError, match="exact numerics" if change == "numerics" else "gptq has no format"):
        quantize_model(tiny().eval(), tiny().eval(), wrong, Windows(IDS, 2, IDS[:4]))


DISTILLED = {"gptq": {}, "distillation": {"steps": 12, "check": 4, "rate": 0.05, "vector_rate": 0.01}}


def test_distillation_brings_the_model_nearer_on_its_grid_and_is_saved_so(tmp_path):
    before = divergence(quantized(), tiny().eval(), IDS[4:])
    model = quantized(DISTILLED)
    assert divergence(model, tiny().eval(), IDS[4:]) < before
    layer = model.model.layers[1].mlp.down_proj
    plain = quantized().model.layers[1].mlp.down_proj
    assert not torch.equal(layer.weight, plain.weight)
    assert layer.is_frozen
    assert not any(p.requires_grad and p.grad is not None for p in model.parameters())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("rate", [0.9, 0.0])
def test_distillation_that_diverges_or_does_nothing_leaves_what_was_best(rate):
    plain = quantized()
    model = quantized({"gptq": {}, "distillation": {"steps": 4, "check": 2, "rate": rate, "vector_rate": rate}})
    assert divergence(model, tiny().eval(), IDS[4:]) <= divergence(plain, tiny().eval(), IDS[4:])


def test_learned_weights_lie_on_the_grid_of_the_scales_that_were_chosen():
    plain, model = quantized(), quantized(DISTILLED)
    for a, b in zip(plain.model.layers, model.model.layers, strict=True):
        was, now = (layer.mlp.up_proj.weight.detach().unflatten(1, (-1, 16)) for layer in (a, b))
        step = torch.where(was == 0, torch.inf, was.abs()).amin(-1, keepdim=True)
        assert (was != now).any()
        ratio = now / torch.exp2(torch.floor(torch.log2(step)) - 3)
        assert torch.equal(ratio, ratio.round())


def test_distillation_learns_fitted_transforms_which_layers_go_on_sharing(tmp_path):
    options = {"steps": 4, "check": 2, "vector_rate": 1e-3, "transform_rate": 0.02}
    plain, model = quantized(linear="wush@16"), quantized({"gptq": {}, "distillation": options}, linear="wush@16")
    was, now = (m.model.layers[0] for m in (plain, model))
    assert not torch.equal(now.mlp.up_proj.input_transform, was.mlp.up_proj.input_transform)
    assert torch.equal(now.mlp.up_proj.input_transform, now.mlp.gate_proj.input_transform)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("linear", ["wush@16", "hadamard@16", None])
def test_a_layer_that_the_text_does_not_reach_is_rounded_to_nearest_and_named(linear, caplog):
    def model():
        made = tiny().eval()
        mlp = made.model.layers[0].mlp
        mlp.unused = torch.nn.Linear(32, 32, bias=False).eval()
        torch.nn.init.normal_(mlp.unused.weight, generator=torch.Generator().manual_seed(0))
        return made

    chosen = model()
    quantize_model(chosen, model(), recipe(linear=linear, algorithms={"gptq": {}}), Windows(IDS, 2, IDS))
    assert "reaches none of model.layers.0.mlp.unused: rounded to nearest" in caplog.text
    unused = chosen.model.layers[0].mlp.unused
    in_basis = linear == "hadamard@16"
    x = model().model.layers[0].mlp.unused.weight.detach()
    expected = mxlab.quantize(mxlab.numerics.hadamard.transform(x, 16, 1) if in_basis else x, FP4)
    assert torch.equal(unused.weight, expected)
    assert torch.isfinite(unused(torch.ones(1, 32))).all()


def test_a_weight_that_is_rounded_at_random_is_refused():
    with pytest.raises(ConversionError, match=r"leaves that to chance: take rounding=even"):
        quantized(fmt="fp4_e2m1@16,rounding=dither")


@pytest.mark.parametrize("name", ["reconstruction", "distillation"])
def test_learning_in_float16_is_refused(name):
    model = tiny().eval().half()
    with pytest.raises(ConversionError, match=f"gradients of {name} vanish in float16"):
        quantize_model(model, tiny().eval().half(), recipe(algorithms={"gptq": {}, name: {}}), Windows(IDS, 2, IDS))


def test_long_elements_learn_without_being_moved_by_what_keeps_them():
    still = {"gptq": {}, "distillation": {"steps": 1, "rate": 0, "vector_rate": 0, "transform_rate": 0}}
    before, after = (quantized(algorithms, fmt="fp16@16", kv=None) for algorithms in ({"gptq": {}}, still))
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b)


def test_layers_that_are_not_known_to_share_an_input_get_statistics_of_their_own_transforms(monkeypatch):
    seen = []
    made = layers.input_statistics
    monkeypatch.setattr(layers, "input_statistics", lambda *args: seen.append(args[3]) or made(*args))
    monkeypatch.setattr(pipeline, "layers_by_input", lambda *_: [])
    quantized(linear="wush@16")
    assert len(seen) == 14
