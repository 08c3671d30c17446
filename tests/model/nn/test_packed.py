"""Linear layers whose weights are packed: the numbers of the grid, in the bits of the format, and nothing beside."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import mxlab
from mxlab.errors import ConversionError, SourceError, SpecError
from mxlab.formats import MXFormat
from mxlab.model.nn.packed import PackedConv1D, PackedLayer, PackedLinear
from mxlab.recipe import Elementwise, Recipe, Rule
from mxlab.recipe.transform import Hadamard

from support.architectures import MODELS, build
from support.llama import tiny, tokens

FP4, FP6, INT8 = (MXFormat.parse(text) for text in ("fp4_e2m1@16", "fp6_e2m3@16", "int8@16"))


def recipe(weight=FP4, activation=FP6, **more) -> Recipe:
    rules = (Rule(part=part, weight=weight, activation=activation, **more) for part in ("mlp", "attention"))
    return Recipe("mine", tuple(rules))


def packed(model, chosen) -> nn.Module:
    mxlab.apply(model, chosen, storage="packed")
    return model


def logits(model, ids=None):
    with torch.no_grad():
        return model(tokens() if ids is None else ids).logits


def layers(model):
    return [module for module in model.modules() if isinstance(module, PackedLayer)]


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        ("fp4_e2m1@16", "fp6_e2m3@16"), ("int8@16", "int8@16"), ("fp6_e3m2@16", "fp8_e4m3@16"), ("nvfp4", "nvfp4"),
        ("fp4_e2m1@16", None), ("fp8_e5m2@8", "int8@16"), ("int4@16,scale_rule=mase_int", "int8@16"),
        ("fp6_e2m3@16,rounding=dither", "fp6_e2m3@16"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_those_of_the_grid(weight, activation, dtype):
    chosen = recipe(MXFormat.parse(weight), activation and MXFormat.parse(activation))
    source = tiny().to(dtype)
    torch.manual_seed(0)
    grid = copy.deepcopy(source)
    mxlab.apply(grid, chosen)
    torch.manual_seed(0)
    found = packed(copy.deepcopy(source), chosen)
    assert len(layers(found)) == 14
    expected = logits(grid)
    # In bfloat16 products are rounded once, from float32 sums in another order.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert (logits(found).float() - expected.float()).abs().max() <= tolerance * expected.abs().max()
    for name, module in found.named_modules():
        if isinstance(module, PackedLayer):
            assert torch.equal(module.weight, grid.get_submodule(name).weight)


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(name):
    source = build(name)
    chosen = Recipe("mine", (Rule(part="mlp", weight=FP4, activation=FP6),))
    grid = copy.deepcopy(source)
    conversion = mxlab.apply(grid, chosen)
    if any(site.kind == "experts" for site in conversion.sites):
        with pytest.raises(ConversionError, match="experts cannot be packed"):
            mxlab.apply(source, chosen, storage="packed")
        assert not layers(source)
        return
    found = packed(source, chosen)
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(logits(found, ids), logits(grid, ids), atol=1e-5)
    if name == "gpt2":
        assert isinstance(layers(found)[0], PackedConv1D)
        assert torch.equal(layers(found)[0].weight, grid.transformer.h[0].mlp.c_fc.weight)


def test_transforms_and_elementwise_rounding():
    for chosen in (recipe(transform=Hadamard(16)), replace(recipe(), elementwise=Elementwise(bfloat=16))):
        grid = tiny()
        mxlab.apply(grid, chosen)
        assert torch.allclose(logits(packed(tiny(), chosen)), logits(grid), atol=1e-5)


def test_the_weight_is_stored_once_in_its_bits():
    plain, found = tiny(hidden_size=64, intermediate_size=96), tiny(hidden_size=64, intermediate_size=96)
    conversion = mxlab.apply(found, recipe(), storage="packed")
    grid = mxlab.apply(plain, recipe())
    assert conversion.bits_per_parameter == grid.bits_per_parameter
    assert conversion.inventory() == grid.inventory()
    for layer in layers(found):
        elements = layer.in_features * layer.out_features
        tensors = [*layer.parameters(), *layer.buffers()]
        assert sum(t.numel() * t.element_size() for t in tensors) * 8 == 4.5 * elements  # a scale for 16 elements
        assert "weight" not in dict(layer.named_parameters())


def test_it_can_be_copied_pickled_and_moved():
    found = packed(tiny(), recipe())
    expected = logits(found)
    assert torch.equal(logits(copy.deepcopy(found)), expected)
    again = copy.deepcopy(found)
    layer = again.model.layers[0].mlp.up_proj
    made = pickle.loads(pickle.dumps(layer))
    assert torch.equal(made.weight, layer.weight)
    assert torch.equal(logits(found.to("cpu")), expected)
    half = found.to(torch.bfloat16)
    assert layers(half)[0].weight_elements.dtype == torch.uint8
    assert logits(half).dtype == torch.bfloat16


def test_state_goes_from_one_to_another():
    first, second = packed(tiny(seed=0), recipe()), packed(tiny(seed=1), recipe())
    assert not torch.equal(logits(first), logits(second))
    state = first.state_dict()
    assert "model.layers.0.mlp.up_proj.weight_elements" in state
    assert "model.layers.0.mlp.up_proj.weight" not in state
    second.load_state_dict(state)
    assert torch.equal(logits(first), logits(second))


def damaged(state, change):
    name = "model.layers.0.mlp.up_proj.weight_"
    return {**state, **{name + part: tensor for part, tensor in change(state, name).items()}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, n: {"scales": torch.full_like(s[n + "scales"], 255)}, "scales have codes that .* has no number for"),
        (lambda s, n: {"elements": s[n + "elements"].float()}, "elements is torch.float32"),
        (lambda s, n: {"elements": s[n + "elements"][:, :-1]}, r"elements is torch.uint8 \(96, 31\)"),
        (lambda s, n: {"scales": s[n + "scales"][:-1]}, "scales is torch.uint8"),
    ],
)
def test_a_damaged_state_is_refused(change, message):
    found = packed(tiny(), recipe())
    before = logits(found)
    with pytest.raises(SourceError, match=message):
        found.load_state_dict(damaged(found.state_dict(), change))
    assert torch.equal(logits(found), before)


def test_a_missing_part_is_missed_by_torch():
    found = packed(tiny(), recipe())
    state = found.state_dict()
    del state["model.layers.1.mlp.up_proj.weight_scales"]
    with pytest.raises(RuntimeError, match=r"Missing key.*up_proj.weight_scales"):
        found.load_state_dict(state)


def test_a_model_on_the_grid_can_be_packed_later():
    found = tiny()
    mxlab.apply(found, recipe())
    before = logits(found)
    conversion = mxlab.apply(found, recipe(), storage="packed")
    assert len(layers(found)) == 14
    assert torch.allclose(logits(found), before, atol=1e-5)
    assert mxlab.apply(found, recipe(), storage="packed") is conversion


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (Recipe("m", (Rule(part="mlp", phase="prefill", weight=FP4), Rule(part="mlp", phase="decode", weight=INT8))),
         "one for each phase"),
        (recipe(MXFormat.parse("bf16@16")), "has weight of bf16@16, which cannot be packed"),
        (recipe(MXFormat.parse("int8@16,scale_rule=none")), "which cannot be packed"),
    ],
)  # fmt: skip
def test_what_cannot_be_packed_is_named_and_the_model_unchanged(chosen, message):
    model = tiny()
    before = logits(model)
    with pytest.raises(ConversionError, match=message):
        mxlab.apply(model, chosen, storage="packed")
    assert torch.equal(logits(model), before)
    with pytest.raises(SpecError, match="storage is 'zip': it must be one of grid, packed"):
        mxlab.apply(model, recipe(), storage="zip")


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ConversionError, match="in training mode"):
        mxlab.apply(tiny().train(), recipe(), storage="packed")


def test_gradients_reach_the_embeddings_through_packed_weights():
    found, grid = packed(tiny(), recipe()), tiny()
    mxlab.apply(grid, recipe())
    for model in (found, grid):
        model(tokens(), labels=tokens()).loss.backward()
    expected = grid.model.embed_tokens.weight.grad
    assert torch.allclose(found.model.embed_tokens.weight.grad, expected, atol=1e-5 * float(expected.abs().max()))


def test_observers_see_what_they_see_on_the_grid():
    from mxlab.model.observe import count_scale_clamps

    found, grid = tiny(), tiny()
    counted = []
    for model, storage in ((found, "packed"), (grid, "grid")):
        clamps = count_scale_clamps(mxlab.apply(model, recipe(), storage=storage))
        logits(model)
        counted.append({name: dict(counts) for name, counts in clamps.items()})
    assert counted[0] == counted[1]


def test_layers_of_one_parent_share_the_integers_of_their_input(monkeypatch):
    from mxlab.numerics.kernels.products import IntegerProduct

    made, original = [], IntegerProduct.encode
    monkeypatch.setattr(IntegerProduct, "encode", lambda *args: made.append(1) or original(*args))
    found = packed(tiny(), recipe())
    logits(found)
    assert len(made) == 8  # of 14 layers: q, k and v share one, gate and up another


def test_the_classes_say_what_they_are():
    layer = packed(tiny(), recipe()).model.layers[0].mlp.up_proj
    assert isinstance(layer, PackedLinear)
    assert "weight=fp4_e2m1@16" in repr(layer)
    with pytest.raises(ConversionError, match="the weight is packed: load the unquantized model to change it"):
        layer.weight = nn.Parameter(torch.zeros(2))


def test_an_input_of_another_width_is_refused():
    layer = packed(tiny(), recipe()).model.layers[0].mlp.up_proj
    for width in (1, 32, 63, 128):
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            layer(torch.randn(3, width))
    assert layer(torch.randn(0, 64)).shape == (0, 96)
    assert layer(torch.randn(64)).shape == (96,)
