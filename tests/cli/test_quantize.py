"""``mxlab quantize``: from a model and a text to a folder that every other command reads."""

import json

import pytest

from mxlab.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("restored")

RECIPE = """
name = "mine"
[[rules]]
modules = ".*_proj"
weight = "fp4@16"
activation = "fp4@16"
[algorithms.calibration]
text = "passages"
samples = 2
length = 32
held_out = 1
[algorithms.search]
transforms = ["none", "hadamard@16", "wush@16"]
tokens = 64
[algorithms.gptq]
[algorithms.distillation]
steps = 2
check = 1
batch = 1
"""
MASE = """
by = "regex_name"
[gptq]
format = "mxint"
dataset = "passages"
nsamples = 2
seqlen = 32
[gptq.weight_config]
weight_block_size = 16
weight_width = 4
['model.*_proj']
name = "mxint"
weight_block_size = 16
weight_width = 4
gptq = true
"""


@pytest.fixture
def quantize(mxlab, tiny_llama, tmp_path):
    def call(text, *arguments):
        file = tmp_path / "mine.toml"
        file.write_text(text, encoding="utf-8")
        return mxlab("quantize", tiny_llama, "--recipe", file, "--device", "cpu", *arguments)

    return call


def test_a_quantized_model_is_evaluated_against_the_one_it_was_made_from(quantize, mxlab, tiny_llama, tmp_path):
    out = tmp_path / "made"
    code, printed, _ = quantize(RECIPE, "--out", out)
    assert code == 0
    assert "bits per parameter" in printed
    assert json.loads((out / "quantization.json").read_text(encoding="utf-8"))["seconds"] > 0
    assert "search" not in load_recipe(out / "recipe.toml").algorithms
    assert not out.with_name("made.unfinished").exists()
    text = ["--text", "passages", "--window", 64, "--windows", 2, "--reference", tiny_llama, "--dtype", "float32"]
    code, printed, _ = mxlab("eval", "--model", out, *text, "--device", "cpu", "--out", tmp_path / "results")
    assert code == 0
    assert "kl_divergence" in printed


def test_a_plan_writes_nothing(quantize, tmp_path):
    code, printed, _ = quantize(RECIPE, "--dry-run")
    assert code == 0
    assert "2 x 32 tokens of passages, seed 0; 1 windows more are held out" in printed
    assert "algorithms: search, gptq, distillation" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.toml"]


def test_a_file_of_mase(quantize, tmp_path):
    assert quantize(MASE, "--out", tmp_path / "made")[0] == 0
    assert (tmp_path / "made" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (RECIPE, [], "give --out FOLDER for the quantized model, or --dry-run"),
        (RECIPE.replace("samples = 2", "samples = 100000"), ["--out", "made"], "ask for fewer or shorter"),
        (RECIPE.replace('"passages"', '"nothing.txt"'), ["--out", "made"], "nothing.txt"),
        (RECIPE.replace("steps = 2", "stepps = 2"), ["--out", "made"], "stepps"),
        (RECIPE.split("[algorithms.calibration]")[0], ["--out", "made"], "asks for no algorithm"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(quantize, tmp_path, monkeypatch, text, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, complaint = quantize(text, *arguments)
    assert code
    assert message in complaint
    assert "Traceback" not in complaint
    assert not (tmp_path / "made").exists()
