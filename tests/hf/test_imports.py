"""Models of compressed-tensors and of ggml, taken over code by code."""

import json
from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import pytest
import safetensors.torch
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

from mxlab.errors import RunError, SourceError
from mxlab.formats import MXFormat
from mxlab.hf import compressed_tensors, gguf_export, imports
from mxlab.model.nn.packed import PackedLayer
from mxlab.recipe import Recipe, Rule
from mxlab.sources import models

from support.architectures import build
from support.tokenizers import saved

LAYER = "model.layers.1.mlp.up_proj"


def weights(*texts):
    parts = zip(("mlp", "attention"), texts * 2, strict=False)
    return Recipe("mine", tuple(Rule(part=part, weight=MXFormat.parse(text)) for part, text in parts))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models") / "plain")


def layers(model):
    return {name: module.packed for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert (found[name].fmt.element, found[name].shape) == (weight.fmt.element, weight.shape)
        for part, tensor in weight.tensors().items():
            if part != "tensor_scale":
                assert torch.equal(found[name].tensors()[part], tensor), (name, part)
        assert torch.allclose(found[name].dequantize(), weight.dequantize(torch.float32), rtol=1e-6)


@pytest.mark.parametrize(
    "texts", [("fp4_e2m1@32",), ("fp6_e2m3@32",), ("fp8_e4m3@32",), ("nvfp4",), ("fp4_e2m1@32", "fp8_e4m3@32")]
)
def test_compressed_tensors_and_back(texts, source, tmp_path):
    wanted = compressed_tensors.export(source, weights(*texts), "float32", tmp_path / "there")
    imports.import_model(tmp_path / "there", tmp_path / "back")
    loaded = models.load_model(str(tmp_path / "back"), "float32", "cpu")
    same(layers(loaded.model), layers(wanted.model))
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        assert torch.allclose(loaded.model(ids).logits, wanted.model(ids).logits, atol=1e-4)


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"rope_parameters": LLAMA3}])
def test_gguf_and_back(changes, tmp_path):
    source = saved(tmp_path / "plain", **changes)
    wanted = gguf_export.export(source, weights("fp4_e2m1@32"), "float32", tmp_path / "there")
    imports.import_model(tmp_path / "there" / "model.gguf", tmp_path / "back")
    loaded = models.load_model(str(tmp_path / "back"), "float32", "cpu")
    same(layers(loaded.model), layers(wanted.model))
    ids = torch.arange(5, 105)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, wanted.model(ids).logits)
    assert loaded.tokenizer("the sea")["input_ids"] == models.load_model(source).tokenizer("the sea")["input_ids"]


def test_what_ggml_quantized_itself(source, tmp_path):
    """Its ties and its scales are other ones than mxlab's: the codes are taken as they are."""
    gguf_export.export(source, weights("fp4_e2m1@32"), "float32", tmp_path / "there")
    file = tmp_path / "there" / "model.gguf"
    reader = gguf.GGUFReader(file, "r+")
    own = {}
    for tensor in reader.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.MXFP4:
            rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            values = np.random.default_rng(0).normal(size=rows.shape).astype(np.float32)
            tensor.data[:] = gguf.quants.quantize(values, tensor.tensor_type)
            own[tensor.name] = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    reader.data.flush()
    imports.import_model(file, tmp_path / "back")
    loaded = models.load_model(str(tmp_path / "back"), "float32", "cpu").model
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, own["blk.1.ffn_up.weight"])
    assert torch.equal(loaded.model.layers[0].self_attn.v_proj.weight, own["blk.0.attn_v.weight"])


def test_what_compressed_tensors_packed_itself(source, tmp_path):
    compressed_tensors.export(source, weights("fp4_e2m1@32"), "float32", tmp_path / "there")
    file = tmp_path / "there" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    grid = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = grid[torch.randint(8, (96, 64))] * torch.randint(0, 2, (96, 64)).mul(2).sub(1)
    tensors[f"{LAYER}.weight_packed"] = pack_fp4_to_uint8(values)
    tensors[f"{LAYER}.weight_scale"] = torch.full((96, 2), 125, dtype=torch.uint8)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    imports.import_model(tmp_path / "there", tmp_path / "back")
    loaded = models.load_model(str(tmp_path / "back"), "float32", "cpu").model
    assert torch.equal(loaded.get_submodule(LAYER).weight, values / 4)


# ---- bad input


@pytest.fixture
def there(source, tmp_path):
    compressed_tensors.export(source, weights("fp4_e2m1@32"), "float32", tmp_path / "there")
    return tmp_path / "there"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.weight_packed"), "up_proj has tensors .* that are no packed weight"),
        (lambda t: t.pop(f"{LAYER}.weight_scale"), "lacks model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda t: t.update(more=torch.ones(1)), "has more, which the model has not"),
        (lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(96, 3, dtype=torch.uint8)}), "no microscaling format"),
        (
            lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(90, 2, dtype=torch.uint8)}),
            "that are no packed weight",
        ),
    ],
)
def test_damaged_tensors(change, message, there, tmp_path):
    file = there / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SourceError, match=message):
        imports.import_model(there, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_scales_that_are_no_numbers(there, tmp_path):
    file = there / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors[f"{LAYER}.weight_scale"][3, 1] = 255
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SourceError, match="up_proj: 1 scales have codes that fp4_e2m1@32 has no number for"):
        imports.import_model(there, tmp_path / "back")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(transform_config={"config_groups": {}}), "has a transform_config"),
        (lambda q: q.update(kv_cache_scheme={"num_bits": 8}), "quantizes the KV cache, too"),
        (
            lambda q: q["config_groups"]["group_0"].update(input_activations={"num_bits": 4}),
            "quantizes activations, too",
        ),
    ],
)
def test_what_else_is_quantized_there(change, message, there, tmp_path):
    config = json.loads((there / "config.json").read_text())
    change(config["quantization_config"])
    (there / "config.json").write_text(json.dumps(config))
    tensors = safetensors.torch.load_file(there / "model.safetensors")
    tensors[f"{LAYER}.input_global_scale"] = torch.ones(1)
    safetensors.torch.save_file(tensors, there / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=message):
        imports.import_model(there, tmp_path / "back")
    if "transform" not in message:
        imports.import_model(there, tmp_path / "back", weights_only=True)


@pytest.mark.parametrize(
    "changes", [{**LLAMA3, "low_freq_factor": 2.0}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}]
)
def test_other_frequencies(changes, tmp_path):
    source = saved(tmp_path / "plain", rope_parameters=changes)
    gguf_export.export(source, weights("fp4_e2m1@32"), "float32", tmp_path / "there")
    with pytest.raises(SourceError, match="has frequencies of its own for the rotary embedding"):
        imports.import_model(tmp_path / "there" / "model.gguf", tmp_path / "back")


def test_a_model_with_buffers_of_its_own(tmp_path):
    """Gemma scales its embeddings by a buffer that no file has."""
    model = build("gemma2", vocab_size=300, hidden_size=64, intermediate_size=96)
    source = saved(tmp_path / "plain", model)
    wanted = compressed_tensors.export(source, weights("fp4_e2m1@32"), "float32", tmp_path / "there")
    imports.import_model(tmp_path / "there", tmp_path / "back")
    loaded = models.load_model(str(tmp_path / "back"), "float32", "cpu").model
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, wanted.model(ids).logits, atol=1e-4)


def test_other_folders_and_files(source, there, tmp_path):
    with pytest.raises(SourceError, match="is quantized by nothing: mxlab imports compressed-tensors and GGUF"):
        imports.import_model(Path(source), tmp_path / "back")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"has no config\.json"):
        imports.import_model(tmp_path / "empty", tmp_path / "back")
    with pytest.raises(SourceError, match=r"has no config\.json"):
        imports.import_model(tmp_path / "nowhere", tmp_path / "back")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(SourceError, match=r"bad\.gguf cannot be read as GGUF"):
        imports.import_model(tmp_path / "bad.gguf", tmp_path / "back")
    with pytest.raises(RunError, match="exists already"):
        imports.import_model(there, tmp_path / "empty")
    file = there / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"model.safetensors: .*damaged"):
        imports.import_model(there, tmp_path / "back")
    config = json.loads((there / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "gptq"
    (there / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="is quantized by gptq"):
        imports.import_model(there, tmp_path / "back")
