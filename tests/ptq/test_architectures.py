"""Transforms and algorithms on many architectures: what changes nothing there, and that every layer is chosen."""

import copy

import pytest
import torch

import mxlab
from mxlab.errors import ConversionError
from mxlab.model.apply import prepare, prepare_to_observe
from mxlab.model.observe import observe_inputs
from mxlab.ptq import wush
from mxlab.ptq.calibration import Windows
from mxlab.ptq.pipeline import quantize_model
from mxlab.ptq.search import with_matrices
from mxlab.ptq.sites import by_outputs
from mxlab.recipe import Recipe

from support.architectures import IS_OLD, MODELS, build, run, tokens

FINE = "integer,width=31,frac=24"  # to 2^-24: no rounding that matters
STACKED = () if IS_OLD else ("mixtral",)  # models with experts in one tensor
IDS = tokens(24, 6)


def recipe(fmt, linear=None, kv=None, offset=False, parts=("mlp", "attention"), **more) -> Recipe:
    rules = [{"part": part, "weight": fmt, "activation": fmt, "transform": linear} for part in parts]
    rules.append({"part": "attention", "k": fmt, "v": fmt, "transform": kv, "k_offset": offset})
    return Recipe.from_dict({"name": "a", "rules": [{k: v for k, v in r.items() if v} for r in rules], **more})


def nearly(found, wanted):
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("linear", ["hadamard@4", "hadamard"])
def test_a_rotation_changes_nothing_without_rounding(name, linear):
    model = build(name)
    before = run(model)
    mxlab.apply(model, recipe(FINE, linear, "hadamard"))
    nearly(run(model), before)


@pytest.mark.parametrize("name", MODELS)
def test_a_fitted_transform_changes_nothing_without_rounding(name):
    original = build(name)
    before, model = run(original), copy.deepcopy(original)
    parts = ("attention",) if name in STACKED else ("mlp", "attention")
    wanted, inputs = recipe(FINE, "wush@8", parts=parts), {}
    with observe_inputs(prepare_to_observe(original, wanted), lambda site, x: inputs.update({site.name: x.clone()})):
        run(original)
    conversion = prepare(model, wanted)
    for site in conversion.linears:
        x = inputs.get(site.name, torch.zeros(1, site.shape[site.input_axis]))  # an expert that no token chose
        with_matrices(site, wush.fit([by_outputs(site)], x, 8))
    nearly(run(model), before)


@pytest.mark.parametrize("name", MODELS)
def test_an_offset_of_keys_changes_nothing_without_rounding(name):
    model = build(name)
    before = run(model)
    quantize_model(model, build(name), recipe(FINE, kv="hadamard", offset=True, parts=()), Windows(IDS, 2, IDS))
    nearly(run(model), before)
    offsets = [value for key, value in model.state_dict().items() if key.endswith("k_offset")]
    assert len(offsets) == 2
    assert all(value.abs().max() > 0 for value in offsets)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("correction", [0.0, 0.5])
def test_gptq_chooses_every_weight_or_says_what_it_leaves(name, correction, caplog):
    algorithms = {"gptq": {"correction": correction}}
    model = build(name)
    wanted = recipe("fp4_e2m1@8", "hadamard@8", "hadamard", algorithms=algorithms)
    if name == "mixtral" and correction:
        with pytest.raises(ConversionError, match="correction"):
            quantize_model(model, build(name), wanted, Windows(IDS, 2, IDS))
        return
    conversion = quantize_model(model, build(name), wanted, Windows(IDS, 2, IDS))
    assert torch.isfinite(run(model)).all()
    nearest = build(name)
    mxlab.apply(nearest, recipe("fp4_e2m1@8", "hadamard@8", "hadamard"))
    rounded = dict(nearest.named_parameters())
    alike = [s.name for s in conversion.linears if torch.equal(s.weight, rounded[f"{s.module_name}.{s.parameter}"])]
    assert all(any(site in line for line in caplog.messages) for site in alike[:3])
