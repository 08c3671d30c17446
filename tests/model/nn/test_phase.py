"""Prefill and decode: formats of their own for each phase of generation, and which passes are which."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mxlab
from mxlab.model.nn.forward import override_of

from support.architectures import CAUSAL, LAYERS, build, run, tokens

FP4, FP6, INT4 = (mxlab.MXFormat(element, 8) for element in ("fp4_e2m1", "fp6_e2m3", "int4"))
Rule = mxlab.Rule
PHASES = mxlab.Recipe(
    "test",
    (
        Rule(part="mlp", phase="prefill", weight=FP4, activation=FP6),
        Rule(part="mlp", phase="decode", weight=INT4, activation=FP4),
        Rule(part="attention", phase="prefill", k=FP4, v=FP6),
        Rule(part="attention", phase="decode", k=INT4, v=FP4),
    ),
)
LAYER = "model.layers.1.mlp.down_proj"


class Inputs:
    """What goes into one layer and comes out of it, pass by pass."""

    def __init__(self, model: nn.Module, name: str = LAYER) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output: self.seen.append((args[0], output))
        )


def converted(recipe: mxlab.Recipe = PHASES, name: str = "llama"):
    raw = build(name)
    model = copy.deepcopy(raw)
    mxlab.apply(model, recipe)
    return raw, model


def computed(raw, x: torch.Tensor, weight, activation) -> torch.Tensor:
    w = raw.get_submodule(LAYER).weight
    return F.linear(mxlab.quantize(x, activation), mxlab.quantize(w, weight))


def generate(model, length: int = 5, new: int = 3, **more):
    return model.generate(tokens(length, 1), max_new_tokens=new, min_new_tokens=new, do_sample=False, **more)


def test_each_phase_computes_with_its_formats():
    raw, model = converted()
    inputs = Inputs(model)
    generate(model, use_cache=True)
    assert [x.shape[1] for x, _ in inputs.seen] == [5, 1, 1]
    for n, (x, y) in enumerate(inputs.seen):
        torch.testing.assert_close(y, computed(raw, x, *((INT4, FP4) if n else (FP4, FP6))))
    assert torch.equal(model.get_submodule(LAYER).weight, raw.get_submodule(LAYER).weight)


@pytest.mark.parametrize("name", CAUSAL)
def test_keys_and_values_of_each_phase(name):
    model = build(name)
    conversion = mxlab.apply(model, mxlab.Recipe("test", PHASES.rules[2:]))
    seen = []
    for site in conversion.attentions:
        attention = override_of(site.module)
        attention.set_observer("", lambda role, x, _, a=attention: seen.append((role, a.formats[role], x.shape[2])))
    generate(model, use_cache=True)
    first = [item for _ in range(LAYERS) for item in (("k", FP4, 5), ("v", FP6, 5))]
    later = [item for _ in range(LAYERS) for item in (("k", INT4, 1), ("v", FP4, 1))]
    assert seen == first + later + later


def test_without_a_cache_every_pass_is_prefill():
    raw, model = converted()
    inputs = Inputs(model)
    generate(model, use_cache=False)
    run(model, tokens(1))  # one token, an empty cache
    run(model, tokens(1), use_cache=False)
    assert [x.shape[1] for x, _ in inputs.seen] == [5, 6, 7, 1, 1]
    for x, y in inputs.seen:
        torch.testing.assert_close(y, computed(raw, x, FP4, FP6))


def test_several_tokens_after_a_cache_are_prefill():
    raw, model = converted()
    with torch.no_grad():
        cache = model(tokens(4), use_cache=True).past_key_values
        inputs = Inputs(model)
        cache = model(tokens(3), past_key_values=cache).past_key_values
        model(inputs_embeds=torch.randn(2, 1, 32), past_key_values=cache)
    (x, y), (x1, y1) = inputs.seen
    torch.testing.assert_close(y, computed(raw, x, FP4, FP6))
    torch.testing.assert_close(y1, computed(raw, x1, INT4, FP4))


def test_a_batch_with_padding():
    raw, model = converted()
    ids = tokens(5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    inputs = Inputs(model)
    model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    for n, (x, y) in enumerate(inputs.seen):
        torch.testing.assert_close(y, computed(raw, x, *((INT4, FP4) if n else (FP4, FP6))))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_one_phase_alone(phase):
    raw, model = converted(mxlab.Recipe("test", (Rule(part="mlp", phase=phase, weight=INT4),)))
    inputs, plain = Inputs(model), raw.get_submodule(LAYER)
    generate(model, use_cache=True)
    for n, (x, y) in enumerate(inputs.seen):
        is_quantized = (phase == "decode") == (n > 0)
        weight = mxlab.quantize(plain.weight, INT4) if is_quantized else plain.weight
        torch.testing.assert_close(y, F.linear(x, weight))


@pytest.mark.parametrize("name", CAUSAL)
def test_the_head_and_the_layers_of_every_architecture_have_phases(name):
    formats = {"prefill": FP4, "decode": INT4}
    rules = (Rule(part=part, phase=phase, output=f) for part in ("attention", "head") for phase, f in formats.items())
    model = build(name)
    conversion = mxlab.apply(model, mxlab.Recipe("test", tuple(rules)))
    seen = []
    for site in conversion.linears:
        site.module.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        cache = model(tokens(4), use_cache=True).past_key_values
        prefilled, seen[:] = list(seen), []
        model(tokens(1), past_key_values=cache)
    assert len(seen) == len(prefilled) == len(conversion.linears)
    for outputs, fmt, other in ((prefilled, FP4, INT4), (seen, INT4, FP4)):
        assert all(torch.equal(y, mxlab.quantize(y, fmt)) for y in outputs)
        assert not any(torch.equal(y, mxlab.quantize(y, other)) for y in outputs)


def test_an_interrupted_pass_is_forgotten():
    raw, model = converted()

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        cache = model(tokens(4), use_cache=True).past_key_values
        handle = model.model.norm.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(tokens(1), past_key_values=cache)
        handle.remove()
    inputs = Inputs(model)
    run(model)
    model.model(tokens(3))
    for x, y in inputs.seen:
        torch.testing.assert_close(y, computed(raw, x, FP4, FP6))


def test_experts_have_phases_too():
    model = build("mixtral")
    mxlab.apply(model, mxlab.Recipe("test", PHASES.rules[:2]))
    other = build("mixtral")
    mxlab.apply(other, mxlab.Recipe("test", (Rule(part="mlp", weight=FP4, activation=FP6),)))
    torch.testing.assert_close(run(model), run(other))
    with torch.no_grad():
        caches = [m(tokens(4), use_cache=True).past_key_values for m in (model, other)]
        decoded = [m(tokens(1), past_key_values=c).logits for m, c in zip((model, other), caches, strict=True)]
    assert not torch.allclose(*decoded, atol=1e-3)


def test_outside_of_a_pass_it_is_prefill():
    raw, model = converted()
    layer = model.get_submodule(LAYER)
    generate(model)
    x = torch.randn(1, 1, 48)
    torch.testing.assert_close(layer(x), computed(raw, x, FP4, FP6))

    def fail(*_):
        raise ValueError("stop")

    with torch.no_grad():
        cache = model(tokens(4), use_cache=True).past_key_values
        handle = model.model.norm.register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="stop"):
            model(tokens(1), past_key_values=cache)
        handle.remove()
    torch.testing.assert_close(layer(x), computed(raw, x, FP4, FP6))


def test_copies_have_a_phase_of_their_own():
    _, model = converted()
    expected = generate(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.get_submodule(LAYER).phase is not model.get_submodule(LAYER).phase
        assert twin.get_submodule(LAYER).phase is twin.model.layers[0].mlp.up_proj.phase
        assert torch.equal(generate(twin), expected)


def test_threads_have_a_phase_each():
    """One thread is held inside a decoding pass while another one prefills."""
    raw, model = converted()
    inside, done = threading.Event(), threading.Event()
    results = {}

    def hold(module, args):
        if args[0].shape[1] == 1:
            inside.set()
            assert done.wait(60)

    handle = model.get_submodule(LAYER).register_forward_pre_hook(hold)
    inputs = Inputs(model)

    def decode():
        with torch.no_grad():
            cache = model(tokens(4), use_cache=True).past_key_values
            results["decode"] = model(tokens(1), past_key_values=cache).logits

    thread = threading.Thread(target=decode)
    thread.start()
    assert inside.wait(60)
    run(model, tokens(6))
    done.set()
    thread.join()
    handle.remove()
    by_length = {x.shape[1]: (x, y) for x, y in inputs.seen}
    torch.testing.assert_close(by_length[6][1], computed(raw, by_length[6][0], FP4, FP6))
    torch.testing.assert_close(by_length[1][1], computed(raw, by_length[1][0], INT4, FP4))


def test_training_is_prefill_and_keeps_the_master():
    raw, model = converted()
    model.train()
    inputs = Inputs(model)
    logits = model(tokens()).logits
    torch.testing.assert_close(inputs.seen[0][1], computed(raw, inputs.seen[0][0], FP4, FP6))
    logits.square().mean().backward()
    layer = model.get_submodule(LAYER)
    assert layer.weight.grad.any()
    with torch.no_grad():
        layer.weight.sub_(layer.weight.grad)
    model.eval()
    inputs.seen.clear()
    run(model)
    x, y = inputs.seen[0]
    torch.testing.assert_close(y, F.linear(mxlab.quantize(x, FP6), mxlab.quantize(layer.weight, FP4)))


def test_bits_of_both_phases_count():
    _, model = converted()
    conversion = mxlab.apply(build("llama"), PHASES)
    total = sum(p.numel() for p in model.parameters())
    mlp = LAYERS * 3 * 32 * 48
    # The master stays in memory, and each phase has a copy: FP4 and INT4 both take 4 bits and an eighth of a byte.
    assert conversion.bits_per_parameter == pytest.approx((total * 32 + mlp * 2 * (4 + 8 / 8)) / total)


def test_it_compiles():
    _, model = converted()
    expected = run(model, use_cache=False)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, expected)
        caches = [m(tokens(4), use_cache=True).past_key_values for m in (model, model)]
        one, other = (m(tokens(1), past_key_values=c).logits for m, c in zip((model, compiled), caches, strict=True))
    torch.testing.assert_close(one, other)
