"""Caches that keep K and V in codes: the numbers of the grid, whatever a cache or an attention does with them."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, QuantizedCache, StaticCache

import mxlab
from mxlab.errors import ConversionError
from mxlab.formats import MXFormat, parse_format
from mxlab.model.apply import freeze, pack_sites, prepare
from mxlab.model.nn.packed_cache import PackedStates, packed_bytes
from mxlab.model.nn.states import StateGrid
from mxlab.numerics.kernels import attention
from mxlab.recipe import Recipe, Rule
from mxlab.recipe.transform import Derotated, Hadamard

from support.architectures import CAUSAL, build
from support.hybrids import CONFIGS, small
from support.llama import tiny, tokens

FP4, FP6, INT8, NVFP4 = (MXFormat.parse(text) for text in ("fp4_e2m1@16", "fp6_e2m3@16", "int8@16", "nvfp4"))
FORMATS = ["fp4_e2m1@32", "fp4_e2m1@16", "fp6_e2m3@32", "fp8_e4m3@8", "int8@32", "int4@0", "nvfp4", "fp4_e2m1@12"]


def recipe(k=FP4, v=FP4, numerics="exact", **more) -> Recipe:
    return Recipe("mine", (Rule(part="attention", k=k, v=v, **more),), numerics=numerics)


def pair(chosen, *, attention="sdpa", **changes):
    """Return a model that computes with values, and its twin whose caches keep codes.

    They have one layer: in a second one, K may be rounded otherwise where sums have another order.
    """
    models = []
    for storage in ("grid", "packed"):
        model = tiny(**{"num_hidden_layers": 1, **changes})
        model.set_attn_implementation(attention)
        mxlab.apply(model, chosen, storage=storage)
        models.append(model)
    return models


def logits(model, ids, steps=5, cache=None, **more):
    """Return the logits of a prompt, and of tokens that follow one by one; and the cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad():
        found = [model(ids[:, :-steps], past_key_values=cache, **more).logits]
        for i in range(ids.shape[1] - steps, ids.shape[1]):
            found.append(model(ids[:, i : i + 1], past_key_values=cache, **more).logits)
    return torch.cat(found, dim=1), cache


def keys_and_values(cache):
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


@pytest.fixture
def products(monkeypatch):
    """Counts of the products from codes."""
    counts = {"score": 0, "mix": 0}

    def count(name, original):
        def counted(*args):
            counts[name] += 1
            return original(*args)

        monkeypatch.setattr(attention, name, counted)

    for name in counts:
        count(name, getattr(attention, name))
    return counts


# ---- a model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("formats", [(FP4, FP4), (FP6, INT8), (NVFP4, FP4), (FP4, None), (None, INT8)])
def test_logits_are_those_of_the_grid(implementation, formats, products):
    grid, packed = pair(recipe(*formats), attention=implementation)
    (wanted, values), (found, codes) = logits(grid, tokens()), logits(packed, tokens())
    assert torch.allclose(found, wanted, atol=1e-5)
    kinds = [isinstance(x, PackedStates) for x in keys_and_values(codes)]
    assert kinds == [fmt is not None for fmt in formats]
    assert products == {"score": 5 * kinds[0], "mix": 5 * kinds[1]}
    for own, other in zip(keys_and_values(codes), keys_and_values(values), strict=True):
        assert torch.equal(own + 0, other)


@pytest.mark.parametrize("transform", [Hadamard(), Hadamard(8), Derotated()])
@pytest.mark.parametrize("query", [None, FP6])
def test_transforms_and_the_offset_of_keys(transform, query, products):
    if isinstance(transform, Derotated) and query is not None:
        query = None
    chosen = recipe(transform=transform, k_offset=True, **({} if query is None else {"q": query}))
    models = []
    for finish in (freeze, pack_sites):
        model = tiny(num_hidden_layers=1)
        conversion = prepare(model, chosen)  # what is fitted is given here
        model.model.layers[0].self_attn.k_offset.copy_(
            torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(3))
        )
        finish(conversion.sites)
        models.append(model)
    (wanted, values), (found, codes) = logits(models[0], tokens()), logits(models[1], tokens())
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.equal(keys_and_values(codes)[0] + 0, keys_and_values(values)[0])
    assert products["score"] == 5


def test_microxcaling_numerics_and_rounded_probabilities():
    chosen = recipe(numerics="microxcaling", q=FP6, p=FP6, softmax=FP6)
    grid, packed = pair(chosen, attention="eager")
    assert torch.allclose(logits(packed, tokens())[0], logits(grid, tokens())[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    grid, packed = pair(recipe())
    wanted, found = (logits(model.to(dtype), tokens())[0] for model in (grid, packed))
    assert found.dtype == dtype
    assert torch.allclose(found.float(), wanted.float(), atol=0.1)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"penalty_alpha": 0.0}]
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_generate(options, implementation):
    grid, packed = pair(recipe(), attention=implementation)
    mask = torch.ones_like(tokens())
    mask[0, :3] = 0
    wanted, found = (
        model.generate(tokens(), attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)
        for model in (grid, packed)
    )
    assert torch.equal(found, wanted)


def test_assisted_generation_crops_the_cache():
    grid, packed = pair(recipe())
    helper = tiny(seed=5)
    wanted, found = (
        model.generate(tokens(1), assistant_model=helper, max_new_tokens=12, do_sample=False, pad_token_id=0)
        for model in (grid, packed)
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_architecture(name):
    _compare(lambda: build(name), name)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_models_whose_layers_are_not_alike(name):
    _compare(lambda: small(name), name)


def _compare(make, name):
    chosen = Recipe("mine", (Rule(part="attention", k=MXFormat("fp4_e2m1", 8), v=MXFormat("fp6_e2m3", 8)),))
    found = []
    for storage in ("grid", "packed"):
        torch.manual_seed(0)
        model = make().eval()
        mxlab.apply(model, chosen, storage=storage)
        ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            out = model(ids[:, :16], use_cache=True)
            steps = [out.logits]
            for i in range(16, 20):
                out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
                steps.append(out.logits)
        found.append(torch.cat(steps, dim=1))
    assert torch.allclose(found[0], found[1], atol=1e-4), name


def test_a_sliding_window(products):
    found = []
    for storage in ("grid", "packed"):
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=6,
        )  # fmt: skip
        model = MistralForCausalLM(config).eval()
        mxlab.apply(model, recipe(), storage=storage)
        ids = torch.randint(0, 64, (2, 90), generator=torch.Generator().manual_seed(1))
        found.append(logits(model, ids, 82))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert products["score"] == 164
    for own, other in zip(keys_and_values(found[1][1])[:2], keys_and_values(found[0][1])[:2], strict=True):
        assert own.shape == other.shape == (2, 2, 5, 16)
        assert torch.equal(own + 0, other)
        assert own.tokens.room.capacity <= 5 + 1 + 64


@pytest.mark.parametrize("kind", ["static", "quantized"])
def test_caches_of_another_kind_hold_values(kind):
    grid, packed = pair(recipe())
    make = {
        "static": lambda model: StaticCache(config=model.config, max_cache_len=32),
        "quantized": lambda model: pytest.importorskip("optimum.quanto") and QuantizedCache("quanto", model.config),
    }[kind]
    wanted, found = (logits(model, tokens(), cache=make(model))[0] for model in (grid, packed))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_gradients_and_compiled_models_use_values():
    grid, packed = pair(recipe())
    cache = DynamicCache(config=packed.config)
    assert torch.allclose(packed(tokens(), past_key_values=cache).logits, grid(tokens()).logits, atol=1e-5)
    assert not isinstance(cache.layers[0].keys, PackedStates)


def test_bytes():
    chosen = recipe(k=MXFormat.parse("fp4_e2m1@32"), v=MXFormat.parse("fp4_e2m1@32"))
    _, packed = pair(chosen, head_dim=64, max_position_embeddings=2048)
    cache = logits(packed, torch.randint(0, 60, (1, 2000)), 10)[1]
    for x in keys_and_values(cache):
        assert x.tokens.codes.nbytes * 8 == 4.25 * x.numel()
        assert packed_bytes(x) <= 0.28 * 2 * x.numel()


def test_what_cannot_be_packed():
    with pytest.raises(ConversionError, match=r"layers.0.self_attn has k of bf16@16, which cannot be packed"):
        mxlab.apply(tiny(), recipe(k=parse_format("bf16@16")), storage="packed")
    mixed = Recipe(
        "mine",
        tuple(Rule(part="attention", phase=phase, k=k, v=FP4) for phase, k in (("prefill", FP4), ("decode", FP6))),
    )
    with pytest.raises(ConversionError, match=r"layers.0.self_attn has k of fp4_e2m1@16 and fp6_e2m3@16, one for each"):
        mxlab.apply(tiny(), mixed, storage="packed")


# ---- a tensor of states


GRID = StateGrid("attn", MXFormat.parse("fp4_e2m1@32"), "exact")


def states(count=10, grid=GRID, seed=0, batch=2, head_dim=64, dtype=torch.float32):
    x = torch.randn(batch, 3, count, head_dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return PackedStates.from_float(x, grid), grid.quantize(x)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_growing_keeps_bits(text, dtype):
    grid = StateGrid("attn", MXFormat.parse(text), "exact")
    found, wanted = torch.tensor([], dtype=dtype), torch.tensor([], dtype=dtype)
    for seed, count in enumerate([7, 1, 1, 90, 1, 300, 1]):
        own, other = states(count, grid, seed, dtype=dtype)
        found, wanted = torch.cat([found, own], dim=-2), torch.cat([wanted, other], dim=-2)
        assert isinstance(found, PackedStates)
        assert torch.equal(found.values(), wanted)
    assert found.tokens.room.capacity - 401 <= 64


def test_what_was_cut_off_or_shared_is_not_written_over():
    found, wanted = states()
    longer, more = torch.cat([found, states(3, seed=1)[0]], dim=2), states(3, seed=1)[1]
    cut = longer[..., :-2, :]
    other = torch.cat([cut, states(4, seed=2)[0]], dim=-2)
    again = torch.cat([found, states(5, seed=3)[0]], dim=-2)
    assert torch.equal(longer.values(), torch.cat([wanted, more], 2))
    assert torch.equal(other.values(), torch.cat([wanted, more[:, :, :1], states(4, seed=2)[1]], 2))
    assert torch.equal(again.values(), torch.cat([wanted, states(5, seed=3)[1]], 2))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[..., :4, :], lambda x: x[:, :, -5:, :], lambda x: x[:, :, 2:7], lambda x: x[..., :-3, :],
        lambda x: x[:, :, 20:, :], lambda x: x[:], lambda x: x[torch.tensor([1, 0, 1]), ...],
        lambda x: x.index_select(0, torch.tensor([1, 1])), lambda x: x.repeat_interleave(3, dim=0),
        lambda x: torch.repeat_interleave(x, 2, 0), lambda x: x.to("cpu", non_blocking=True), lambda x: x.contiguous(),
        lambda x: x.clone(), copy.deepcopy, lambda x: x.to(torch.float32), lambda x: x.mT, lambda x: x.transpose(2, 3),
        lambda x: x.transpose(-1, -2).transpose(3, 2),
        lambda x: x[:, :, None, :, :].expand(2, 3, 4, 10, 64).reshape(2, 12, 10, 64),
        lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1), lambda x: x.detach(),
    ],
)  # fmt: skip
def test_what_is_done_with_codes(function):
    found, wanted = states()
    assert isinstance(function(found), PackedStates)
    assert function(found).shape == function(wanted).shape
    assert torch.equal(function(found).values(), function(wanted))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2, lambda x: x.float().double(), lambda x: x[0], lambda x: x[:, 1:], lambda x: x[..., 5],
        lambda x: x[:, :, ::2], lambda x: x[..., :3], lambda x: x.view(6, 10, 64), lambda x: x.reshape(2, -1),
        lambda x: x.permute(0, 2, 1, 3), lambda x: x.transpose(1, 2), lambda x: torch.cat([x, x], 0), lambda x: x.sum(),
        lambda x: torch.cat([x, torch.ones(2, 3, 1, 64)], 2), lambda x: torch.einsum("bhtd->bht", x),
        lambda x: x.split(5, 2), lambda x: x.unbind(0), lambda x: x @ torch.ones(64, 2), lambda x: x.to(torch.float16),
        lambda x: x.expand(2, 2, 3, 10, 64), lambda x: x.repeat_interleave(2, dim=1), lambda x: x[None],
        lambda x: torch.ones(3, 3, 3, 3).copy_(x[:1, :, :3, :3][0]), lambda x: F.pad(x, (0, 1)), lambda x: x.tolist(),
        lambda x: x.mT.softmax(-1), lambda x: x.to(x.device, torch.float64),
        lambda x: x.index_select(2, torch.tensor([1])),
        lambda x: torch.stack([x, x]), lambda x: x[:, :, None].expand(2, 3, 2, 10, 64).sum(2), lambda x: list(x),
    ],
)  # fmt: skip
def test_what_is_done_with_values(function):
    found, wanted = (function(x) for x in states())
    for own, other in zip(*((x if isinstance(x, tuple | list) else [x]) for x in (found, wanted)), strict=True):
        assert not isinstance(own, PackedStates)
        assert torch.equal(torch.as_tensor(own), torch.as_tensor(other))


def test_a_saved_cache_has_values():
    found, wanted = states()
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    assert torch.equal(torch.load(file), wanted)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.zero_(),
        lambda x: x.__setitem__(0, 1),
        lambda x: x.mul_(2),
        lambda x: torch.mul(x.values(), 2, out=x),
    ],
)
def test_codes_are_not_written_to(function):
    with pytest.raises(ConversionError, match=r"attn keeps its K or V packed, and .* would write to them: make a new"):
        function(states()[0])


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("sizes", [(6, 1), (3, 2), (9, 1)])
@pytest.mark.parametrize("mask", [None, "bool", "float", "heads"])
def test_scaled_dot_product_attention(text, sizes, mask, products):
    grid = StateGrid("attn", MXFormat.parse(text), "exact")
    (key, keys), (value, values) = states(70, grid), states(70, grid, seed=1)
    heads, rows = sizes
    query = torch.randn(2, heads, rows, 64)
    masks = {
        "bool": torch.rand(2, 1, rows, 70) > 0.5,
        "float": torch.randn(1, 1, 1, 70),
        "heads": torch.randn(2, heads, rows, 70),
    }
    options = {"attn_mask": masks.get(mask), "enable_gqa": heads > 3, "scale": 0.3}
    wanted = F.scaled_dot_product_attention(query, keys, values, **options)
    assert torch.allclose(F.scaled_dot_product_attention(query, key, value, **options), wanted, atol=1e-5)
    assert torch.allclose(F.scaled_dot_product_attention(query, keys, value, **options), wanted, atol=1e-5)
    assert torch.allclose(F.scaled_dot_product_attention(query, key, values, **options), wanted, atol=1e-5)
    assert products == {"score": 2, "mix": 2}


@pytest.mark.parametrize("options", [{"is_causal": True}, {"dropout_p": 1e-9}])
def test_attention_that_needs_values(options, products):
    (key, keys), (value, values) = states(), states(seed=1)
    query = torch.randn(2, 3, 2, 64)
    wanted = F.scaled_dot_product_attention(query, keys, values, **options)
    assert torch.allclose(F.scaled_dot_product_attention(query, key, value, **options), wanted, atol=1e-5)
    assert products == {"score": 0, "mix": 0}
    query.requires_grad_()
    F.scaled_dot_product_attention(query, key, value).sum().backward()
    assert query.grad is not None


def test_arguments_that_are_given_in_a_rarer_way():
    (key, keys), query = states(), torch.randn(2, 3, 1, 64)
    assert torch.equal(query.double().to(key), query.double().to(keys))
    for function in (
        lambda x: x.to(query),
        lambda x: x.to("cpu", torch.float32, True),
        lambda x: x.transpose(dim0=2, dim1=3),
        lambda x: torch.index_select(input=x, dim=0, index=torch.tensor([1])),
    ):
        assert torch.equal(function(key) + 0, function(keys))
    found = torch.matmul(input=query, other=key.mT)
    assert torch.allclose(found, query @ keys.mT, atol=1e-5)
    assert key.requires_grad_(False) is not None


def test_a_cache_of_inference_mode_goes_on_outside_it():
    with torch.inference_mode():
        first = torch.cat([states()[0], states(2, seed=1)[0]], dim=2)
    found = torch.cat([first, states(1, seed=2)[0]], dim=2)
    wanted = torch.cat([states()[1], states(2, seed=1)[1], states(1, seed=2)[1]], dim=2)
    assert torch.equal(found.values(), wanted)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_row_that_is_masked_as_a_whole(kind):
    (key, keys), (value, values) = states(), states(seed=1)
    query, mask = torch.randn(2, 3, 2, 64), torch.rand(2, 1, 2, 10) > 0.3
    mask[0, :, 1] = False
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    wanted = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not found[0, :, 1].any()


def test_a_mask_that_learns_gets_its_gradient():
    (key, _), (value, _) = states(), states(seed=1)
    mask = torch.zeros(2, 3, 1, 10, requires_grad=True)
    F.scaled_dot_product_attention(torch.randn(2, 3, 1, 64), key, value, attn_mask=mask).sum().backward()
    assert mask.grad is not None


def test_shapes_that_do_not_fit_are_errors_of_torch():
    (key, _), (value, _) = states(), states(seed=1)
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(torch.randn(2, 3, 1, 32), key, value)
    with pytest.raises(RuntimeError):
        torch.matmul(torch.randn(2, 3, 1, 9), value)
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(torch.randn(2, 4, 1, 64), key, value)
    (square, squares), (other, others) = states(64), states(64, seed=1)
    query = torch.randn(2, 3, 1, 64)
    wanted = F.scaled_dot_product_attention(query, squares.mT, others)
    assert torch.allclose(F.scaled_dot_product_attention(query, square.mT, other), wanted, atol=1e-5)


def test_all_of_it_moves():
    found = states(grid=StateGrid("attn", NVFP4, "exact"))[0].to("meta")
    assert all(part.is_meta for part in found.tokens.codes)
    assert found.device.type == "meta"


def test_an_offset_is_the_same_by_its_values():
    offset = torch.randn(3, 1, 64)
    one, other = (StateGrid("attn", FP4, "exact", offset=x) for x in (offset, offset.clone()))
    assert isinstance(torch.cat([states(grid=one)[0], states(grid=other)[0]], 2), PackedStates)
    changed = StateGrid("attn", FP4, "exact", offset=offset + 1)
    assert not isinstance(torch.cat([states(grid=one)[0], states(grid=changed)[0]], 2), PackedStates)


def test_values_whose_codes_cannot_be_told():
    grid = StateGrid("layers.0.attn", MXFormat.parse("fp8_e5m2@32"), "microxcaling", size=0)
    x = torch.randn(1, 2, 40, 64, generator=torch.Generator().manual_seed(0)).half()
    message = r"layers.0.attn cannot keep its K or V packed in torch.float16: .*; use storage='grid'"
    with pytest.raises(ConversionError, match=message):
        PackedStates.from_float(x, grid)
    assert torch.equal(PackedStates.from_float(x.float(), grid).values(), grid.quantize(x.float()))
