"""A head tied to the embedding: the embedding stays, and the head computes with a quantized copy of it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mxlab
from mxlab.model.nn.linear import MxConv1D, MxLinear

from support.architectures import build, run, tokens

FP4, FP6 = mxlab.MXFormat("fp4_e2m1", 8), mxlab.MXFormat("fp6_e2m3", 8)
HEAD = mxlab.Recipe("test", (mxlab.Rule(name="lm_head", weight=FP4, activation=FP6),))
TIED = ["qwen2.5", "gpt2", "gemma", "opt"]


def converted(recipe: mxlab.Recipe | str = HEAD, name: str = "qwen2.5", **more):
    model = build(name, **more)
    return copy.deepcopy(model), model, mxlab.apply(model, recipe)


def check(model, embedding: torch.Tensor) -> None:
    """The head computes with the quantized ``embedding``, which is what the model embeds with."""
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, embedding)
    x = torch.randn(3, embedding.shape[1]).to(embedding)
    expected = F.linear(mxlab.quantize(x, FP6), mxlab.quantize(embedding, FP4))
    torch.testing.assert_close(model.lm_head(x), expected)


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("recipe", [HEAD, "all_linears"], ids=["rule", "all_linears"])
def test_the_embedding_stays(name, recipe):
    raw, model, conversion = converted(recipe, name)
    head = model.lm_head
    assert type(head) is MxLinear
    assert torch.equal(head.weight, raw.lm_head.weight)
    assert head.weight is model.get_input_embeddings().weight
    [site] = [site for site in conversion.linears if site.name == "lm_head"]
    assert f"the weight of lm_head is tied to {site.tied_to}, which stays unchanged" in conversion.summary()
    x = torch.randn(3, 32)
    formats = site.formats
    expected = F.linear(mxlab.quantize(x, formats["activation"]), mxlab.quantize(raw.lm_head.weight, formats["weight"]))
    torch.testing.assert_close(head(x), expected)
    assert run(model).isfinite().all()


def test_it_is_logged(caplog):
    with caplog.at_level("INFO", logger="mxlab"):
        converted()
    assert "lm_head computes with a quantized copy" in caplog.text


def test_the_copy_is_made_once(monkeypatch):
    from mxlab.model.nn import operands

    _, model, _ = converted()
    calls = []

    def counted(x, fmt, **more):
        calls.append(fmt)
        return mxlab.quantize(x, fmt, **more)

    monkeypatch.setattr(operands, "quantize", counted)
    for _ in range(3):
        run(model)
    assert calls.count(FP4) == 1


def test_saving_keeps_the_master(tmp_path):
    raw, model, _ = converted()
    run(model)
    model.save_pretrained(tmp_path)
    loaded = type(raw).from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, raw.lm_head.weight)
    assert all(torch.equal(v, raw.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("how", ["written", "loaded", "assigned", "replaced", "replaced in place", "optimizer"])
def test_a_change_renews_the_copy(how):
    _, model, _ = converted()
    run(model)
    new = torch.randn_like(model.lm_head.weight)
    if how == "written":
        with torch.no_grad():
            model.lm_head.weight.copy_(new)
    elif how in ("loaded", "assigned"):
        state = {
            k: new if k in ("lm_head.weight", "model.embed_tokens.weight") else v for k, v in model.state_dict().items()
        }
        model.load_state_dict(state, assign=how == "assigned")
        model.tie_weights()
    elif how == "replaced":
        model.model.embed_tokens.weight = model.lm_head.weight = nn.Parameter(new)
    elif how == "replaced in place":  # freed first: the new one may get the old one's memory
        del model.model.embed_tokens.weight, model.lm_head.weight
        model.model.embed_tokens.weight = model.lm_head.weight = nn.Parameter(new)
    else:
        model.lm_head.weight.grad = model.lm_head.weight.detach() - new
        torch.optim.SGD([model.lm_head.weight], lr=1.0).step()
        new = model.lm_head.weight.detach().clone()
    check(model, new)


def test_another_weight_at_the_old_ones_address():
    _, model, _ = converted()
    run(model)
    old = model.lm_head.weight
    old.data.mul_(2)  # not counted by torch
    model.model.embed_tokens.weight = model.lm_head.weight = nn.Parameter(old.data)
    assert model.lm_head.weight.data_ptr() == old.data_ptr()
    check(model, old.detach().clone())


@pytest.mark.parametrize("how", ["bfloat16", "deepcopy", "pickle", "double and back"])
def test_moves_and_copies(how):
    raw, model, _ = converted()
    run(model)
    if how == "bfloat16":
        raw, model = raw.bfloat16(), model.bfloat16()
    elif how == "double and back":
        model = model.double().float()
    else:
        model = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    check(model, raw.lm_head.weight)


def test_a_copy_is_independent():
    raw, model, _ = converted()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    check(twin, raw.lm_head.weight * 2)
    check(model, raw.lm_head.weight)


def test_training_a_tied_head():
    """The gradient of both uses arrives in the one parameter: straight through the head's rounding."""
    raw, model, _ = converted()
    embedding = nn.Parameter(raw.lm_head.weight.detach().clone())
    model.train()
    ids = tokens()
    model(ids).logits.square().mean().backward()
    x = raw.model(ids).last_hidden_state
    quantized = lambda t, fmt: t + (mxlab.quantize(t, fmt) - t).detach()  # noqa: E731
    F.linear(quantized(x, FP6), quantized(embedding, FP4)).square().mean().backward()
    expected = embedding.grad + raw.lm_head.weight.grad
    torch.testing.assert_close(model.lm_head.weight.grad, expected)


def test_a_tied_conv1d_has_a_copy_too():
    model = build("gpt2")
    first, second = (model.transformer.h[n].mlp.c_fc for n in (0, 1))
    second.weight = first.weight
    before = first.weight.detach().clone()
    mxlab.apply(model, mxlab.Recipe("test", (mxlab.Rule(r".*c_fc", weight=FP4),)))
    assert type(first) is MxConv1D
    assert torch.equal(first.weight, before)
    x = torch.randn(3, 32)
    for layer in (first, second):
        torch.testing.assert_close(layer(x), x @ mxlab.quantize(before, FP4, axis=0) + layer.bias)


def test_bits_of_a_tied_head_are_those_of_both():
    _, model, conversion = converted()
    total = sum(p.numel() for p in model.parameters())
    assert conversion.bits_per_parameter == pytest.approx((total * 32 + 64 * 32 * (4 + 8 / 8)) / total)


def test_an_activation_alone_needs_no_copy():
    _, model, conversion = converted(mxlab.Recipe("test", (mxlab.Rule(name="lm_head", activation=FP6),)))
    assert "tied" not in conversion.summary()
    x = torch.randn(3, 32)
    torch.testing.assert_close(model.lm_head(x), F.linear(mxlab.quantize(x, FP6), model.lm_head.weight))
