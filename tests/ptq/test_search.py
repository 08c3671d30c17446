"""The search of transforms: what it finds is in the recipe, and no worse than where it began."""

import pytest
import torch
from ptq.test_pipeline import IDS, logits, quantized, recipe
from transformers import AutoModelForCausalLM

from mxlab.errors import ConversionError, SpecError
from mxlab.ptq.calibration import Windows
from mxlab.ptq.pipeline import quantize_model
from mxlab.ptq.search import searched
from mxlab.recipe import Recipe
from mxlab.recipe.algorithms import Search
from mxlab.recipe.transform import Wush

from support.llama import tiny

CANDIDATES = ("none", "hadamard@16", "hadamard@4", "hadamard", "wush@16")


def found(model=None, candidates=CANDIDATES, **more):
    model = model or tiny().eval()
    return searched(model, recipe(linear=None, kv=None), Search(candidates, tokens=96, **more), IDS)


def outlying():
    """A tiny model with one large input in each block of the MLPs."""
    model = tiny().eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[::16] *= 40
            layer.mlp.gate_proj.weight[:, ::16] /= 40
            layer.mlp.up_proj.weight[:, ::16] /= 40
    return model


def test_every_layer_gets_a_rule_and_layers_that_share_an_input_one_transform():
    model = tiny().eval()
    before = logits(model)
    by_name = {rule.name: rule.transform for rule in found(model).rules}
    assert len(by_name) == 2 * (7 + 1)
    for i in range(2):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        assert len({by_name[f"{attention}.{name}_proj"] for name in "qkv"}) == 1
        assert by_name[f"{mlp}.gate_proj"] == by_name[f"{mlp}.up_proj"]
    assert torch.equal(logits(model), before)


def test_inputs_of_different_sizes_are_balanced_by_a_fitted_transform():
    by_name = {rule.name: rule.transform for rule in found(outlying(), ("none", "hadamard@16", "wush@16")).rules}
    assert by_name["model.layers.0.mlp.gate_proj"] == by_name["model.layers.1.mlp.up_proj"] == Wush(16)


def test_scale_rules_are_tried_for_what_has_a_format_that_knows_them(caplog):
    caplog.set_level("INFO", logger="mxlab")
    rules = found(candidates=("none",), rules=("floor", "mase_int")).rules
    assert {rule.activation.scale_rule for rule in rules if rule.activation} <= {"even", "floor"}
    assert {rule.weight.scale_rule for rule in rules if rule.weight} == {"even"}
    tried = [line for line in caplog.messages if line.startswith("floor for")]
    assert len(tried) == 4 + 2  # inputs of q, o, gate and down; k and v
    assert not any(line.startswith("mase_int for") for line in caplog.messages)


def test_what_is_there_already_is_not_tried_again(caplog):
    caplog.set_level("INFO", logger="mxlab")
    found(candidates=("none",))
    assert len(caplog.messages) == 1


def test_a_model_of_a_search_is_saved_with_what_was_found(tmp_path):
    model = quantized({"search": {"transforms": list(CANDIDATES), "tokens": 96}, "gptq": {}}, linear=None, kv=None)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_search_that_was_kept_is_not_repeated(tmp_path, monkeypatch):
    from mxlab.ptq.resume import Progress

    asked = recipe(linear=None, kv=None, algorithms={"search": {"transforms": ["none", "hadamard"]}, "gptq": {}})
    windows = Windows(IDS, 2, IDS[:4])

    def run():
        progress = Progress(tmp_path / "kept", {}, resume=True)
        return quantize_model(tiny().eval(), tiny().eval(), asked, windows, progress).recipe

    first = run()
    monkeypatch.setattr("mxlab.ptq.pipeline.searched", None)
    assert run() == first
    assert "search" not in first.algorithms


def test_no_candidate_that_fits_names_the_layer():
    with pytest.raises(ConversionError, match=r"layers\.0\..*none of the transforms hadamard@7 fits it"):
        found(candidates=("hadamard@7",))


def test_candidates_that_cannot_be_read_are_named():
    with pytest.raises(SpecError, match="transform is 'rotate'"):
        recipe(algorithms={"search": {"transforms": ["rotate"]}})
    with pytest.raises(SpecError, match="rules is 'best'"):
        recipe(algorithms={"search": {"rules": ["best"]}})
    with pytest.raises(SpecError, match="must be a list of their names"):
        recipe(algorithms={"search": {"transforms": []}})


def test_a_scale_rule_leaves_the_formats_of_the_phases_as_they_are():
    rules = [
        {"part": "mlp", "weight": "fp4_e2m1@16", "activation": "fp4_e2m1@16", "phase": "prefill"},
        {"part": "mlp", "weight": "fp4_e2m1@16", "activation": "fp8_e4m3@16", "phase": "decode"},
    ]
    asked = Recipe.from_dict({"name": "a", "rules": rules})
    for phase, element in (("prefill", "fp4_e2m1"), ("decode", "fp8_e4m3")):
        given = searched(tiny().eval(), asked, Search(("none",), rules=("ceil", "rceil"), tokens=96), IDS)
        of_phase = [rule for rule in given.rules if rule.phase == phase and rule.activation]
        assert of_phase
        assert all(str(rule.activation).startswith(element) for rule in of_phase)
