"""Weights that are frozen: who else holds their memory, who writes to it, and what recognises their values."""

import copy
import pickle

import pytest
import torch
from torch import nn

import mxlab
from mxlab.model.nn.weights import FrozenWeight, TensorVersion
from mxlab.numerics.fingerprints import fingerprint
from mxlab.recipe import Recipe, Rule
from mxlab.recipe.rule import PHASES

from support.architectures import IS_OLD, build, run, tokens

FP4 = mxlab.MXFormat.parse("fp4_e2m1@8")
MASE = mxlab.MXFormat.parse("int4@8,scale_rule=mase_int")  # quantizing twice is not quantizing once


def recipe(fmt=FP4) -> Recipe:
    return Recipe("test", (Rule(part="mlp", weight=fmt),))


def layer_of(model) -> nn.Linear:
    return model.model.layers[0].mlp.up_proj


def changed(model) -> None:
    """What the model is to compute once its first up_proj was doubled and shifted."""
    with torch.no_grad():
        layer_of(model).weight.data.mul_(2).add_(0.01)


# ---- whose memory it is


def test_a_state_dict_that_was_taken_before_stays():
    model = build("llama")
    before = model.state_dict()
    expected = {name: tensor.clone() for name, tensor in before.items()}
    mxlab.apply(model, recipe())
    run(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in expected.items())


def test_memory_that_is_shared_stays():
    """Assigned from a caller's dict, or two parameters over the same memory."""
    model = build("llama")
    given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = {name: tensor.clone() for name, tensor in given.items()}
    model.load_state_dict(given, assign=True)
    other = nn.Parameter(layer_of(model).weight.data)
    mxlab.apply(model, recipe())
    run(model)
    assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())
    assert torch.equal(other, expected["model.layers.0.mlp.up_proj.weight"])


def test_the_parameter_is_the_same_object():
    """An optimizer that was made before goes on training it."""
    model = build("llama")
    before = dict(model.named_parameters())
    mxlab.apply(model, recipe())
    assert all(before[name] is parameter for name, parameter in model.named_parameters())


def test_the_input_stays():
    model = build("llama")
    mxlab.apply(model, Recipe("test", (Rule(part="all", weight=FP4, activation=FP4),)))
    x = torch.randn(2, 5, 32)
    kept = x.clone()
    with torch.no_grad():
        model(inputs_embeds=x)
    assert torch.equal(x, kept)


# ---- writes that torch does not count


WRITES = {
    "data": lambda w: w.data.mul_(1.7),
    "one element of data": lambda w: w.data.view(-1)[5:6].add_(3.3),
    "numpy": lambda w: w.detach().numpy().__imul__(1.7),
    "new data": lambda w: setattr(w, "data", w.data * 1.7),
    "a state dict": lambda w: w.detach().mul_(1.7),
}


@pytest.mark.parametrize("how", list(WRITES))
@pytest.mark.parametrize("fmt", [FP4, MASE], ids=str)
def test_what_is_written_is_quantized_before_the_next_pass(how, fmt):
    model = build("llama")
    mxlab.apply(model, recipe(fmt))
    run(model)
    WRITES[how](layer_of(model).weight)
    values = layer_of(model).weight.detach().clone()
    run(model)
    expected = mxlab.quantize(values, fmt)
    assert not torch.equal(values, expected)
    assert torch.equal(layer_of(model).weight, expected)


@pytest.mark.parametrize("entered", ["root", "inner model"])
def test_any_model_inside_may_be_called(entered):
    model = build("llama")
    mxlab.apply(model, recipe())
    changed(model)
    with torch.no_grad():
        (model if entered == "root" else model.model)(tokens())
    weight = layer_of(model).weight
    assert torch.equal(weight, mxlab.quantize(weight.detach(), FP4))


def test_reading_the_state_changes_no_output():
    """The layer computes with what it will save."""
    model = build("llama")
    mxlab.apply(model, recipe(MASE))
    changed(model)
    before = run(model)
    model.state_dict()
    assert torch.equal(run(model), before)


def test_a_write_to_a_tied_weight_renews_the_copy():
    model = build("qwen2.5")
    mxlab.apply(model, Recipe("test", (Rule(name="lm_head", weight=FP4),)))
    run(model)
    model.lm_head.weight.data.mul_(0.37)
    fresh = build("qwen2.5")
    fresh.lm_head.weight.data.mul_(0.37)
    mxlab.apply(fresh, Recipe("test", (Rule(name="lm_head", weight=FP4),)))
    assert torch.equal(run(model), run(fresh))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # between PEFT and transformers
def test_peft_merges_what_is_then_quantized():
    """merge_and_unload() adds to weight.data."""
    peft = pytest.importorskip("peft")
    model = build("llama")
    mxlab.apply(model, recipe())
    config = peft.LoraConfig(r=4, target_modules=["up_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    run(adapted)
    merged = adapted.merge_and_unload()
    before = run(merged)
    weight = layer_of(merged).weight
    assert torch.equal(weight, mxlab.quantize(weight.detach(), FP4))
    merged.state_dict()
    assert torch.equal(run(merged), before)


@pytest.mark.skipif(IS_OLD, reason="experts are linear layers in transformers 4")
def test_experts_too():
    model = build("mixtral")
    mxlab.apply(model, recipe(MASE))
    experts = model.model.layers[0].mlp.experts
    experts.down_proj.data.mul_(2).add_(0.01)
    values = experts.down_proj.detach().clone()
    run(model)
    assert torch.equal(experts.down_proj, mxlab.quantize(values, MASE))


# ---- recognising values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (8, 8), (1, 1), (0, 4)])
def test_a_fingerprint_changes_with_any_element(dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    number = fingerprint(x)
    assert fingerprint(x.clone()) == number
    assert fingerprint(x.t().contiguous().t()) == number
    shifted = torch.cat([x.new_ones(1), x.flatten()])[1:].view(shape)
    assert fingerprint(shifted) == number
    for i in range(x.numel()):
        other = x.clone()
        other.view(-1)[i] += 1
        assert fingerprint(other) != number


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "wider", "narrower and representable", "loaded again"])
def test_quantized_values_are_recognised(how):
    """Quantizing them a second time would change them."""
    model = build("llama")
    mxlab.apply(model, recipe(MASE))
    expected = layer_of(model).weight.detach().clone()
    assert not torch.equal(mxlab.quantize(expected, MASE), expected)
    if how == "deepcopy":
        model = copy.deepcopy(model)
    elif how == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif how == "wider":
        model = model.double()
    elif how == "narrower and representable":
        model = model.bfloat16()
    else:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            layer_of(model).weight.zero_()
        model.load_state_dict(state)
    if how != "wider":  # which mxlab does not quantize
        run(model)
    assert torch.equal(layer_of(model).weight.to(expected.dtype), expected)


def test_other_values_of_the_same_weight_are_not():
    weight = torch.randn(4, 8)
    version = TensorVersion(weight)
    assert version.is_of(weight)
    assert version.is_of(weight.clone())
    assert not version.is_of(weight + 1)
    assert not version.is_of((weight + 0.001).bfloat16())
    again = copy.deepcopy(version)
    assert again.is_of(weight)
    assert version.is_of(weight)
    weight.data.add_(1)
    assert version.is_of(weight)  # torch has not counted it
    assert not version.verify(weight)


def test_a_weight_of_inference_mode():
    with torch.inference_mode():
        weight = nn.Parameter(torch.randn(4, 8), requires_grad=False)
        raw = weight.clone()
        from mxlab.model.apply import linear_operands

        operands = linear_operands(recipe(), {"weight": FP4})
        frozen = FrozenWeight(dict.fromkeys(PHASES, operands), -1)
        assert frozen.settle(weight, is_training=False)
        assert torch.equal(weight, mxlab.quantize(raw, FP4))


# ---- layers that are replaced


def test_a_replaced_head_is_told(caplog):
    model = build("llama")
    mxlab.apply(model, Recipe("test", (Rule(part="all", weight=FP4),)))
    run(model)
    assert not caplog.text
    model.resize_token_embeddings(72)
    for _ in range(2):
        run(model)
    assert caplog.text.count("lm_head: converted, but no quantized layer any more") == 1
