"""Packed models in transformers: quantized while they are loaded, saved in their bits, and loaded again."""

import json
import os

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

import mxlab
from mxlab import MXConfig
from mxlab.errors import ConversionError, SourceError, SpecError
from mxlab.model.nn.packed import PackedLayer
from mxlab.model.saved import conversion_of

from support.llama import tiny, tokens


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "plain"
    tiny(hidden_size=64, intermediate_size=96, tie_word_embeddings=False).save_pretrained(folder)
    return folder


def load(folder, **more):
    return AutoModelForCausalLM.from_pretrained(folder, **more)


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def converted(source, recipe, storage="grid"):
    model = load(source).eval()
    mxlab.apply(model, recipe, storage=storage)
    return model


@pytest.fixture
def saved(source, tmp_path):
    """A packed model's folder."""
    load(source, quantization_config=MXConfig("ex1")).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("recipe", ["ex1", "ex2"])
@pytest.mark.parametrize("storage", ["packed", "grid"])
def test_a_model_is_quantized_while_it_is_loaded_saved_and_loaded(source, tmp_path, recipe, storage):
    expected = converted(source, recipe)
    loaded = load(source, quantization_config=MXConfig(recipe, storage=storage))
    assert torch.allclose(logits(loaded), logits(expected), atol=1e-5)
    assert any(isinstance(m, PackedLayer) for m in loaded.modules()) == (storage == "packed")
    assert conversion_of(loaded).recipe.name == recipe
    folder = tmp_path / "saved"
    for _ in range(2):  # what was loaded can be saved
        loaded.save_pretrained(folder)
        again = load(folder)
        assert torch.equal(logits(again), logits(loaded))
        assert {n: t.dtype for n, t in again.named_buffers()} == {n: t.dtype for n, t in loaded.named_buffers()}
        loaded = again


def test_in_bfloat16(source, saved):
    model = load(saved, dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight_elements.dtype == torch.uint8
    assert model.model.embed_tokens.weight.dtype == logits(model).dtype == torch.bfloat16
    assert torch.equal(layer.weight.float(), load(saved).model.layers[0].mlp.up_proj.weight.float())


def test_the_file_has_the_bits_of_the_format(source, saved):
    plain = safetensors.torch.load_file(source / "model.safetensors")
    packed = safetensors.torch.load_file(saved / "model.safetensors")
    elements = sum(t.numel() for n, t in plain.items() if "proj" in n)
    stored = sum(t.numel() for n, t in packed.items() if "weight_" in n)
    assert stored * 8 == 4.25 * elements
    assert not any(n.endswith("proj.weight") for n in packed)
    described = json.loads((saved / "config.json").read_text())["quantization_config"]["packed"]
    found = described["model.layers.0.mlp.up_proj"]
    assert set(found.pop("fingerprints")) == {"elements", "scales"}
    assert found == {
        "layout": 1, "format": "fp4_e2m1@32", "shape": [96, 64], "axis": 1, "dtype": "float32",
    }  # fmt: skip


def test_many_files(source, tmp_path):
    load(source, quantization_config=MXConfig("ex1")).save_pretrained(tmp_path / "saved", max_shard_size="20kB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
    assert torch.allclose(logits(load(tmp_path / "saved")), logits(converted(source, "ex1")), atol=1e-5)


def test_no_weight_in_high_precision_outlives_its_packing(source, monkeypatch):
    from mxlab.hf import quantizer

    alive = []
    original = quantizer._pack

    def pack(model, name, weight):
        others = [n for n, p in model.named_parameters() if "proj" in n and not p.is_meta]
        alive.append(others)
        original(model, name, weight)

    monkeypatch.setattr(quantizer, "_pack", pack)
    load(source, quantization_config=MXConfig("ex1"))
    assert len(alive) == 14
    assert not any(alive)


@pytest.mark.parametrize("part", ["weight_elements", "weight_scales"])
def test_a_missing_tensor(saved, part):
    file = saved / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors[f"model.layers.1.self_attn.k_proj.{part}"]
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SourceError, match=r"model.layers.1.self_attn.k_proj: (the packed weight|.* scales have codes)"):
        load(saved)


def test_a_bit_that_flipped(saved):
    file = saved / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.1.self_attn.k_proj.weight_elements"][2, 3] ^= 4
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SourceError, match=r"model.layers.1.self_attn.k_proj: .* is not what was saved"):
        load(saved)


def test_a_truncated_file(saved):
    file = saved / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(Exception, match=r"(?i)incomplete|not fully covered|invalid"):
        load(saved)


def test_scales_that_are_no_numbers(saved):
    file = saved / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight_scales"][3] = 255
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        SourceError, match="2 scales have codes that fp4_e2m1@32 has no number for: the file is damaged"
    ):
        load(saved)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layout": 2}, SourceError, "has the layout 2, and this version of mxlab reads 1: update mxlab"),
        ({"format": "fp6_e2m3@32"}, ConversionError, "packed as .* of fp6_e2m3@32, and by the model and its recipe is"),
        ({"shape": [96, 32]}, ConversionError, r"packed as \(96, 32\)"),
        ({"axis": 7}, SourceError, "which is no packed tensor"),
        ({"dtype": "int8"}, SourceError, "which is no packed tensor"),
        ({"format": None}, SourceError, "which is no packed tensor"),
    ],
)
def test_a_config_that_does_not_fit(saved, change, error, message):
    file = saved / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["packed"]["model.layers.0.mlp.up_proj"].update(change)
    file.write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        load(saved)


def test_what_calibration_gives_is_refused_before_anything_is_loaded(source):
    with pytest.raises(ConversionError, match="use mxlab quantize"):
        load(source, quantization_config=MXConfig("mxfp4_w4a4kv4_gptq"))
    with pytest.raises(SpecError, match="storage is 'zip'"):
        MXConfig("ex1", storage="zip")
    with pytest.raises(SpecError, match="no recipe"):
        MXConfig("nothing")


def test_a_checkpoint_with_values_that_are_no_numbers(source, tmp_path):
    model = load(source)
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    with pytest.raises(ConversionError, match=r"model.layers.1.mlp.down_proj holds values that are NaN or infinite"):
        load(tmp_path / "bad", quantization_config=MXConfig("ex1"))


def test_generation(source):
    grid, found = converted(source, "ex2"), load(source, quantization_config=MXConfig("ex2"))
    given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(found.generate(tokens(1, 5), **given), grid.generate(tokens(1, 5), **given))
