"""Reconstruction of decoder layers: what it wins, never worse than before, resumed, and on which models it works."""

import pytest
import torch
from ptq.test_pipeline import IDS, logits, recipe

from mxlab.errors import ConversionError, SpecError
from mxlab.ptq import reconstruction
from mxlab.ptq.blocks import BlockStream, decoder_layers
from mxlab.ptq.calibration import Windows
from mxlab.ptq.pipeline import quantize_model
from mxlab.ptq.resume import Progress, describe
from mxlab.ptq.streams import forward
from mxlab.recipe import Recipe

from support.architectures import MODELS, build, tokens
from support.llama import tiny

WINDOWS = Windows(IDS, 2, IDS[:4])


def learned(options, windows=WINDOWS, progress=None, **ways):
    model = tiny().eval()
    algorithms = {"gptq": {}, **({} if options is None else {"reconstruction": options})}
    quantize_model(model, tiny().eval(), recipe(algorithms=algorithms, **ways), windows, progress)
    return model


@torch.no_grad()
def lost(model, windows):
    """Return what the first layer's output has lost on some windows, every token counting alike."""
    found, wanted = (
        m(windows, use_cache=False, output_hidden_states=True).hidden_states[1] for m in (model, tiny().eval())
    )
    return float(((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())


@pytest.mark.parametrize("linear", ["wush@16", "hadamard@16", None])
def test_the_output_comes_nearer(linear):
    windows = Windows(IDS[[0, 1, 2, 0, 1, 2]], 3, IDS[:3])
    before, after = (learned(options, windows, linear=linear) for options in (None, {"steps": 60, "rate": 0.02}))
    assert lost(after, IDS[:3]) < 0.97 * lost(before, IDS[:3])


def test_weights_stay_on_the_grid():
    layer = learned({"steps": 10, "rate": 0.1}, linear=None).model.layers[1].mlp.down_proj
    before = learned(None, linear=None).model.layers[1].mlp.down_proj
    assert not torch.equal(layer.weight, before.weight)
    ratios = layer.weight.unflatten(-1, (-1, 16)) / layer.weight.unflatten(-1, (-1, 16)).abs().amax(-1, keepdim=True)
    elements = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    steps = (elements[:, None] / elements[1:]).unique()
    assert all((steps - r).abs().min() < 1e-6 for r in ratios.abs().unique())


def test_nothing_worse_is_kept():
    before, after = (learned(o) for o in (None, {"steps": 3, "check": 1, "rate": 0.9, "transform_rate": 0.9}))
    assert lost(after, IDS[4:]) <= lost(before, IDS[4:])


def test_a_diverging_rate_is_stopped_and_said(monkeypatch, caplog):
    monkeypatch.setattr(reconstruction._Layer, "accumulate", lambda self, step, batch: float("nan"))
    assert torch.equal(logits(learned({"steps": 3})), logits(learned(None)))
    assert "reconstruction.model.layers.0 diverges in step 1: the best state before it is kept" in caplog.text


@pytest.mark.parametrize("distilled", [False, True])
def test_killed_between_layers_it_goes_on_with_the_same_bits(distilled, tmp_path, monkeypatch):
    options = {"gptq": {}, "reconstruction": {"steps": 4, "rate": 0.02}}
    if distilled:
        options["distillation"] = {"steps": 4, "check": 2, "rate": 0.02}
    wanted = recipe(linear="wush@16", algorithms=options)

    def run(folder=None):
        model = tiny().eval()
        progress = Progress(folder, describe(model, wanted, WINDOWS, "1"), True)
        quantize_model(model, tiny().eval(), wanted, WINDOWS, progress)
        return logits(model)

    once = reconstruction._reconstruct_layer
    calls = []

    def killed(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        once(*args)

    with monkeypatch.context() as patch:
        patch.setattr(reconstruction, "_reconstruct_layer", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "kept")
    assert torch.equal(run(tmp_path / "kept"), run())


@pytest.mark.parametrize("name", MODELS)
def test_layers_by_themselves_compute_what_they_do_in_their_model(name):
    model, ids = build(name), tokens(16, 3)
    names = decoder_layers(model)
    assert len(names) == 2
    stream = BlockStream(model, names, ids)
    for layer in range(stream.count):
        stream.hidden = stream.outputs(layer)
    after = []
    hook = model.get_submodule(names[-1]).register_forward_hook(lambda m, a, y: after.append(y))
    forward(model, ids)
    hook.remove()
    whole = after[0][0] if isinstance(after[0], tuple) else after[0]
    assert torch.allclose(torch.cat(stream.hidden), whole, rtol=1e-4, atol=1e-5)


def test_layers_that_are_told_of_the_tokens_are_refused():
    model = build("llama")

    def told(module, args, positions):
        return tuple(t * args[0].std() * 99 if args[0].sum() < 0 else t for t in positions)  # by the embedded tokens

    model.model.rotary_emb.register_forward_hook(told)
    with pytest.raises(ConversionError, match=r"more than hidden states.*leave \[algorithms.reconstruction\] out"):
        BlockStream(model, decoder_layers(model), tokens(16, 3))


@pytest.mark.parametrize("options", [{"steps": 0}, {"rate": 1.0}, {"vector_rate": 0.1}, {"check": 1.5}])
def test_options_are_checked(options):
    with pytest.raises(SpecError, match=next(iter(options))):
        Recipe.from_dict({"name": "a", "rules": [], "algorithms": {"reconstruction": options}})
