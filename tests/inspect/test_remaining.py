"""What a calibrated model still loses: that a part left out is unquantized, and nothing else changes."""

import json

import pytest
import torch
from ptq.test_pipeline import IDS, quantized, recipe
from transformers import AutoModelForCausalLM

from mxlab.errors import ConversionError, SpecError
from mxlab.eval.text import TextRequest
from mxlab.inspect.parts import cut
from mxlab.inspect.remaining import _Saved, remaining
from mxlab.inspect.run import run, run_remaining
from mxlab.model.apply import apply
from mxlab.model.saved import conversion_of
from mxlab.recipe import Recipe

from support.llama import tiny

DISTILLED = {"gptq": {}, "distillation": {"steps": 4, "check": 2, "rate": 0.05, "vector_rate": 0.01}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    quantized(DISTILLED, linear="wush@16").save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def test_with_nothing_left_out_it_is_the_same_model(saved):
    model, original = AutoModelForCausalLM.from_pretrained(saved), tiny().eval()
    whole, _ = cut(original, conversion_of(model).recipe)
    again = _Saved(conversion_of(model)).under(whole, original)
    apply(again, whole)
    assert torch.equal(logits(again), logits(model))


def test_a_part_that_is_left_out_is_not_rounded(saved):
    model, original = AutoModelForCausalLM.from_pretrained(saved), tiny().eval()
    _, cuts = cut(original, conversion_of(model).recipe)
    [weights] = [c.without for c in cuts if c.name == "weights"]
    again = _Saved(conversion_of(model)).under(weights, original)
    apply(again, weights)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    [ours, theirs] = (m.model.layers[1].mlp.up_proj for m in (again, original))
    exact = ours.mx.transformed(x, -1, ours.input_transform) @ ours.weight.t()
    assert torch.allclose(exact, theirs(x), atol=1e-5)
    [kv] = [c.without for c in cuts if c.name == "KV"]
    again = _Saved(conversion_of(model)).under(kv, original)
    apply(again, kv)
    assert torch.equal(again.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


def test_what_is_found(saved):
    model, original = AutoModelForCausalLM.from_pretrained(saved), tiny().eval()
    before = logits(model), logits(original)
    found = remaining(model, original, IDS)
    wanted, got = (
        x[:, :-1].log_softmax(-1) for x in (before[1], before[0])
    )  # the last token's prediction is not scored
    assert found.whole.kl.value == pytest.approx((wanted.exp() * (wanted - got)).sum(-1).mean().item(), rel=1e-4)
    assert {part.name for part in found.of("role")} == {"weights", "activations", "KV", "q"}
    assert [part.name for part in found.of("layer")] == ["0", "1"]
    assert all(part.saved.kl.value < found.whole.kl.value for part in found.parts)
    assert max(found.of("role"), key=lambda part: part.saved.kl.value).saved.kl.value > 0
    assert [places for places, _ in found.positions] == ["1", "2-3", "4-7", "8-15", "16-23"]
    assert all(torch.equal(a, b) for a, b in zip(before, (logits(model), logits(original)), strict=True))


def test_activations_alone_are_all_to_blame(tmp_path):
    rules = [{"part": part, "activation": "fp4_e2m1@16"} for part in ("mlp", "attention")]
    model = tiny().eval()
    apply(model, Recipe.from_dict({"name": "a", "rules": rules}))
    found = remaining(model, tiny().eval(), IDS)
    [activations] = found.of("role")
    assert activations.saved == found.whole


def test_an_unquantized_model_has_lost_nothing():
    with pytest.raises(SpecError, match="not quantized"):
        remaining(tiny().eval(), tiny().eval(), IDS)


def request(model, **more):
    return TextRequest(
        recipe=recipe(linear="wush@16", algorithms=DISTILLED),
        model=str(model),
        text="passages",
        window=16,
        windows=2,
        **more,
    )


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setattr("mxlab.inspect.run.texts.encode", lambda tokenizer, text: IDS.flatten())


def load(monkeypatch, saved):
    from types import SimpleNamespace

    def loaded(name, *_, **__):
        model = AutoModelForCausalLM.from_pretrained(saved) if name == str(saved) else tiny().eval()
        return SimpleNamespace(model=model, tokenizer=None)

    monkeypatch.setattr("mxlab.inspect.run.models.load_model", loaded)
    monkeypatch.setattr("mxlab.inspect.run.models.identity", lambda name: "a model")


def test_a_folder_is_written(saved, tmp_path, text, monkeypatch):
    load(monkeypatch, saved)
    folder, found = run_remaining(request(saved, reference="tiny"), tmp_path / "out")
    assert {"roles.csv", "layers.csv", "projections.csv", "positions.csv", "inspection.md"} <= {
        path.name for path in folder.iterdir()
    }
    values = json.loads((folder / "inspection.json").read_text())
    assert values["whole"]["kl"]["value"] == found.whole.kl.value
    assert "whole model" in (folder / "inspection.md").read_text()


def test_a_quantized_model_without_its_reference_is_an_error(saved, tmp_path, text, monkeypatch):
    load(monkeypatch, saved)
    with pytest.raises(SpecError, match=r"quantized already.*--reference"):
        run(request(saved), tmp_path / "out")


def test_an_unquantized_model_beside_a_reference_is_an_error(saved, tmp_path, text, monkeypatch):
    load(monkeypatch, saved)
    with pytest.raises(SpecError, match=r"tiny is not quantized.*leave --reference"):
        run_remaining(request("tiny", reference="tiny"), tmp_path / "out")


def test_another_recipe_than_the_models_own_is_an_error(saved, tmp_path, text, monkeypatch):
    load(monkeypatch, saved)
    other = TextRequest(
        recipe=recipe(linear=None), model=str(saved), text="passages", window=16, windows=2, reference="t"
    )
    with pytest.raises(ConversionError, match="quantized already"):
        run_remaining(other, tmp_path / "out")


def test_a_reference_of_another_shape_is_an_error(saved):
    with pytest.raises(SpecError, match=r"is \(\d+, \d+\), and the reference has one of .*made from"):
        remaining(AutoModelForCausalLM.from_pretrained(saved), tiny(intermediate_size=128).eval(), IDS)
