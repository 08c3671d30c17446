"""Weights that calibration has chosen, packed: the values stay, whatever scales were searched for."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import mxlab
from mxlab.model.nn.packed import PackedLayer
from mxlab.ptq.calibration import Windows
from mxlab.ptq.pipeline import quantize_model
from mxlab.recipe import Recipe

from support.llama import tiny

IDS = torch.randint(0, 60, (6, 24), generator=torch.Generator().manual_seed(0))


def chosen(fmt, transform, algorithms):
    rules = [
        {"part": part, "weight": fmt, "activation": fmt} | ({"transform": transform} if transform else {})
        for part in ("mlp", "attention")
    ]
    return Recipe.from_dict({"name": "a", "rules": rules, "algorithms": algorithms})


@pytest.mark.parametrize(
    ("fmt", "transform"),
    [
        ("fp4_e2m1@16", None), ("fp4_e2m1@16", "hadamard@16"), ("fp4_e2m1@16", "wush@16"), ("nvfp4", None),
        ("nvfp4", "wush@16"), ("int4@16,scale_rule=mase_int", None), ("fp4_e2m1@16,scale_rule=four_thirds", None),
    ],
)  # fmt: skip
def test_a_calibrated_model_is_packed_saved_and_loaded(tmp_path, fmt, transform):
    recipe = chosen(fmt, transform, {"gptq": {}})
    model, original = tiny().eval(), tiny().eval()
    quantize_model(model, original, recipe, Windows(IDS, 2, IDS))
    values = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("proj.weight")}
    with torch.no_grad():
        assert len(values) == 14
        inputs = {name: torch.randn(5, model.get_parameter(name).shape[1]) for name in values}
        outputs = {name: model.get_submodule(name.removesuffix(".weight"))(x) for name, x in inputs.items()}
        conversion = mxlab.apply(model, recipe, storage="packed")
        after = model(IDS).logits
        layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}
        assert {f"{name}.weight" for name in layers} == set(values)
        for name, layer in layers.items():
            weight = f"{name}.weight"
            assert torch.equal(layer.weight, values[weight])
            assert torch.allclose(layer(inputs[weight]), outputs[weight], atol=1e-5)
        assert mxlab.apply(model, recipe, storage="packed") is conversion
        model.save_pretrained(tmp_path)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, after)
