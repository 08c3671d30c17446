"""Reconstruction of decoder layers: what it wins, never worse than before, resumed, and on which models it works."""

import pytest
import torch
from ptq.test_pipeline import FP4, IDS, logits, recipe

from mxlab.errors import ConversionError, SpecError
from mxlab.model.structure import takes_argument
from mxlab.ptq import reconstruction
from mxlab.ptq.blocks import BlockStream, decoder_layers, recomputing_activations
from mxlab.ptq.calibration import Windows
from mxlab.ptq.learning import learn
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
    learned_again = []
    monkeypatch.setattr(reconstruction, "learn", lambda *args: learned_again.append(args[-1]) or learn(*args))
    again = run(tmp_path / "kept")
    assert learned_again == ["reconstruction.model.layers.1"]
    assert torch.equal(again, run())


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


@pytest.mark.parametrize("name", MODELS)
def test_activations_that_are_computed_again_give_the_same_gradients(name):
    model, ids, kept = build(name), tokens(16, 2), []
    sparing = {"use_cache": False} if takes_argument(model, "use_cache") else {}

    def gradients():
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
            output = model(input_ids=ids, **sparing)
        output[0].float().square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None], sum(kept)

    wanted, all_of_it = gradients()
    kept.clear()
    with recomputing_activations(model):
        found, less = gradients()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert less < all_of_it
    assert not any("forward" in vars(model.get_submodule(layer)) for layer in decoder_layers(model))


def test_layers_without_anything_to_learn_stay():
    rules = [{"part": "mlp", "layers": "1", "weight": FP4, "activation": FP4}]
    wanted = Recipe.from_dict(
        {"name": "a", "rules": rules, "algorithms": {"gptq": {}, "reconstruction": {"steps": 4, "rate": 0.02}}}
    )
    model, before = tiny().eval(), tiny().eval()
    quantize_model(model, tiny().eval(), wanted, WINDOWS)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    assert not torch.equal(model.model.layers[1].mlp.up_proj.weight, before.model.layers[1].mlp.up_proj.weight)


def test_operands_that_are_rounded_at_random_are_refused():
    rules = [{"part": "mlp", "weight": FP4, "activation": "fp4_e2m1@16,rounding=dither"}]
    wanted = Recipe.from_dict({"name": "a", "rules": rules, "algorithms": {"gptq": {}, "reconstruction": {}}})
    with pytest.raises(ConversionError, match=r"activation is rounded at random.*take another rounding"):
        quantize_model(tiny().eval(), tiny().eval(), wanted, WINDOWS)


@pytest.mark.parametrize("found", [float("nan"), float("inf")])
def test_a_first_look_that_is_no_number_keeps_what_was_chosen(found, monkeypatch):
    monkeypatch.setattr(reconstruction._Layer, "judge", lambda self: found)
    assert torch.equal(logits(learned({"steps": 3, "check": 1, "rate": 0.1})), logits(learned(None)))


def test_layers_that_are_told_of_the_tokens_are_refused():
    model = build("llama")

    def told(module, args, positions):
        return tuple(t * args[0].std() * 99 if args[0].sum() < 0 else t for t in positions)  # by the embedded tokens

    model.model.rotary_emb.register_forward_hook(told)
    with pytest.raises(ConversionError, match=r"take more than hidden states.*leave \[algorithms.reconstruction\] out"):
        BlockStream(model, decoder_layers(model), tokens(16, 3))


@pytest.mark.parametrize("options", [{"steps": 0}, {"rate": 1.0}, {"vector_rate": 0.1}, {"check": 1.5}])
def test_options_are_checked(options):
    with pytest.raises(SpecError, match=next(iter(options))):
        Recipe.from_dict({"name": "a", "rules": [], "algorithms": {"reconstruction": options}})
