"""Models exported to compressed-tensors: read by that library through transformers, and by codes of another one."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mxlab
from mxlab.errors import ConversionError, RunError
from mxlab.formats import MXFormat
from mxlab.hf.compressed_tensors import export, target_of
from mxlab.model.plan import make_plan
from mxlab.recipe import Recipe, Rule
from mxlab.recipe.transform import Hadamard
from mxlab.sources import models

from support.architectures import build
from support.llama import tiny

FORMATS = ("fp4_e2m1@32", "fp6_e2m3@32", "fp8_e4m3@32", "nvfp4", "fp4_e2m1@32,scale_rule=mse")
LAYER = "model.layers.1.mlp.up_proj"


def weights(*texts, **more):
    parts = zip(("mlp", "attention"), texts * 2, strict=False)
    return Recipe("mine", tuple(Rule(part=part, weight=MXFormat.parse(text), **more) for part, text in parts))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "plain"
    tiny(hidden_size=64, intermediate_size=96, tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(models.embedded_folder()).save_pretrained(folder)
    return str(folder)


def read(folder):
    """The model as transformers and compressed-tensors load it; they unpack weights when it first runs."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model(torch.tensor([[1, 2]]))
    return model


def converted(source, recipe):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    mxlab.apply(model, recipe)
    return model


@pytest.mark.parametrize("text", FORMATS)
def test_the_library_reads_the_values_of_the_grid(source, tmp_path, text):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    export(source, weights(text), "bfloat16", tmp_path / "out")
    found = read(tmp_path / "out")
    expected = converted(source, weights(text))
    names = [name for name, _ in expected.named_parameters() if name.endswith("proj.weight")]
    assert len(names) == 14
    for name in names:
        theirs, ours = found.get_parameter(name).float(), expected.get_parameter(name).float()
        # NVFP4's scale of the tensor is a divisor there: the last bit may differ.
        tolerance = 2.0**-7 if text == "nvfp4" else 0
        assert (theirs - ours).abs().le(tolerance * ours.abs()).all()
    assert torch.equal(found.get_parameter("model.norm.weight"), expected.get_parameter("model.norm.weight"))


@pytest.mark.parametrize(
    ("text", "dtype", "bits"), [("fp4_e2m1@32", "float4_e2m1fn", 4), ("fp6_e2m3@32", "float6_e2m3fn", 6)]
)
def test_bytes_are_codes_of_ml_dtypes_one_behind_the_other(source, tmp_path, text, dtype, bits):
    export(source, weights(text), "bfloat16", tmp_path / "out")
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    packed, scales = tensors[f"{LAYER}.weight_packed"], tensors[f"{LAYER}.weight_scale"]
    assert packed.dtype == scales.dtype == torch.uint8
    stream = np.unpackbits(packed.numpy(), axis=1, bitorder="little").reshape(len(packed), -1, bits)
    codes = (stream * 2 ** np.arange(bits)).sum(-1).astype(np.uint8)
    values = codes.view(getattr(ml_dtypes, dtype)).astype(np.float32)
    values *= 2.0 ** (scales.numpy().astype(np.float32) - 127).repeat(32, 1)
    expected = converted(source, weights(text)).get_parameter(f"{LAYER}.weight").float()
    assert np.array_equal(values, expected.detach().numpy())


def test_the_configuration(source, tmp_path):
    export(source, weights("fp4_e2m1@32"), "bfloat16", tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == config["config_groups"]["group_0"]["format"] == "mxfp4-pack-quantized"
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["ignore"] == ["lm_head"]
    export(source, weights("fp4_e2m1@32", "fp6_e2m3@32"), "bfloat16", tmp_path / "two")
    config = json.loads((tmp_path / "two" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert [len(group["targets"]) for group in config["config_groups"].values()] == [8, 6]  # attention first


def test_several_formats_are_read(source, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    recipe = weights("fp4_e2m1@32", "fp8_e4m3@32")
    export(source, recipe, "bfloat16", tmp_path / "out")
    found = read(tmp_path / "out")
    for name, parameter in converted(source, recipe).named_parameters():
        assert torch.equal(found.get_parameter(name).float(), parameter.float()), name


def test_a_model_that_mxlab_saved(source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=mxlab.MXConfig(weights("fp4_e2m1@32"))
    )
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "saved")
    for name, given in (("a", source), ("b", str(tmp_path / "saved"))):
        export(given, weights("fp4_e2m1@32"), "bfloat16", tmp_path / name)
    first, second = (safetensors.torch.load_file(tmp_path / n / "model.safetensors") for n in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (weights("int8@32"), r"attn.q_proj has weights of int8@32: compressed-tensors has fp4_e2m1@32, fp6_e2m3@32"),
        (weights("fp4_e2m1@16"), "has weights of fp4_e2m1@16"),
        (weights("fp4_e2m1@32,scale_bits=4"), "has weights of fp4_e2m1@32,scale_bits=4"),
        (weights("fp4_e2m1@32", transform=Hadamard(32)), "has a transform"),
        (weights("fp4_e2m1@32", activation=MXFormat.parse("fp6_e2m3@32")),
         "has activation of fp6_e2m3@32, which compressed-tensors rounds in its own way or not at all: --weights-only"),
        (Recipe("kv", (Rule(part="attention", k=MXFormat.parse("fp4_e2m1@32")),)), "quantizes no weight"),
        (Recipe("all", (Rule(part="all", weight=MXFormat.parse("fp4_e2m1@32")),)),
         "the weight of lm_head is shared with model.embed_tokens"),
    ],
)  # fmt: skip
def test_what_it_cannot_express_is_named(source, tmp_path, recipe, message):
    with pytest.raises(ConversionError, match=message):
        export(source, recipe, "bfloat16", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_weights_alone(source, tmp_path):
    recipe = weights("fp4_e2m1@32", activation=MXFormat.parse("fp6_e2m3@32"))
    export(source, recipe, "bfloat16", tmp_path / "out", weights_only=True)
    with pytest.raises(RunError, match="exists already"):
        export(source, recipe, "bfloat16", tmp_path / "out", weights_only=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama", "48 inputs, and compressed-tensors wants whole blocks of 32"),
        ("gpt2", r"keeps its weight as \[inputs, outputs\]"),
    ],
)
def test_blocks_must_be_whole_and_inputs_come_last(name, message):
    plan = make_plan(build(name), Recipe("mine", (Rule(part="mlp", weight=MXFormat.parse("fp4_e2m1@32")),)))
    with pytest.raises(ConversionError, match=message):
        [target_of(site) for site in plan.sites]
