"""Models written as GGUF: read by transformers, by the gguf package, and by llama.cpp where it is installed."""

import json
import math

import gguf
import gguf.quants
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mxlab
from mxlab.errors import ConversionError, RunError
from mxlab.formats import MXFormat
from mxlab.hf import gguf_export
from mxlab.recipe import Recipe, Rule
from mxlab.recipe.transform import Hadamard
from mxlab.sources import models

from support.architectures import build
from support.tokenizers import TEXT, saved

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def weights(*texts, **more):
    parts = zip(("mlp", "attention"), texts * 2, strict=False)
    return Recipe("mine", tuple(Rule(part=part, weight=MXFormat.parse(text), **more) for part, text in parts))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models") / "plain")


def exported(source, recipe, out, dtype="float32", **more):
    gguf_export.export(source, recipe, dtype, out, **more)
    return gguf.GGUFReader(out / "model.gguf")


def tensors(reader):
    return {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}


def value(reader, name):
    return reader.fields[name].contents()


@pytest.mark.parametrize(
    ("text", "kind"),
    [("fp4_e2m1@32", "MXFP4"), ("fp4_e2m1@32,scale_rule=mse", "MXFP4"), ("int8@32", "Q8_0"), ("int4@32", "Q4_0"),
     ("int4@32,scale_rule=mase_int", "Q4_0")],
)  # fmt: skip
def test_the_values_are_those_of_the_grid(text, kind, source, tmp_path):
    recipe = weights(text)
    reader = exported(source, recipe, tmp_path / "out")
    found = tensors(reader)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    mxlab.apply(model, recipe)
    assert {t.tensor_type.name for t in reader.tensors if "ffn_up" in t.name or "attn_q." in t.name} == {kind}
    for i, layer in enumerate(model.model.layers):
        attention, block = layer.self_attn, f"blk.{i}."
        assert torch.equal(found[block + "ffn_down.weight"], layer.mlp.down_proj.weight)
        assert torch.equal(found[block + "attn_v.weight"], attention.v_proj.weight)
        assert torch.equal(found[block + "attn_norm.weight"], layer.input_layernorm.weight)
        # Elements k and k + 8 of a head of 16 become neighbours.
        for name, weight in (("attn_q", attention.q_proj.weight), ("attn_k", attention.k_proj.weight)):
            heads = weight.view(-1, 16, 64)
            wanted = torch.stack([heads[:, :8], heads[:, 8:]], dim=2).reshape(weight.shape)
            assert torch.equal(found[f"{block}{name}.weight"], wanted)
    assert torch.equal(found["token_embd.weight"], model.model.embed_tokens.weight)
    assert torch.equal(found["output.weight"], model.lm_head.weight)


@pytest.mark.parametrize("text", ["fp4_e2m1@32", "int8@32"])
@pytest.mark.parametrize("changes", [{}, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}])
def test_transformers_reads_it(text, changes, tmp_path):
    source, recipe = saved(tmp_path / "plain", **changes), weights(text)
    exported(source, recipe, tmp_path / "out")
    there = {"gguf_file": "model.gguf"}
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **there, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    mxlab.apply(model, recipe)
    state = model.state_dict()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    tokenizer, own = AutoTokenizer.from_pretrained(tmp_path / "out", **there), AutoTokenizer.from_pretrained(source)
    assert tokenizer(TEXT)["input_ids"] == own(TEXT)["input_ids"]


def test_the_type_of_what_is_not_quantized(source, tmp_path):
    for dtype, kind in (("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")):
        reader = exported(source, weights("fp4_e2m1@32"), tmp_path / dtype, dtype)
        kinds = {t.name: t.tensor_type.name for t in reader.tensors}
        assert kinds["token_embd.weight"] == kind
        assert kinds["output_norm.weight"] == "F32"
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
        assert torch.equal(tensors(reader)["token_embd.weight"], model.model.embed_tokens.weight.float())


def test_what_is_said_of_the_embedded_model_is_what_its_own_file_says(tmp_path):
    own = gguf.GGUFReader(models.gguf_file())
    found = exported(
        "smollm2", Recipe("m", (Rule(part="mlp", weight=MXFormat.parse("fp4_e2m1@32")),)), tmp_path / "out"
    )
    for name, field in found.fields.items():
        if name.startswith(("llama.", "tokenizer.")) and name in own.fields and name != "tokenizer.ggml.pre":
            assert field.contents() == value(own, name), name
    wanted = {name for name in own.fields if name.startswith(("llama.", "tokenizer."))}
    assert wanted - set(found.fields) == {"tokenizer.ggml.add_space_prefix"} - set(found.fields)
    assert value(found, "general.file_type") == gguf.LlamaFileType.MOSTLY_MXFP4_MOE
    by_name = {t.name: t for t in own.tensors}
    for tensor in found.tensors:
        assert tuple(tensor.shape) == tuple(by_name[tensor.name].shape)
    # A weight that is not quantized has the rows in the order of the file that it came from.
    original = by_name["blk.7.attn_q.weight"]
    wanted = gguf.quants.dequantize(original.data, original.tensor_type)
    assert np.array_equal(tensors(found)["blk.7.attn_q.weight"].numpy(), wanted)


def test_frequencies_of_llama_3(tmp_path):
    source = saved(tmp_path / "plain", rope_parameters=LLAMA3)
    found = tensors(exported(source, weights("fp4_e2m1@32"), tmp_path / "out"))["rope_freqs.weight"].tolist()
    for i, factor in enumerate(found):
        length = 2 * math.pi * 500000.0 ** (i / 8)  # of a wave, in tokens
        if length < 64 / 4:
            wanted = 1.0
        elif length > 64:
            wanted = 32.0
        else:
            smooth = (64 / length - 1) / 3
            wanted = 1 / ((1 - smooth) / 32 + smooth)
        assert factor == pytest.approx(wanted, rel=1e-4)
    assert 1.0 in found
    assert 32.0 in found


def test_a_quantized_head(tmp_path):
    source = saved(tmp_path / "plain", tie_word_embeddings=True)
    recipe = Recipe("m", (Rule(part="head", weight=MXFormat.parse("int8@32")),))
    reader = exported(source, recipe, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    weight = model.lm_head.weight.detach()
    found = tensors(reader)
    assert torch.equal(found["output.weight"], mxlab.quantize(weight, "int8@32"))
    assert torch.equal(found["token_embd.weight"], weight)


@pytest.mark.parametrize(("name", "arch"), [("qwen2", "qwen2"), ("qwen3", "qwen3"), ("mistral", "llama")])
def test_other_architectures(name, arch, tmp_path):
    model = build(name, vocab_size=300, hidden_size=64, intermediate_size=96)
    saved(tmp_path / "plain", model)
    recipe = weights("fp4_e2m1@32")
    reader = exported(str(tmp_path / "plain"), recipe, tmp_path / "out")
    assert value(reader, "general.architecture") == arch
    rows = {t.name: int(t.shape[-1]) for t in reader.tensors}["token_embd.weight"]
    assert len(value(reader, "tokenizer.ggml.tokens")) == rows == value(reader, f"{arch}.vocab_size")
    assert value(reader, "tokenizer.ggml.tokens")[-1] == f"[PAD{rows - 1}]"
    mxlab.apply(model, recipe)
    found = tensors(reader)
    assert torch.equal(found["blk.1.ffn_gate.weight"], model.model.layers[1].mlp.gate_proj.weight)
    if arch != "llama":
        assert torch.equal(found["blk.1.attn_k.weight"], model.model.layers[1].self_attn.k_proj.weight)


# ---- what cannot be written


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (weights("fp6_e2m3@32"), r"q_proj has weights of fp6_e2m3@32: GGUF has fp4_e2m1@32, int8@32, int4@32 only"),
        (weights("fp4_e2m1@16"), "has weights of fp4_e2m1@16"),
        (weights("nvfp4"), "GGUF has fp4_e2m1@32"),
        (weights("fp4_e2m1@32,scale_bits=4"), "has weights of fp4_e2m1@32,scale_bits=4"),
        (Recipe("m", ()), "quantizes no weight"),
        (Recipe("m", (Rule(part="mlp", weight=MXFormat.parse("fp4_e2m1@32"), activation=MXFormat.parse("fp6_e2m3@32"),
                           transform=Hadamard(32)),)), "has activation of fp6_e2m3@32, which GGUF rounds in its own"),
    ],
)  # fmt: skip
def test_what_it_cannot_express_is_named(recipe, message, source, tmp_path):
    with pytest.raises(ConversionError, match=message):
        gguf_export.export(source, recipe, "float32", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_transform(source, tmp_path):
    rule = Rule(
        part="mlp", weight=MXFormat.parse("fp4_e2m1@32"), activation=MXFormat.parse("int8@32"), transform=Hadamard(32)
    )
    with pytest.raises(ConversionError, match=r"gate_proj has a transform \(hadamard@32\), which GGUF does not apply"):
        gguf_export.export(source, Recipe("m", (rule,)), "float32", tmp_path / "out", weights_only=True)


def test_a_model_of_another_kind_and_a_folder_that_is_there(source, tmp_path):
    saved(tmp_path / "phi", build("phi", vocab_size=300, hidden_size=64, intermediate_size=96))
    with pytest.raises(
        ConversionError, match="models of type phi cannot be written as GGUF yet: llama, mistral, qwen2"
    ):
        gguf_export.export(str(tmp_path / "phi"), weights("fp4_e2m1@32"), "float32", tmp_path / "out")
    with pytest.raises(RunError, match="exists already"):
        gguf_export.export(source, weights("fp4_e2m1@32"), "float32", tmp_path / "phi")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mistral", {"sliding_window": 16}, "has a sliding window of 16 tokens"),
        ("llama", {"hidden_act": "gelu"}, "has the activation gelu"),
        ("qwen3", {"attention_bias": True}, "attention has biases"),
        ("llama", {"vocab_size": 100}, "the tokenizer has 28[0-9] tokens, and the model embeddings for 100"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "of type dynamic"),
    ],
)
def test_what_a_model_has_beyond_its_architecture(name, changes, message, tmp_path):
    saved(tmp_path / "plain", build(name, **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, **changes}))
    with pytest.raises(ConversionError, match=message):
        gguf_export.export(str(tmp_path / "plain"), weights("fp4_e2m1@32"), "float32", tmp_path / "out")


def test_a_scale_that_float16_lacks(source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] *= 1e-9
        model.model.layers[0].mlp.up_proj.weight[5] = 0
    model.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "small")
    with pytest.raises(ConversionError, match=r"layers.0.mlp.up_proj has 2 blocks whose scale no float16 number is"):
        gguf_export.export(str(tmp_path / "small"), weights("int8@32"), "float32", tmp_path / "out")
    exported(str(tmp_path / "small"), weights("fp4_e2m1@32"), tmp_path / "out")


@pytest.mark.parametrize(
    ("cut", "name"),
    [
        ({"type": "ByteLevel", "use_regex": True}, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
                                                {"type": "ByteLevel", "use_regex": True}]}, "smollm"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
            r"\s+(?!\S)|\s+")}}, {"type": "ByteLevel", "use_regex": False}]}, "llama-bpe"),
    ],
)  # fmt: skip
def test_how_a_text_is_cut(cut, name):
    assert gguf_export._cut(cut) == name


@pytest.mark.parametrize(
    "cut",
    [
        None,
        {"type": "Whitespace"},
        {"type": "Sequence", "pretokenizers": []},
        {"type": "ByteLevel", "use_regex": True, "add_prefix_space": True},
    ],
)
def test_an_unknown_cut(cut):
    with pytest.raises(ConversionError, match=r"mxlab does not know what llama.cpp calls that"):
        gguf_export._cut(cut)


def test_another_tokenizer(source, tmp_path):
    folder = saved(tmp_path / "plain")
    file = tmp_path / "plain" / "tokenizer.json"
    whole = json.loads(file.read_text())
    whole["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(whole))
    with pytest.raises(ConversionError, match="the tokenizer is no byte-level BPE, or has a normalizer"):
        gguf_export.export(folder, weights("fp4_e2m1@32"), "float32", tmp_path / "out")


# ---- llama.cpp


def test_llama_cpp_computes_the_same(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python takes minutes to compile: pip install it")
    recipe = weights("fp4_e2m1@32")
    exported("smollm2", recipe, tmp_path / "out")
    loaded = models.load_model("smollm2", "float32", "cpu")
    mxlab.apply(loaded.model, recipe)
    text = "The capital of France is Paris. The capital of Germany is Berlin. The capital of Italy is"
    ids = loaded.tokenizer(text)["input_ids"]
    other = llama_cpp.Llama(str(tmp_path / "out" / "model.gguf"), n_ctx=64, logits_all=True, verbose=False)
    assert other.tokenize(text.encode(), add_bos=False) == ids
    other.eval(ids)
    found = torch.from_numpy(np.array(other.scores[: len(ids)]))
    with torch.no_grad():
        wanted = loaded.model(torch.tensor([ids])).logits[0]
    # ggml rounds activations to eight bits.
    kl = torch.nn.functional.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none")
    assert kl.sum(-1).max() < 0.1
    assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.8
