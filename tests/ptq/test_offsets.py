"""Offsets of keys: the means that they promise, scores that stay what they are, and what is saved and refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import mxlab
from mxlab.errors import ConversionError, SpecError
from mxlab.model.saved import conversion_of
from mxlab.ptq.calibration import Windows
from mxlab.ptq.divergence import divergence
from mxlab.ptq.pipeline import quantize_model
from mxlab.recipe import Recipe

from support.llama import tiny

FINE = "integer,width=31,frac=24"  # to 2^-24: no rounding that matters
IDS = torch.randint(0, 60, (6, 24), generator=torch.Generator().manual_seed(0))


def recipe(k="int4@16", offset=True, **more) -> Recipe:
    return Recipe.from_dict({"name": "a", "rules": [{"part": "attention", "k": k, "k_offset": offset, **more}]})


def shifted():
    """Return a model whose keys are far from zero in the mean."""
    model = tiny(attention_bias=True).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.copy_(torch.linspace(-3, 3, layer.self_attn.k_proj.out_features))
    return model


def quantized(wanted, model=None):
    model, original = model or shifted(), shifted()
    quantize_model(model, original, wanted, Windows(IDS, 2, IDS))
    return model


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("transform", ["hadamard", None])
def test_without_rounding_it_changes_nothing(transform):
    before = logits(shifted())
    more = {"transform": transform} if transform else {}
    after = logits(quantized(recipe(FINE, **more)))
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


@torch.no_grad()
def test_it_is_the_mean_of_the_keys_of_what_is_not_held_out():
    cache = shifted()(IDS[:4], use_cache=True).past_key_values
    found = quantized(recipe()).model.layers[0].self_attn.k_offset
    wanted = cache.layers[0].keys.mean((0, 2)).unsqueeze(1)
    assert torch.allclose(found, wanted, rtol=2**-8, atol=1e-6)
    assert torch.equal(found, found.bfloat16().float())


def test_it_brings_a_model_with_keys_far_from_zero_nearer():
    lost = [divergence(quantized(recipe(offset=offset)), shifted(), IDS) for offset in (True, False)]
    assert lost[0] < 0.8 * lost[1]


@torch.no_grad()
def test_one_token_at_a_time_sees_the_same_offset():
    model = quantized(recipe())
    whole = logits(model, IDS[:1])
    cache, parts = None, []
    for token in IDS[:1].split(1, dim=1):
        out = model(token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


def test_a_saved_model_is_loaded_with_it(tmp_path):
    model = quantized(recipe())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.model.layers[1].self_attn.k_offset.abs().max() > 0


def test_it_is_refused_where_nothing_was_fitted_or_there_is_no_key():
    model = shifted()
    with pytest.raises(ConversionError, match=r"asks for k_offset, which is fitted by calibration.*use mxlab quantize"):
        mxlab.apply(model, recipe())
    mxlab.apply(model, "ex2")  # it is unchanged
    with pytest.raises(SpecError, match="says k_offset but gives no format for k"):
        Recipe.from_dict({"name": "a", "rules": [{"part": "attention", "v": "int4@16", "k_offset": True}]})


def test_keys_that_are_not_numbers_are_named():
    model = shifted()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.bias[3] = torch.nan
    with pytest.raises(ConversionError, match=r"layers\.1\.self_attn inputs that are NaN"):
        quantized(recipe(), model)


def test_it_is_counted():
    plain, model = (conversion_of(quantized(recipe(offset=offset))) for offset in (False, True))
    parameters = sum(p.numel() for p in shifted().parameters())
    elements = sum(buffer.numel() for name, buffer in model.model.named_buffers() if name.endswith("k_offset"))
    assert (model.bits_per_parameter - plain.bits_per_parameter) * parameters == pytest.approx(16 * elements, rel=1e-3)
