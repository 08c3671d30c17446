"""Lending models: loaded once, and what a borrower does to a copy stays with it."""

import pytest
import torch

from mxlab.model.apply import apply
from mxlab.recipe import load_recipe
from mxlab.sources import devices, models
from mxlab.sources.model_pool import ModelPool


@pytest.fixture
def loads(monkeypatch):
    """The models that were really loaded."""
    names = []
    load = models.load_model
    monkeypatch.setattr(models, "load_model", lambda *args: (names.append(args), load(*args))[1])
    return names


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(20)[None]).logits


def test_copies_of_one_model(tiny_llama, loads):
    pool, key = ModelPool(), (str(tiny_llama), "float32", "cpu")
    first = pool.load(*key)
    before = logits(first.model)
    apply(first.model, load_recipe("ex2"))
    assert not torch.equal(logits(first.model), before)
    second = pool.load(*key)
    assert second.tokenizer is first.tokenizer
    assert torch.equal(logits(second.model), before)
    assert second.model.lm_head.weight is second.model.model.embed_tokens.weight
    assert not second.model.training
    assert loads == [key]


def test_another_model_takes_its_place(tiny_llama, loads):
    pool = ModelPool()
    keys = [(str(tiny_llama), dtype, "cpu") for dtype in ("float32", "bfloat16", "float32")]
    for key in keys:
        assert str(pool.load(*key).model.dtype) == f"torch.{key[1]}"
    assert loads == keys


def test_without_room_the_model_itself_is_lent(tiny_llama, loads, monkeypatch):
    pool, key = ModelPool(), (str(tiny_llama), "float32", "cpu")
    monkeypatch.setattr(devices, "free_memory", lambda device: 1000)
    models_lent = [pool.load(*key).model for _ in range(2)]
    assert models_lent[0] is not models_lent[1]
    assert loads == [key, key]
