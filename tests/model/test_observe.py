"""Watching operands: what is shown, once, and what is left unchanged."""

from collections import Counter

import pytest
import torch

from mxlab.formats import MXFormat
from mxlab.model.apply import apply, prepare_to_observe
from mxlab.model.nn.attention import MASKED, QuantizedAttention
from mxlab.model.nn.forward import override_of
from mxlab.model.observe import count_scale_clamps, observe
from mxlab.recipe import Recipe, Rule

from support.architectures import build, run, tokens

FP4, INT8 = MXFormat("fp4_e2m1", 16), MXFormat("int8", 16)
RECIPE = Recipe(
    "all",
    (
        Rule(part="mlp", weight=FP4, activation=INT8, output=INT8),
        Rule(part="attention", weight=FP4, activation=INT8),
        Rule(part="attention", k=INT8, v=INT8, q=INT8, p=INT8, softmax=INT8, rope=INT8),
    ),
)


def seen_in(conversion, ids) -> Counter:
    seen: Counter = Counter()
    with observe(conversion, lambda site, role, x, axis: seen.update([(site.name, role)])):
        run(conversion.model, ids)
    return seen


@pytest.mark.parametrize("install", [apply, prepare_to_observe], ids=["quantized", "unquantized"])
def test_every_operand_that_depends_on_the_input_is_shown_once(install):
    conversion = install(build("llama", attn_implementation="eager"), RECIPE)
    seen = seen_in(conversion, tokens())
    expected = Counter(
        {(s.name, role): 1 for s in conversion.sites for role in s.roles if role not in ("weight", "bias")}
    )
    expected |= Counter({key: 2 for key in expected if key[1] == "rope"})  # cosines and sines
    assert seen == expected
    assert not seen_in_nothing(conversion)


def seen_in_nothing(conversion) -> bool:
    """Whether an observer is left."""
    modules = [override_of(s.module) or s.module for s in conversion.sites]
    return any(module._observers for module in modules)


def test_a_model_that_is_only_observed_computes_as_before():
    plain, watched = (build("llama", attn_implementation="eager") for _ in range(2))
    before = {name: p.clone() for name, p in watched.named_parameters()}
    conversion = prepare_to_observe(watched, RECIPE)
    with observe(conversion, lambda *_: None):
        assert torch.equal(run(watched, tokens()), run(plain, tokens()))
    assert all(torch.equal(p, before[name]) for name, p in watched.named_parameters())


def test_operands_are_those_before_rounding():
    model = build("llama")
    weights = {name: p.clone() for name, p in model.named_parameters()}
    conversion = prepare_to_observe(model, RECIPE)
    shown = {}
    with observe(conversion, lambda site, role, x, axis: shown.setdefault((site.name, role), (x.clone(), axis))):
        run(model, tokens())
    name = "model.layers.0.mlp.down_proj"
    x, axis = shown[name, "activation"]
    y, _ = shown[name, "output"]
    assert axis == -1
    assert torch.equal(y, torch.nn.functional.linear(x, weights[f"{name}.weight"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", [torch.finfo(torch.float16).min, torch.finfo(torch.bfloat16).min, -torch.inf])
def test_masked_scores_are_known_by_their_value_in_every_dtype(dtype, mask):
    """A mask made of float16's least value, and widened afterwards, is a mask, too."""
    attention = build("llama").model.layers[0].self_attn
    quantized = QuantizedAttention(
        "a", attention, "past_key_values", {"prefill": {"softmax": INT8}, "decode": {}}, "exact"
    )
    shown = []
    quantized.set_observer("", lambda role, x, axis: shown.append(x))
    scores = torch.tensor([[1.5, -2.0, 0.25, 3.0]], dtype=dtype)
    masked = scores.clone()
    masked[0, 1] = max(mask, torch.finfo(dtype).min) if mask != -torch.inf else mask
    result = quantized.quantize("softmax", masked)
    assert masked[0, 1] < MASKED
    assert torch.equal(result[0, 1], masked[0, 1])
    assert shown[0].tolist() == [[1.5, 0.0, 0.25, 3.0]]


def test_a_large_negative_key_is_not_masked():
    attention = build("llama").model.layers[0].self_attn
    quantized = QuantizedAttention("a", attention, "past_key_values", {"prefill": {"k": INT8}, "decode": {}}, "exact")
    shown = []
    quantized.set_observer("", lambda role, x, axis: shown.append(x.clone()))
    keys = torch.tensor([[-60000.0, 1.0]])
    quantized.quantize("k", keys)
    assert torch.equal(shown[0], keys)


def test_clamps_are_counted_in_the_first_pass_only():
    conversion = apply(build("llama"), Recipe("kv", (Rule(part="attention", k=INT8, v=INT8),)))
    counts = count_scale_clamps(conversion)
    assert counts["k"]["blocks"] == 0
    run(conversion.model, tokens())
    first = {role: dict(count) for role, count in counts.items()}
    assert first["k"]["blocks"] > 0
    run(conversion.model, tokens())
    assert {role: dict(count) for role, count in counts.items()} == first
    assert not seen_in_nothing(conversion)


def test_the_inputs_of_experts_are_counted():
    model = build("mixtral")
    conversion = apply(model, Recipe("moe", (Rule(part="mlp", weight=FP4, activation=INT8),)))
    counts = count_scale_clamps(conversion)
    run(model, tokens())
    assert counts["activation"]["blocks"] > 0
