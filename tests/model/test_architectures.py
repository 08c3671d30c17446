"""Sixteen architectures as tiny models: what recipes convert in each, and what is then computed there."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mxlab
from mxlab.errors import ConversionError
from mxlab.model import sites
from mxlab.model.nn.forward import override_of
from mxlab.recipe.rule import ATTENTION_ROLES

from support.architectures import CAUSAL, IS_OLD, LAYERS, MODELS, WITH_ROPE, build, counts, run, tokens

# The linear layers within a decoder layer, as the architectures' own code names them.
_GATED = r"mlp\.(gate|up|down)_proj"
_QKVO = r"self_attn\.[qkvo]_proj"
NAMES = {
    **dict.fromkeys(["llama", "qwen2", "qwen2.5", "qwen3", "mistral", "gemma", "gemma2"], (_GATED, _QKVO)),
    "phi": (r"mlp\.fc[12]", r"self_attn\.([qkv]_proj|dense)"),
    "phi3": (r"mlp\.(gate_up|down)_proj", r"self_attn\.(qkv|o)_proj"),
    "mixtral": (r"block_sparse_moe\.experts\.\d\.w[123]" if IS_OLD else r"mlp\.experts\.(gate_up|down)_proj", _QKVO),
    "mpt": (r"ffn\.(up|down)_proj", r"attn\.(Wqkv|out_proj)"),
    "gpt_neox": (r"mlp\.dense_(h_to_4h|4h_to_h)", r"attention\.(query_key_value|dense)"),
    "gpt_neo": (r"mlp\.c_(fc|proj)", r"attn\.attention\.([qkv]|out)_proj"),
    "opt": (r"fc[12]", r"self_attn\.([qkv]|out)_proj"),
    "gpt2": (r"mlp\.c_(fc|proj)", r"attn\.c_(attn|proj)"),
    "bert": (r"(intermediate|output)\.dense", r"attention\.(self\.(query|key|value)|output\.dense)"),
}
HEADS_OF_MODELS = {
    "gpt_neox": {"embed_out" if IS_OLD else "lm_head"},
    "bert": {"cls.predictions.transform.dense", "cls.predictions.decoder"},
}
RECIPES = {
    "tier_a": ("fp8_e4m3", None),
    "tier_b": ("fp8_e4m3", "fp8_e4m3"),
    "tier_c": ("fp6_e3m2", "fp8_e4m3"),
    "tier_d": ("fp4_e2m1", "fp6_e3m2"),
    "mlp_only": ("fp8_e4m3", None),
    "all_linears": ("fp8_e4m3", "fp8_e4m3"),
}
FP4, FP6, INT4 = (mxlab.MXFormat(element, 8) for element in ("fp4_e2m1", "fp6_e2m3", "int4"))


def rule(**values) -> mxlab.Recipe:
    return mxlab.Recipe("test", (mxlab.Rule(**values),))


def part_by_name(model: str, layer: str) -> str:
    """``mlp``, ``attention``, ``router`` or ``head``, from the layer's name alone."""
    inside = re.search(r"\.\d+\.(.*)", layer)
    if inside is None:
        return "head"
    parts = [
        part
        for part, pattern in zip(("mlp", "attention"), NAMES[model], strict=True)
        if re.fullmatch(pattern, inside[1])
    ]
    return parts[0] if parts else "router"


# ---- what is found and converted


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_found_and_has_its_part(name):
    found = list(sites.find_sites(build(name)))
    layers = [site for site in found if site.kind != "attention"]
    assert {site.name: site.part for site in layers} == {s.name: part_by_name(name, s.name) for s in layers}
    parts = [site.part for site in layers]
    assert (parts.count("mlp"), parts.count("attention")) == counts(name)
    assert parts.count("router") == (LAYERS if name == "mixtral" else 0)
    assert {s.name for s in layers if s.part == "head"} == HEADS_OF_MODELS.get(name, {"lm_head"})
    assert [site.layer for site in found if site.kind == "attention"] == list(range(LAYERS))
    assert not any(site.obstacle for site in found)


@pytest.mark.parametrize(("name", "recipe"), [(name, recipe) for name in MODELS for recipe in RECIPES])
def test_a_recipe_converts_exactly_its_layers(name, recipe):
    model = build(name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    conversion = mxlab.apply(model, recipe)
    mlp, attention = RECIPES[recipe]
    wanted = {"mlp": mlp, "attention": attention}
    wanted |= dict.fromkeys(["head", "router"], "fp8_e4m3" if recipe == "all_linears" else None)
    all_layers = [site.name for site in sites.find_sites(build(name)) if site.kind != "attention"]
    expected = {n: f for n in all_layers if (f := wanted[part_by_name(name, n)])}
    assert {m.name: m.formats["weight"].element for m in conversion.linears} == expected
    for site in conversion.linears:
        assert set(site.formats.values()) == {mxlab.MXFormat(expected[site.name], rounding="even")}
    assert sorted(conversion.linears_in_high_precision) == sorted(set(all_layers) - set(expected))
    changed = {n.removesuffix(".weight") for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= set(expected)
    assert run(model).isfinite().all()


# ---- what the layers compute


def plain_linear(
    layer: nn.Module, x: Tensor, weight: mxlab.MXFormat | None, activation: mxlab.MXFormat | None
) -> Tensor:
    """The output of an unconverted layer, its operands quantized."""
    is_transposed = type(layer).__name__ == "Conv1D"
    x = x if activation is None else mxlab.quantize(x, activation)
    w = layer.weight if weight is None else mxlab.quantize(layer.weight, weight, axis=0 if is_transposed else -1)
    return F.linear(x, w.T if is_transposed else w, layer.bias)


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_computes_with_its_formats(name):
    raw = build(name)
    model = copy.deepcopy(raw)
    formats = {"mlp": (FP4, FP6), "attention": (INT4, FP4), "head": (FP6, None)}
    rules = tuple(mxlab.Rule(part=p, weight=w, activation=a) for p, (w, a) in formats.items())
    mxlab.apply(model, mxlab.Recipe("test", rules))
    seen = {}

    def look(layer_name):
        return lambda module, args, output: seen.update({layer_name: (args[0], output)})

    layers = [site.name for site in sites.find_sites(raw) if site.kind == "linear"]
    for layer in layers:
        model.get_submodule(layer).register_forward_hook(look(layer))
    run(model)
    is_idle = {n for n in layers if ".experts." in n}  # an expert that no token chose
    assert set(layers) - set(seen) <= is_idle
    for layer, (x, output) in seen.items():
        expected = plain_linear(raw.get_submodule(layer), x, *formats.get(part_by_name(name, layer), (None, None)))
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


# ---- attention


def serves(name: str, role: str) -> bool:
    """Whether the model, as it is made by default, serves that role of attention."""
    is_fixed = IS_OLD and name == "bert"  # its class is chosen when the model is made
    return name in WITH_ROPE if role == "rope" else not (is_fixed and role in ("p", "softmax"))


ROLES = [(name, role) for name in MODELS for role in ATTENTION_ROLES]


@pytest.mark.parametrize(("name", "role"), [pair for pair in ROLES if serves(*pair)])
def test_a_role_of_attention_acts(name, role):
    model = build(name)
    before = run(model)
    mxlab.apply(model, rule(part="attention", **{role: FP4}))
    assert not torch.allclose(run(model), before, atol=1e-3)


@pytest.mark.parametrize(("name", "role"), [pair for pair in ROLES if not serves(*pair)])
def test_a_role_that_an_attention_lacks_is_refused(name, role):
    model = build(name)
    before, implementation = run(model), model.config._attn_implementation
    why = (
        "takes no position_embeddings: it has no rope" if role == "rope" else "load it with attn_implementation='eager'"
    )
    with pytest.raises(ConversionError, match=why):
        mxlab.apply(model, rule(part="attention", **{role: FP4}))
    assert model.config._attn_implementation == implementation
    assert not any(override_of(m) for m in model.modules())
    assert torch.equal(run(model), before)


@pytest.mark.skipif(not IS_OLD, reason="the model switches by itself")
def test_an_old_bert_loaded_with_eager_attention_serves_all_roles():
    model = build("bert", attn_implementation="eager")
    before = run(model)
    mxlab.apply(model, rule(part="attention", p=FP4, softmax=FP4, q=FP4))
    assert not torch.allclose(run(model), before, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("mpt", "gpt_neo", "gemma2")])
def test_the_query_is_the_same_in_fused_and_in_eager_attention(name):
    results = []
    for implementation in ("sdpa", "eager"):
        model = build(name, attn_implementation=implementation)
        mxlab.apply(model, rule(part="attention", q=FP4))
        assert model.config._attn_implementation == implementation
        results.append(run(model))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_keys_and_values_are_quantized_once_per_token(name):
    model = build(name)
    conversion = mxlab.apply(model, rule(part="attention", k=FP4, v=FP6))
    seen = []
    for site in conversion.attentions:
        attention = override_of(site.module)
        attention.set_observer("", lambda role, x, _, a=attention: seen.append((role, a.formats[role], x.shape[2])))
    model.generate(tokens(5, 1), max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=True)
    expected = [(role, fmt, n) for n in (5, 1, 1, 1) for _ in range(LAYERS) for role, fmt in (("k", FP4), ("v", FP6))]
    assert seen == expected


@pytest.mark.parametrize("name", CAUSAL)
def test_the_logits_are_the_same_with_a_cache_and_without(name):
    model = build(name)
    before = run(model)
    mxlab.apply(model, rule(part="attention", k=FP4, v=FP6, q=INT4))
    ids, cache, steps = tokens(), None, []
    whole = run(model, use_cache=False)
    for first, last in ((0, 6), (6, 7), (7, 8), (8, 10)):
        with torch.no_grad():
            output = model(input_ids=ids[:, first:last], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole, before, atol=1e-3)
