"""GPTQ of experts: each by its own tokens, what none reaches, and going on after an interruption."""

import pytest
import torch

import mxlab
from mxlab.errors import ConversionError
from mxlab.model.apply import prepare
from mxlab.ptq.calibration import Windows
from mxlab.ptq.experts import ExpertQuantizer
from mxlab.ptq.pipeline import quantize_model
from mxlab.ptq.resume import Progress
from mxlab.recipe import Recipe
from mxlab.recipe.algorithms import Gptq

from support.architectures import IS_OLD, build, run, tokens

pytestmark = pytest.mark.skipif(IS_OLD, reason="before transformers 5 experts are linear layers")
IDS = tokens(24, 6)
INT4 = "int4@8"


def recipe(algorithms=None, **options) -> Recipe:
    rule = {"part": "mlp", "weight": INT4, "activation": INT4, "transform": "hadamard@8"}
    return Recipe.from_dict({"name": "a", "rules": [rule], "algorithms": algorithms or {"gptq": options}})


def quantized(ids=IDS, progress=None, **options):
    model = build("mixtral")
    quantize_model(model, build("mixtral"), recipe(**options), Windows(ids, 1, ids), progress)
    return model


def nearest():
    model = build("mixtral")
    mxlab.apply(model, Recipe.from_dict({**recipe().to_dict(), "algorithms": {}}))
    return model


def experts(model):
    return [p for name, p in model.named_parameters() if p.ndim == 3]


def test_experts_are_nearer_than_rounded_to_nearest():
    before = run(build("mixtral"), IDS)
    lost = [(run(model, IDS) - before).square().mean() for model in (quantized(), nearest())]
    assert lost[0] < lost[1]
    assert all((a != b).any() for a, b in zip(experts(quantized()), experts(nearest()), strict=True))


def test_their_values_stay_what_they_are():
    model = quantized()
    chosen = [p.clone() for p in experts(model)]
    run(model)
    assert all(torch.equal(a, b) for a, b in zip(chosen, experts(model), strict=True))
    assert model.config._experts_implementation == build("mixtral").config._experts_implementation


def test_a_saved_model_is_loaded_with_them(tmp_path):
    model = quantized()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(experts(again), experts(model), strict=True))


def test_an_expert_that_no_token_reaches_is_rounded_to_nearest_and_named(caplog):
    model, plain = quantized(ids=IDS[:2, :1]), nearest()
    lines = [
        line for line in caplog.messages if "sends no token to" in line and line.split(" of ")[1].startswith("model")
    ]
    assert lines
    for line in lines:
        names, rest = line.split(" of ")
        weights = [m.get_parameter(rest.split(":")[0]) for m in (model, plain)]
        for expert in (int(word) for word in names.replace(",", "").split() if word.isdigit()):
            assert torch.equal(weights[0][expert], weights[1][expert])


def test_what_was_kept_is_not_computed_again(tmp_path, monkeypatch):
    def resumed():
        return quantized(progress=Progress(tmp_path / "kept", {}, resume=True))

    first = resumed()
    monkeypatch.setattr(ExpertQuantizer, "_rounded", None)
    assert all(torch.equal(a, b) for a, b in zip(experts(resumed()), experts(first), strict=True))


def test_several_dampings_are_judged_by_tokens_held_out():
    assert torch.isfinite(run(quantized(damping=[0.01, 1.0]))).all()


def test_a_correction_is_refused():
    with pytest.raises(ConversionError, match=r"experts have no correction.*take correction = 0"):
        quantized(correction=0.5)


LEARNING = {"gptq": {}, "distillation": {"steps": 30, "check": 10, "rate": 0.01, "vector_rate": 0}}


@pytest.mark.parametrize("ids", [IDS, IDS[:, :1]], ids=["all reached", "some reached by nothing"])
def test_experts_learn_on_their_grid(ids):
    def learned(algorithms):
        model = build("mixtral")
        quantize_model(model, build("mixtral"), recipe(algorithms), Windows(ids, 1, ids))
        return model

    before, after = learned({"gptq": {}}), learned(LEARNING)
    assert all((a != b).any() for a, b in zip(experts(before), experts(after), strict=True))
    for weight in experts(after):
        assert ((weight / quantum(weight)).abs() <= 7).all()


def quantum(weight):
    """Return the largest power of two that all values of a block of 8 are multiples of, along the input."""
    blocks = weight.unflatten(-1, (-1, 8))
    scale = torch.full_like(blocks[..., :1], 2.0**10)
    for _ in range(40):
        fits = ((blocks / scale).round() * scale == blocks).all(-1, keepdim=True)
        scale = torch.where(fits, scale, scale / 2)
    return scale.expand_as(blocks).flatten(-2)


def test_experts_that_are_rounded_to_nearest_are_on_the_scales_by_which_they_learn():
    ids = IDS[:2, :1]
    for dtype in (torch.float32, torch.bfloat16):
        model = build("mixtral").to(dtype)
        quantizer = ExpertQuantizer(Gptq(), prepare(model, recipe()), Progress(), learns=True)
        with torch.no_grad(), quantizer.choosing(lambda _: None):
            model(input_ids=ids)
        for chosen in quantizer.chosen:
            assert torch.equal(chosen.rounded(chosen.values.float()).to(dtype), chosen.values)
