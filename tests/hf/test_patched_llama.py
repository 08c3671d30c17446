"""The patched Llama: stock without MX_SPECS_JSON, quantized however it is made with it.

Tests marked `in_patched` run in a process whose transformers is a patched copy (see llama.py).
"""

import copy
import hashlib
import json
import logging
import os
import pickle
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mxlab
from mxlab.errors import SpecError
from mxlab.model.nn.attention import QuantizedAttention
from mxlab.model.nn.forward import override_of
from mxlab.model.nn.linear import MxLinear
from mxlab.model.nn.operands import LinearOperands

from support.llama import call, checkpointed, config, in_patched, specs, tiny, tokens

EX2 = {"kv_elem_format": "fp4_e2m1"}
# Formats and numerics that differ in everything that can go wrong.
VARIANTS = {
    "ex1": {},
    "ex2": EX2,
    "ex2 microxcaling": {**EX2, "custom_cuda": False},
    "int8 bfloat 0": {"w_elem_format": "int8", "a_elem_format": "int8", "kv_elem_format": "int8", "bfloat": 0},
    "weights": {"a_elem_format": None, "block_size": 16},
    "activations": {"w_elem_format": "none", "round": "even"},
}
PROJECTIONS = 14  # of two layers
HEADS = (
    "LlamaForCausalLM",
    "LlamaForSequenceClassification",
    "LlamaForTokenClassification",
    "LlamaForQuestionAnswering",
)


def bits(x: torch.Tensor) -> str:
    """A digest of the shape and of every bit."""
    return hashlib.sha256(
        str(x.shape).encode() + x.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    ).hexdigest()


def state_bits(model: nn.Module) -> dict[str, str]:
    return {name: bits(value) for name, value in model.state_dict().items()}


def outputs(model: nn.Module, **inputs) -> torch.Tensor:
    """Logits of a language model, the first result of another head."""
    with torch.no_grad():
        return model(tokens(), return_dict=False, **inputs)[0]


def generate(model: nn.Module, ids: torch.Tensor, count: int = 8, **options) -> torch.Tensor:
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=(ids != 0).long(), **options)


def on_grid(weight: torch.Tensor, fmt: str = "fp4_e2m1@32") -> bool:
    return torch.equal(mxlab.quantize(weight.detach(), fmt), weight.detach())


def projections(model: nn.Module) -> dict[str, MxLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, MxLinear)}


def kv_quantizers(model: nn.Module) -> list[QuantizedAttention]:
    return [c for m in model.modules() if isinstance(c := override_of(m), QuantizedAttention)]


@contextmanager
def log_lines():
    """The lines that mxlab logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("mxlab").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("mxlab").removeHandler(handler)


@contextmanager
def counting(cls: type, method: str):
    """The calls of a method, which goes on working."""
    with patch.object(cls, method, autospec=True, side_effect=getattr(cls, method)) as mock:
        yield mock.call_args_list


# ---- without MX_SPECS_JSON


def stock_behaviour(attention: str, folder: str) -> dict:
    """What a Llama does and is, as plain values."""
    from transformers import AutoModel, AutoModelForCausalLM, LlamaModel

    found: dict = {"doc": LlamaModel.forward.__doc__}
    for head in HEADS:
        model = tiny(head, attn_implementation=attention)
        found[head] = [bits(outputs(model)), state_bits(model), type(model).__name__, model.base_model_prefix]
    model = tiny(attn_implementation=attention)
    for options in ({}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}):
        found[str(options)] = generate(model, tokens(), **options).tolist()
    model.save_pretrained(folder)
    found["config"] = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))["architectures"]
    for auto in (AutoModel, AutoModelForCausalLM):
        loaded = auto.from_pretrained(folder, attn_implementation=attention)
        found[auto.__name__] = [type(loaded).__name__, type(loaded).__mro__[-3].__name__, bits(outputs(loaded))]
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_specs_it_is_stock_bit_for_bit(attention, tmp_path):
    stock = call("stock", stock_behaviour, attention=attention, folder=tmp_path / "stock")
    assert call("patched", stock_behaviour, attention=attention, folder=tmp_path / "patched") == stock


def training_behaviour() -> list[str]:
    model = checkpointed(tiny(tie_word_embeddings=True).train())
    model(tokens(), labels=tokens()).loss.backward()
    return [bits(p.grad) for p in model.parameters()]


def test_without_specs_it_trains_as_stock_bit_for_bit():
    assert call("patched", training_behaviour) == call("stock", training_behaviour)


@in_patched
def test_names_and_classes():
    import transformers
    from transformers.models.llama import modeling_llama, modular_llama_upstream
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, apply_rotary_pos_emb, repeat_kv

    assert transformers.LlamaForCausalLM is modeling_llama.LlamaForCausalLM
    assert transformers.LlamaModel is modeling_llama.LlamaModel is modular_llama_upstream.LlamaModel
    assert type(tiny().model) is transformers.LlamaModel
    assert transformers.AutoModelForCausalLM.from_config(config()).__class__ is transformers.LlamaForCausalLM
    assert LlamaAttention.__module__.endswith("upstream")
    assert all((LlamaRMSNorm, apply_rotary_pos_emb, repeat_kv))
    with pytest.raises(AttributeError):
        _ = modeling_llama.no_such_name


# ---- however the model is made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
@in_patched
def test_every_way_to_make_it_gives_the_same_as_apply(variant, dtype, tmp_path):
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    stock = tiny(dtype=dtype).to(getattr(torch, dtype))
    stock.model.rotary_emb = tiny().model.rotary_emb  # `to` rounds its frequencies, `from_pretrained` does not
    state = copy.deepcopy(stock.state_dict())
    stock.save_pretrained(tmp_path)
    with specs(VARIANTS[variant]):
        constructed = tiny().to(getattr(torch, dtype))
        constructed.model.rotary_emb = stock.model.rotary_emb
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        with init_empty_weights(include_buffers=False):
            empty = LlamaForCausalLM(config())
    empty.load_state_dict(copy.deepcopy(state), assign=True)
    empty.eval()

    mxlab.apply(stock, mxlab.MxSpecs.from_mapping(VARIANTS[variant]).to_recipe())
    logits = outputs(stock)
    expected = state_bits(stock)
    assert {n for n, v in stock.state_dict().items() if bits(v) != bits(state[n])} <= {
        f"{n}.weight" for n in projections(stock)
    }
    for model in (constructed, loaded, empty):
        assert len(projections(model)) == PROJECTIONS
        assert torch.equal(outputs(model), logits)
        assert state_bits(model) == expected
    assert logits.isfinite().all()


@in_patched
def test_an_empty_object_is_ex1():
    stock = tiny()
    mxlab.apply(stock, "ex1")
    with specs("{}"):
        model = tiny()
    assert torch.equal(outputs(model), outputs(stock))
    assert not torch.equal(outputs(model), outputs(tiny()))
    assert all(on_grid(m.weight) for m in projections(model).values())
    assert kv_quantizers(model) == []


@pytest.mark.parametrize("head", HEADS)
@in_patched
def test_every_head_is_converted(head):
    with specs(EX2):
        model = tiny(head)
    assert len(projections(model)) == PROJECTIONS
    assert len(kv_quantizers(model)) == 2
    assert not torch.equal(outputs(model), outputs(tiny(head)))


@in_patched
def test_saved_values_lie_on_the_grid(tmp_path):
    """Saved without a forward pass, they give stock Llama the results of the patched one."""
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    tmp_path = Path(tmp_path)
    stock = tiny()
    stock.save_pretrained(tmp_path / "stock")
    with specs(a_elem_format=None, bfloat=0):
        quantized = LlamaForCausalLM.from_pretrained(tmp_path / "stock")
    quantized.save_pretrained(tmp_path / "quantized")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "quantized"))
    assert list(before) == list(after)
    for name, value in after.items():
        is_projection = name.removesuffix(".weight") in projections(quantized)
        assert on_grid(value) if is_projection else torch.equal(value, before[name])
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path / "quantized")
    assert projections(reloaded) == {}
    assert torch.equal(outputs(reloaded), outputs(quantized))


# ---- quantized once, and again when they change


@in_patched
def test_weights_are_quantized_once():
    with specs():
        model = tiny()
    with counting(LinearOperands, "on_weight") as calls:
        outputs(model)
        with torch.inference_mode():
            model(tokens())
        generate(model, tokens())
    assert len(calls) == PROJECTIONS


@pytest.mark.parametrize("change", ["load_state_dict", "assign", "in place", "inference mode", "new parameter", "data"])
@in_patched
def test_weights_are_quantized_again_when_they_change(change):
    with specs():
        model, other = tiny(), tiny(seed=5)
    old = outputs(model)
    new = copy.deepcopy(tiny(seed=5).state_dict())
    if change in ("load_state_dict", "assign"):
        model.load_state_dict(new, assign=change == "assign")
    for name, parameter in model.named_parameters():
        if change == "in place":
            with torch.no_grad():
                parameter.copy_(new[name])
        elif change == "inference mode":
            with torch.inference_mode():
                parameter.copy_(new[name])
        elif change == "data":
            parameter.data = new[name]
        elif change == "new parameter":
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.Parameter(new[name]))
    assert torch.equal(outputs(model), outputs(other))
    assert not torch.equal(outputs(model), old)
    assert all(on_grid(m.weight) for m in projections(model).values())


@pytest.mark.parametrize("move", ["to", "deepcopy", "pickle", "torch.save", "share_memory", "train and eval"])
@in_patched
def test_weights_are_not_quantized_twice(move, tmp_path):
    """microxcaling numerics move values that are on the grid already."""
    with specs(w_elem_format="int8", bfloat=0, custom_cuda=False):
        model = tiny(initializer_range=0.02).bfloat16()
    logits, state = outputs(model), state_bits(model)
    assert not all(torch.equal(m.mx.on_weight(m.weight), m.weight) for m in projections(model).values())
    if move == "to":
        model = model.to("cpu").to(torch.float32).to(torch.bfloat16)
    elif move == "deepcopy":
        model = copy.deepcopy(model)
    elif move == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif move == "torch.save":
        torch.save(model, f"{tmp_path}/model.pt")
        model = torch.load(f"{tmp_path}/model.pt", weights_only=False)
    elif move == "share_memory":
        model.share_memory()
    else:
        model.train().eval()
    assert torch.equal(outputs(model), logits)
    assert state_bits(model) == state


@in_patched
def test_a_copy_of_a_model_that_never_ran_is_quantized():
    with specs():
        model = tiny()
    expected = outputs(copy.deepcopy(model))
    assert all(m.is_frozen is False for m in projections(model).values())
    assert torch.equal(outputs(model), expected)


# ---- training


@in_patched
def test_training_keeps_the_master(tmp_path):
    from transformers import LlamaForCausalLM

    stock = tiny()
    stock.save_pretrained(tmp_path)
    with specs(EX2):
        model = LlamaForCausalLM.from_pretrained(tmp_path).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(6):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        if step == 0:
            assert all(torch.equal(v, stock.state_dict()[n]) for n, v in before.items())
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        optimizer.step()
        optimizer.zero_grad()
        assert not any(torch.equal(p, before[n]) for n, p in model.named_parameters())

        trained = state_bits(model)
        model.eval()
        outputs(model)
        assert state_bits(model) == trained  # evaluation between steps
        model.train()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(on_grid(m.weight) for m in projections(model).values())


@in_patched
def test_training_and_evaluation_compute_the_same():
    with specs(EX2):
        model, frozen = tiny(), tiny()
    model.train()
    trained = model(tokens()).logits.detach()
    assert torch.equal(trained, outputs(model.eval()))
    assert torch.equal(trained, outputs(frozen))


@in_patched
def test_the_gradient_passes_straight_through():
    """The gradient of a projection's weight is that of a stock projection which holds the quantized values."""
    with specs(w_elem_format="fp4", a_elem_format=None, bfloat=0):
        model, quantized = tiny().train(), tiny()
    outputs(quantized)
    stock = tiny().train()
    stock.load_state_dict(quantized.state_dict())
    for m in (model, stock):
        m(tokens(), labels=tokens()).loss.backward()
    grads = zip(model.parameters(), stock.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in grads)


@pytest.mark.parametrize("options", [EX2, {**EX2, "round": "dither"}], ids=["nearest", "dither"])
@in_patched
def test_gradient_checkpointing(options):
    with specs(options):
        models = tiny().train(), checkpointed(tiny().train())
    results = []
    for model in models:
        torch.manual_seed(0)
        loss = model(tokens(), labels=tokens(), use_cache=False).loss
        loss.backward()
        results.append([bits(loss), *(bits(p.grad) for p in model.parameters())])
    assert results[0] == results[1]


# ---- keys and values


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("custom_cuda", [True, False], ids=["exact", "microxcaling"])
@in_patched
def test_every_token_is_quantized_once_and_kept_on_the_grid(custom_cuda, attention):
    """What the cache holds is what quantizing each token's K and V once gives; GQA: before they are repeated."""
    from transformers import DynamicCache

    options = {"kv_elem_format": "int8", "custom_cuda": custom_cuda}
    with specs(options, block_size=16):
        model = tiny(attn_implementation=attention).bfloat16()
    seen: dict = {}
    for layer, quantizer in enumerate(kv_quantizers(model)):
        quantizer.set_observer("", lambda role, x, _, layer=layer: seen.setdefault((layer, role), []).append(x.clone()))
    cache = DynamicCache(config=model.config)
    ids = generate(model, tokens(), past_key_values=cache)
    numerics = "exact" if custom_cuda else "microxcaling"
    for layer in range(2):
        for role, kept in (("k", cache.layers[layer].keys), ("v", cache.layers[layer].values)):
            raw = torch.cat(seen[layer, role], dim=2)
            assert raw.shape == (2, 2, ids.shape[1] - 1, 16)  # (batch, KV heads, tokens, head_dim)
            assert torch.equal(kept, mxlab.quantize(raw, "int8@16", numerics=numerics))
            if custom_cuda:
                assert on_grid(kept, "int8@16")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("custom_cuda", [True, False], ids=["exact", "microxcaling"])
@in_patched
def test_generation_with_a_cache_is_recomputation(custom_cuda, attention):
    options = {**EX2, "custom_cuda": custom_cuda, "bfloat": 0, "a_elem_format": None}
    with specs(options):
        model = tiny(attn_implementation=attention)
    cached = generate(model, tokens(), count=16, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(cached.sequences, generate(model, tokens(), count=16, use_cache=False))
    with torch.no_grad():
        whole = model(cached.sequences, use_cache=False).logits[:, tokens().shape[1] - 1 : -1]
    assert torch.allclose(torch.stack(cached.logits, dim=1), whole, atol=2e-4)
    assert not torch.allclose(outputs(model), outputs(tiny(attn_implementation=attention)), atol=1e-2)


@in_patched
def test_other_caches():
    with specs(EX2):
        model = tiny()
    expected = generate(model, tokens())
    assert torch.equal(generate(model, tokens(), cache_implementation="static"), expected)
    beams = generate(model, tokens(), num_beams=2)
    assert torch.equal(beams, generate(model, tokens(), num_beams=2, use_cache=False))
    one = tokens()[:1]
    assert torch.equal(generate(model, one, assistant_model=model), generate(model, one))


@in_patched
def test_eager_and_sdpa_agree():
    # No activation format: it would turn a difference in the last bit into one of a whole step.
    with specs(EX2, a_elem_format=None, bfloat=0):
        eager, sdpa = (tiny(attn_implementation=name) for name in ("eager", "sdpa"))
    assert torch.allclose(outputs(eager), outputs(sdpa), atol=1e-4)
    assert torch.equal(generate(eager, tokens()), generate(sdpa, tokens()))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@in_patched
def test_left_padding_changes_nothing(attention):
    with specs(EX2):
        model = tiny(attn_implementation=attention)
    long, short = tokens(1, 12), tokens(1, 7, seed=2)
    padded = torch.cat([long, torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=1)])
    continued = generate(model, padded)[:, 12:]
    assert torch.equal(continued[:1], generate(model, long)[:, 12:])
    assert torch.equal(continued[1:], generate(model, short)[:, 7:])


@in_patched
def test_a_block_longer_than_the_head_is_said_once():
    with log_lines() as lines, specs(EX2):
        tiny()
    assert len(lines) == 1
    assert lines[0].count("k of 2 attentions: the axis of 16 is not a multiple of the block size 32") == 1
    with log_lines() as lines, specs(EX2, block_size=16):
        tiny()
    assert "not a multiple" not in lines[0]


@in_patched
def test_an_odd_head_dim():
    """24 elements in blocks of 16: the last block has 8, and no block holds parts of two heads."""
    with specs(kv_elem_format="fp4", block_size=16, quantize_linear=False):
        model = tiny(head_dim=24)
    seen = []
    attention = kv_quantizers(model)[0]
    attention.set_observer("", lambda role, x, _: seen.append((mxlab.quantize(x, attention.formats[role]), x)))
    assert outputs(model).isfinite().all()
    for quantized, x in seen:
        blocks = [mxlab.quantize(part.contiguous(), "fp4@16") for part in x.split([16, 8], dim=-1)]
        assert torch.equal(quantized, torch.cat(blocks, dim=-1))


# ---- options


@pytest.mark.parametrize("tied", [True, False])
@in_patched
def test_embeddings_stay_as_they_are(tied, tmp_path):
    from transformers import LlamaForCausalLM

    stock = tiny(tie_word_embeddings=tied)
    stock.save_pretrained(tmp_path)
    with specs():
        models = [tiny(tie_word_embeddings=tied), LlamaForCausalLM.from_pretrained(tmp_path)]
    for model in models:
        outputs(model)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
        assert torch.equal(model.model.embed_tokens.weight, stock.model.embed_tokens.weight)
        assert torch.equal(model.lm_head.weight, stock.lm_head.weight)
        assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("off", [None, "none"])
@in_patched
def test_null_and_none_switch_a_role_off(off):
    with specs(w_elem_format=off, a_elem_format=off, kv_elem_format=off, bfloat=0):
        nothing = tiny()
    assert torch.equal(outputs(nothing), outputs(tiny()))
    with specs(EX2, w_elem_format=off, bfloat=0):
        model = tiny()
    formats = {(m.mx.weight, str(m.mx.activation)) for m in projections(model).values()}
    assert formats == {(None, "fp6_e2m3@32")}
    assert state_bits(model) == state_bits(tiny())


@in_patched
def test_quantize_linear_false_leaves_linear_layers():
    with log_lines() as lines, specs(EX2, quantize_linear=False):
        model = tiny()
    assert projections(model) == {}
    assert len(kv_quantizers(model)) == 2
    assert lines[0].startswith(
        "recipe MX_SPECS_JSON: linear layers not quantized; 2 attentions (k fp4_e2m1@32, v fp4_e2m1@32); exact numerics"
    )
    with log_lines() as lines, specs(quantize_linear=False):
        assert torch.equal(outputs(tiny()), outputs(model)) is False
    assert lines == ["recipe MX_SPECS_JSON: nothing is quantized"]


@in_patched
def test_one_log_line_says_what_was_replaced():
    with log_lines() as lines, specs(custom_cuda=False, softmax_exp2=True):
        model = tiny()
        generate(model, tokens())
    assert lines == [
        "recipe MX_SPECS_JSON: 14 linear layers (weight fp4_e2m1@32, activation fp6_e2m3@32); KV not quantized; "
        "microxcaling numerics; without effect: softmax_exp2"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "MX_SPECS_JSON is not valid JSON.*line 1, column 1"),
        ('{"block_size": 16', "MX_SPECS_JSON is not valid JSON.*line 1, column 18"),
        ("[]", "must be a JSON object"),
        ('{"blok_size": 16}', "unknown key 'blok_size'; did you mean 'block_size'"),
        ('{"w_elem_format": "fp5"}', "w_elem_format: unknown element format 'fp5'.*fp4_e2m1"),
        ('{"block_size": -1}', "block_size is -1"),
        ('{"scale_bits": 9}', "scale_bits is 9"),
        ('{"custom_cuda": "yes"}', "custom_cuda is 'yes'"),
    ],
)
@in_patched
def test_what_cannot_be_read_is_an_error_as_the_model_is_made(text, message):
    with specs(text), pytest.raises(SpecError, match=message):
        tiny()


@in_patched
def test_another_architecture_is_left_alone():
    from transformers import MistralConfig, MistralForCausalLM

    def mistral():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 97}
        return MistralForCausalLM(MistralConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)).eval()

    with log_lines() as lines, specs(EX2):
        model = mistral()
    assert projections(model) == {}
    assert lines == []
    assert torch.equal(outputs(model), outputs(mistral()))


@in_patched
def test_the_inventory_is_written_where_it_is_asked_for(tmp_path):
    path = f"{tmp_path}/inventory.json"
    with patch.dict(os.environ, MXLAB_INVENTORY=path), specs(EX2):
        tiny()
    inventory = json.loads(Path(path).read_text(encoding="utf-8"))
    assert (inventory["linear_layers"], inventory["attentions"]) == (PROJECTIONS, 2)
    assert inventory["sites"][1]["formats"] == {"weight": "fp4_e2m1@32", "activation": "fp6_e2m3@32"}
    assert {s["module"] for s in inventory["sites"]} >= {"layers.0.self_attn", "layers.1.mlp.down_proj"}


@in_patched
def test_apply_on_a_patched_model_is_refused():
    with specs():
        model = tiny()
    expected = outputs(model)
    with pytest.raises(mxlab.errors.ConversionError, match="quantized already"):
        mxlab.apply(model, "ex1")
    assert torch.equal(outputs(model), expected)


# ---- the order of operations, written out


@pytest.mark.parametrize("rounding", ["nearest", "even"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("numerics", ["exact", "microxcaling"])
@in_patched
def test_a_projection_computes_in_microxcalings_order(numerics, dtype, rounding):
    with specs(custom_cuda=numerics == "exact", round=rounding):
        model = tiny(attention_bias=True)
    projection = model.model.layers[0].self_attn.k_proj
    torch.manual_seed(3)
    nn.init.normal_(projection.bias)
    model.to(getattr(torch, dtype))
    weight, bias = projection.weight.detach().clone(), projection.bias.detach().clone()
    x = torch.randn(2, 5, 64, dtype=weight.dtype)

    def elementwise(t):
        return mxlab.round_elementwise(t, bfloat=16, rounding=rounding, numerics=numerics)

    def mx(t, element):
        return mxlab.quantize(t, mxlab.MXFormat(element, 32, rounding=rounding), numerics=numerics)

    product = F.linear(mx(elementwise(x), "fp6_e2m3"), mx(elementwise(weight), "fp4_e2m1"))
    expected = elementwise(elementwise(product) + elementwise(bias))
    with torch.no_grad():
        assert torch.equal(projection(x), expected)
    assert not torch.equal(F.linear(x, weight, bias), expected)
