"""Quantized attention against attentions written out here; what happens to it under interrupts, threads, compilers."""

import copy
import math
import pickle
import threading

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack
from transformers import DynamicCache

import mxlab
from mxlab.errors import ConversionError
from mxlab.model.nn.forward import override_of
from mxlab.model.observe import observe

from support.architectures import HEADS, HIDDEN, LAYERS, build, run, tokens
from support.hybrids import small
from support.llama import checkpointed

HEAD_DIM = HIDDEN // HEADS
# Every role with a format and a block of its own, so that none can take another's place or axis unnoticed.
FORMATS = {
    "k": mxlab.MXFormat("fp4_e2m1", 4),
    "v": mxlab.MXFormat("int4", 4),
    "q": mxlab.MXFormat("fp6_e2m3", 2),
    "softmax": mxlab.MXFormat("int5", 4),
    "p": mxlab.MXFormat("fp4_e2m1", 3),
    "rope": mxlab.MXFormat("int4", 8),
}
FP4 = mxlab.MXFormat("fp4_e2m1", 4)
LLAMA = r".*\.self_attn"


def recipe(modules: str = LLAMA, **formats) -> mxlab.Recipe:
    return mxlab.Recipe("test", (mxlab.Rule(modules, **formats),))


def quantized(role: str, x: Tensor, formats: dict) -> Tensor:
    return mxlab.quantize(x, formats[role]) if role in formats else x


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, formats: dict, scale: float, bias: Tensor | None = None):
    """(batch, heads, tokens, head_dim) each; ``visible`` (batch or 1, 1, tokens, keys) says who sees what."""
    q, k, v = quantized("q", q, formats), quantized("k", k, formats), quantized("v", v, formats)
    scores = q @ k.mT * scale + (0 if bias is None else bias)
    if "softmax" in formats:
        scores = mxlab.quantize(torch.where(visible, scores, 0.0), formats["softmax"])
    p = torch.where(visible, scores, -math.inf).softmax(-1)
    out = quantized("p", p, formats) @ v
    return out.transpose(1, 2).flatten(2)


def heads(x: Tensor) -> Tensor:
    """(batch, tokens, heads * head_dim) to (batch, heads, tokens, head_dim)."""
    return x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


def causal(length: int) -> Tensor:
    return torch.ones(length, length).tril().bool()[None, None]


class Seen:
    """The arguments and the result of every call of some modules during one forward pass of the model."""

    def __init__(self, model: nn.Module, *names: str, **arguments) -> None:
        self.calls: dict[str, tuple] = {}
        handles = []
        for name in names:

            def look(module, args, kwargs, output, name=name):
                self.calls[name] = (args, kwargs, output[0] if isinstance(output, tuple) else output)

            handles.append(model.get_submodule(name).register_forward_hook(look, with_kwargs=True))
        run(model, **arguments)
        for handle in handles:
            handle.remove()


# ---- against attentions written out


ROLES = [*((role,) for role in FORMATS), ("k", "v"), ("q", "p"), tuple(FORMATS)]
names = " ".join


def llama_attention(
    attention: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor, formats: dict
) -> Tensor:
    """Grouped queries; the rotary embedding turns the halves of each head against each other."""
    cos, sin = (quantized("rope", table, formats)[:, None] for table in (cos, sin))

    def rotated(t: Tensor) -> Tensor:
        first, second = t.chunk(2, -1)
        return t * cos + torch.cat([-second, first], -1) * sin

    q, k, v = (heads(getattr(attention, f"{n}_proj")(x)) for n in "qkv")
    q, k = rotated(q), rotated(k)
    k, v = quantized("k", k, formats), quantized("v", v, formats)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    rest = {role: fmt for role, fmt in formats.items() if role not in ("k", "v")}
    return attention.o_proj(attend(q, k, v, visible, rest, HEAD_DIM**-0.5))


@pytest.mark.parametrize("roles", ROLES, ids=names)
@pytest.mark.parametrize("padding", [0, 3])
def test_llama(roles, padding):
    formats = {role: fmt for role, fmt in FORMATS.items() if role in roles}
    raw = build("llama")
    model = copy.deepcopy(raw)
    mxlab.apply(model, recipe(**formats))
    mask = torch.ones_like(tokens())
    mask[0, :padding] = 0
    layer = "model.layers.1.self_attn"
    args, kwargs, output = Seen(model, layer, attention_mask=mask).calls[layer]
    x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    visible = causal(x.shape[1]) & mask.bool()[:, None, None]
    visible[0, 0, :padding] = True  # padding itself sees something: what it computes does not matter
    expected = llama_attention(raw.get_submodule(layer), x, *kwargs["position_embeddings"], visible, formats)
    torch.testing.assert_close(output[0, padding:], expected[0, padding:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output[1], expected[1], atol=1e-5, rtol=1e-5)
    plain = llama_attention(raw.get_submodule(layer), x, *kwargs["position_embeddings"], visible, {})
    assert not torch.allclose(output[1], plain[1], atol=1e-3)


@pytest.mark.parametrize("roles", [r for r in ROLES if "rope" not in r], ids=names)
def test_mpt_with_its_linear_biases(roles):
    formats = {role: fmt for role, fmt in FORMATS.items() if role in roles}
    raw = build("mpt")
    model = copy.deepcopy(raw)
    mxlab.apply(model, recipe(r".*\.attn", **formats))
    layer = "transformer.blocks.1.attn"
    args, _, output = Seen(model, layer).calls[layer]
    attention, x = raw.get_submodule(layer), args[0]
    q, k, v = (heads(t) for t in attention.Wqkv(x).chunk(3, -1))
    slopes = 2.0 ** (-8 * torch.arange(1, HEADS + 1) / HEADS)
    distance = torch.arange(x.shape[1]) - (x.shape[1] - 1)
    bias = slopes[:, None, None] * distance
    out = attend(q, k, v, causal(x.shape[1]), formats, HEAD_DIM**-0.5, bias)
    torch.testing.assert_close(output, attention.out_proj(out), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("roles", [r for r in ROLES if "rope" not in r], ids=names)
@pytest.mark.parametrize("layer", [0, 1])
def test_gpt_neo_with_its_local_window(roles, layer):
    formats = {role: fmt for role, fmt in FORMATS.items() if role in roles}
    raw = build("gpt_neo", window_size=4)
    model = copy.deepcopy(raw)
    mxlab.apply(model, recipe(r".*\.attn\.attention", **formats))
    name = f"transformer.h.{layer}.attn.attention"
    args, _, output = Seen(model, name).calls[name]
    attention, x = raw.get_submodule(name), args[0]
    visible = causal(x.shape[1])
    if layer == 1:
        visible = visible & ~visible.tril(-4)
    q, k, v = (heads(getattr(attention, f"{n}_proj")(x)) for n in "qkv")
    out = attend(q, k, v, visible, formats, scale=1)
    torch.testing.assert_close(output, attention.out_proj(out), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("elementwise", [0, 12])
def test_the_projections_of_gpt2_are_not_taken_for_its_attention(elementwise):
    """Conv1D multiplies by a matmul, too."""
    rounding = mxlab.recipe.Elementwise(bfloat=elementwise)
    linear = mxlab.Rule(r".*c_(attn|proj|fc)", weight=mxlab.MXFormat("int8", 8))
    attention = mxlab.Rule(r".*\.attn", q=FP4)
    model = build("gpt2", attn_implementation="eager")
    conversion = mxlab.apply(model, mxlab.Recipe("test", (linear, attention), elementwise=rounding))
    seen = []
    override_of(conversion.attentions[0].module).set_observer(
        "", lambda role, x, _: seen.append((role, tuple(x.shape)))
    )
    run(model)
    assert seen == [("q", (2, HEADS, 10, HEAD_DIM))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_masked_scores_take_part_in_no_block(name, dtype):
    """MPT widens scores masked with the least float16 to float32."""
    model = build(name, dtype=dtype)
    conversion = mxlab.apply(model, mxlab.Recipe("test", (mxlab.Rule(part="attention", softmax=FP4),)))
    largest = []
    for site in conversion.attentions:
        override_of(site.module).set_observer("", lambda role, x, _: largest.append(x.abs().max().item()))
    assert run(model).isfinite().all()
    assert len(largest) == LAYERS
    assert max(largest) < 1000


# ---- where an operand cannot be met


class Ignoring(nn.Module):
    """An attention that would write to its cache and never does, and multiplies by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.is_cached = False

    def forward(self, x: Tensor, past_key_values=None) -> Tensor:
        x = self.proj(x)
        if self.is_cached:
            past_key_values.update(x, x, 0)
        return torch.einsum("bik,bjk->bij", x, x) @ x


class Computing(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([attention])

    def forward(self, x: Tensor, **more) -> Tensor:
        return self.layers[0](x, **more)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (("k",), r"layers\.0 computes its attention where mxlab cannot see k: leave k out for it"),
        (("v",), r"cannot see v: leave v out"),
        (("p",), r"cannot see p: load the model with attn_implementation='eager', or leave p out"),
        (("softmax", "k"), r"cannot see k, softmax"),
    ],
)
def test_an_attention_that_hides_an_operand(roles, message):
    model = Computing(Ignoring())
    mxlab.apply(model, recipe(r"layers\.0", **dict.fromkeys(roles, FP4)))
    with pytest.raises(ConversionError, match=message):
        model(torch.ones(1, 3, 8))
    assert _len_torch_function_stack() == 0


def test_rotary_tables_of_another_kind():
    class Complex(Ignoring):
        def forward(self, x, position_embeddings=None, past_key_values=None):
            return past_key_values.update(x, x, 0) if self.is_cached else self.proj(x)

    model = Computing(Complex())
    mxlab.apply(model, recipe(r"layers\.0", rope=FP4))
    with pytest.raises(ConversionError, match=r"layers\.0 was called without position_embeddings"):
        model(torch.ones(1, 3, 8))
    with pytest.raises(ConversionError, match="with a Tensor as position_embeddings: there are no cosines"):
        model(torch.ones(1, 3, 8), position_embeddings=torch.ones(3, 8, dtype=torch.complex64))


def test_flex_attention_is_replaced():
    model = build("llama", attn_implementation="flex_attention")
    conversion = mxlab.apply(model, recipe(q=FP4))
    assert model.config._attn_implementation == "eager"
    assert "attention is computed eagerly, not by flex_attention, for the sake of q" in conversion.summary()


def test_a_kernel_chosen_later_is_refused():
    model = build("llama")
    mxlab.apply(model, recipe(p=FP4))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ConversionError, match="cannot see p"):
        run(model)


# ---- encoders with decoders


@pytest.mark.parametrize("kind", ["Bart", "T5"])
def test_both_caches_of_an_encoder_and_decoder(kind):
    import transformers

    sizes = {"vocab_size": 64, "d_model": HIDDEN, "decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": None}
    names = ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
    own = {
        "Bart": {**dict.fromkeys(names, 2), "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "bos_token_id": 1},
        "T5": {"d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2},
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **own[kind])
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.3)
    ids, decoder_ids = tokens(5), tokens(6)
    raw = run(model, ids, decoder_input_ids=decoder_ids)
    mxlab.apply(model, mxlab.Recipe("test", (mxlab.Rule(part="attention", k=FP4, v=FP4),)))
    whole, cache, steps = run(model, ids, decoder_input_ids=decoder_ids, use_cache=False), None, []
    assert not torch.allclose(whole, raw, atol=1e-3)
    for n in range(decoder_ids.shape[1]):
        with torch.no_grad():
            output = model(ids, decoder_input_ids=decoder_ids[:, n : n + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)


# ---- the context that sees the operands


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_seen_any_more_after_an_exception(error):
    model = build("llama")
    mxlab.apply(model, recipe(p=FP4, q=FP4, k=FP4))
    expected = run(model)

    def fail(*_):
        raise error("stop")

    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(fail)
    with pytest.raises(error, match="stop"):
        run(model)
    assert _len_torch_function_stack() == 0
    handle.remove()
    assert torch.equal(run(model), expected)


def test_threads_do_not_mix():
    model = build("llama")
    mxlab.apply(model, recipe(**FORMATS))
    inputs = [tokens(length) for length in (3, 10, 17, 30)]
    expected = [run(model, ids) for ids in inputs]
    results: dict[int, list] = {n: [] for n in range(len(inputs))}
    start = threading.Barrier(len(inputs))

    def work(n: int) -> None:
        start.wait()
        for _ in range(5):
            results[n].append(run(model, inputs[n]))

    threads = [threading.Thread(target=work, args=(n,)) for n in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, found in results.items():
        assert len(found) == 5
        assert all(torch.equal(logits, expected[n]) for logits in found)


def test_copies_and_pickles_keep_it():
    model = build("llama")
    mxlab.apply(model, recipe(**FORMATS))
    expected = run(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        attentions = [model.model.layers[0].self_attn, twin.model.layers[0].self_attn]
        assert override_of(attentions[0]) is not override_of(attentions[1])
        assert torch.equal(run(twin), expected)
        nn.init.zeros_(twin.model.layers[0].self_attn.o_proj.weight)
        assert not torch.equal(run(twin), expected)
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("order", ["before", "after"])
def test_hooks_of_accelerate_around_it(order):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, expected = build("llama"), build("llama")
    mxlab.apply(expected, recipe(**FORMATS))
    attention = model.model.layers[1].self_attn
    if order == "before":
        add_hook_to_module(attention, ModelHook())
    mxlab.apply(model, recipe(**FORMATS))
    if order == "after":
        add_hook_to_module(attention, ModelHook())
    assert torch.equal(run(model), run(expected))
    with pytest.raises(ConversionError, match="quantized already"):
        mxlab.apply(model, recipe(k=FP4))
    remove_hook_from_module(attention)
    assert torch.equal(run(model), run(expected))


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function:DeprecationWarning")  # torch's own tracing
@pytest.mark.parametrize("roles", [("k", "v"), ("q",), ("q", "p", "softmax", "rope")], ids=names)
def test_it_compiles_to_one_graph_and_exports(roles):
    model, ids = build("llama"), tokens()
    mxlab.apply(model, recipe(**{role: FORMATS[role] for role in roles}))
    expected = run(model, use_cache=False)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
        program = torch.export.export(model, (ids,), {"use_cache": False})
        torch.testing.assert_close(program.module()(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)


def test_gradients_pass_straight_through_and_survive_checkpointing():
    gradients = []
    for is_checkpointed in (False, True):
        model = build("llama").train()
        mxlab.apply(model, recipe(**FORMATS))
        if is_checkpointed:
            model = checkpointed(model)
        model(tokens()).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
        assert _len_torch_function_stack() == 0
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert one.any()
        torch.testing.assert_close(one, other)


# ---- attentions that ask more of their cache, or less


def logits_of(model, **more) -> Tensor:
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


HYBRIDS = ["deepseek_v32", "minimax", "olmo_hybrid", "gemma3n_text", "longcat_flash", "jamba"]


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_k_and_v_are_quantized_with_a_cache_and_without(model_type):
    """Evaluations have none. What is computed is the same, and not what the unquantized model computes."""
    raw = small(model_type)
    model = copy.deepcopy(raw)
    mxlab.apply(model, mxlab.Recipe("test", (mxlab.Rule(part="attention", k=FP4, v=FP4),)))
    with_cache, without = logits_of(model, use_cache=True), logits_of(model, use_cache=False)
    plain = [logits_of(raw, use_cache=use_cache) for use_cache in (True, False)]
    assert not torch.allclose(without, plain[1], atol=1e-3)
    if torch.allclose(*plain):  # else the model itself computes something else without a cache
        torch.testing.assert_close(with_cache, without)
    else:
        assert not torch.allclose(with_cache, plain[0], atol=1e-3)


def test_layers_that_reuse_keys_get_quantized_ones():
    """The last two of four layers read what the first two wrote: what a rule says of them has no effect."""
    raw = small("gemma3n_text")
    first = mxlab.Rule(part="attention", layers="0-1", k=FP4, v=FP4)
    last = mxlab.Rule(part="attention", layers="2-3", k=FP4, v=FP4)
    both, head, tail = copy.deepcopy(raw), copy.deepcopy(raw), copy.deepcopy(raw)
    mxlab.apply(both, mxlab.Recipe("test", (first, last)))
    mxlab.apply(head, mxlab.Recipe("test", (first,)))
    mxlab.apply(tail, mxlab.Recipe("test", (last,)))
    assert torch.equal(logits_of(both, use_cache=True), logits_of(head, use_cache=True))
    assert torch.equal(logits_of(tail, use_cache=True), logits_of(raw, use_cache=True))


def test_a_nested_scorer_chooses_the_same_keys():
    """DeepSeek-V3.2's indexer multiplies, too; which tokens it picks is no part of the attention."""
    raw = small("deepseek_v32")

    def choices(model) -> Tensor:
        seen: list[Tensor] = []
        indexer = next(m for m in model.modules() if hasattr(m, "index_topk"))
        handle = indexer.register_forward_hook(lambda *call: seen.append(call[2]))
        logits_of(model, use_cache=True)
        handle.remove()
        return seen[0]

    model = copy.deepcopy(raw)
    mxlab.apply(model, mxlab.Recipe("test", (mxlab.Rule(part="attention", layers="0", q=FP4),)))
    assert torch.equal(choices(model), choices(raw))
    assert not torch.allclose(logits_of(model), logits_of(raw), atol=1e-3)


def test_a_cross_attention_reads_in_decode_what_prefill_wrote():
    class Cross(nn.Module):
        """Writes the keys of a state that is given once, as Llama 3.2 Vision's does those of the image."""

        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, x: Tensor, state: Tensor | None = None, past_key_values=None) -> Tensor:
            if state is not None:
                keys, _ = past_key_values.update(state[:, None], state[:, None], 0)
            else:
                keys = past_key_values.layers[0].keys
            return self.proj(x) @ keys[:, 0].transpose(1, 2)

    model = Computing(Cross())
    mxlab.apply(model, recipe(r"layers\.0", k=FP4, v=FP4))
    cache, state = DynamicCache(), torch.randn(1, 4, 8)
    with torch.no_grad():
        prefill = model(torch.ones(1, 3, 8), state=state, past_key_values=cache)
        decode = model(torch.ones(1, 1, 8), past_key_values=cache)
    assert torch.equal(cache.layers[0].keys[:, 0], mxlab.quantize(state, FP4))
    torch.testing.assert_close(decode, prefill[:, :1])


def test_a_replica_computes_with_its_own_weights():
    """torch.nn.DataParallel, which Trainer makes on several GPUs."""
    model = build("llama")
    mxlab.apply(model, mxlab.Recipe("test", (mxlab.Rule(part="attention", k=FP4, v=FP4),)))
    attention = model.model.layers[0].self_attn
    replica = attention._replicate_for_data_parallel()
    replica._modules = {name: copy.deepcopy(module) for name, module in attention._modules.items()}
    nn.init.zeros_(replica.o_proj.weight)
    x = torch.randn(1, 4, HIDDEN)
    tables = model.model.rotary_emb(x, torch.arange(4)[None])
    with torch.no_grad():
        assert not replica(hidden_states=x, position_embeddings=tables, attention_mask=None)[0].any()
        assert attention(hidden_states=x, position_embeddings=tables, attention_mask=None)[0].any()


# ---- where blocks begin


def test_pads_on_the_left_shift_the_blocks_of_scores_and_probabilities():
    """Blocks run along the keys from the first one, pads included: pads on the right leave a row as it is alone."""
    model = build("llama")
    mxlab.apply(model, mxlab.Recipe("test", (mxlab.Rule(part="attention", softmax=FP4, p=FP4),)))
    ids = tokens(10, 1)
    alone = run(model, ids)
    right = torch.cat([ids, torch.zeros(1, 2, dtype=torch.long)], 1)
    left = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], 1)
    torch.testing.assert_close(run(model, right, attention_mask=(right > 0).long())[:, :10], alone)
    mask, positions = (left > 0).long(), torch.tensor([[0, 0, *range(10)]])
    shifted = run(model, left, attention_mask=mask, position_ids=positions)[:, 2:]
    assert not torch.allclose(shifted, alone, atol=1e-3)
    raw = build("llama")
    torch.testing.assert_close(
        run(raw, left, attention_mask=mask, position_ids=positions)[:, 2:], run(raw, ids), atol=1e-4, rtol=1e-4
    )


@pytest.mark.skipif("gpt_oss" not in transformers.CONFIG_MAPPING, reason="this transformers has no gpt-oss")
def test_sinks_are_scores_among_others():
    """gpt-oss appends one to the scores of each head: the softmax reads it, so that it is in its last block."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM

    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, attn_implementation="eager", pad_token_id=0,
    )  # fmt: skip
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.sinks.fill_(1.3)
    seen = []
    conversion = mxlab.apply(model, mxlab.Recipe("test", (mxlab.Rule(part="attention", softmax=FP4),)))
    with torch.no_grad(), observe(conversion, lambda _, role, x, axis: seen.append(x.clone())):
        model(torch.randint(1, 60, (1, 6)))
    assert seen[0].shape == (1, 4, 6, 7)
