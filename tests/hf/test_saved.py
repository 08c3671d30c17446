"""A converted model that is saved and loaded again, in every way there is: its weights are quantized once."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mxlab
from mxlab.errors import ConversionError, SpecError
from mxlab.eval.text import TextRequest, evaluate_text
from mxlab.hf.checkpoint import save_converted
from mxlab.model.saved import conversion_of
from mxlab.recipe import Recipe, Rule
from mxlab.sources.models import load_model

from support.architectures import IS_OLD, build
from support.hybrids import SMALL, small

# Under each of these, quantizing a quantized weight once more changes it.
TWICE_IS_NOT_ONCE = (
    "int4@32,scale_rule=mase_int",
    "minifloat_denorm,width=6,exponent_bits=3",
    "block_fp@32,width=6",
    "binary_residual",
    "nvfp4",
)
FORMATS = (*TWICE_IS_NOT_ONCE, "fp4_e2m1@32")


def recipe(fmt: str, name: str = "mine") -> Recipe:
    """Weights of MLPs, and what is not in the weights: activations, K and V."""
    from mxlab.formats import parse_format

    weight, fp4 = parse_format(fmt), mxlab.MXFormat.parse("fp4_e2m1@8")
    return Recipe(name, (Rule(part="mlp", weight=weight, activation=fp4), Rule(part="attention", k=fp4, v=fp4)))


def logits(model) -> torch.Tensor:
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture
def source(request) -> str:
    if IS_OLD:
        pytest.skip("transformers 4 does not read the embedded model's tokenizer")
    return str(request.getfixturevalue("tiny_llama"))


def converted(source: str, fmt: str):
    model = load_model(source, "float32", "cpu").model
    mxlab.apply(model, recipe(fmt))
    return model


LOADERS = {
    "transformers": lambda folder, fmt: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    "mxlab": lambda folder, fmt: load_model(str(folder), "float32", "cpu").model,
    "applied again": lambda folder, fmt: applied(load_model(str(folder), "float32", "cpu").model, recipe(fmt)),
    "applied by its file": lambda folder, fmt: applied(
        load_model(str(folder), "float32", "cpu").model, folder / "recipe.toml"
    ),
    "under another name": lambda folder, fmt: applied(
        load_model(str(folder), "float32", "cpu").model, recipe(fmt, "other")
    ),
}


def applied(model, chosen):
    mxlab.apply(model, chosen)
    return model


# Every format by the way that the others take, too; every way for one format that is not idempotent and one that is.
WAYS = [("transformers", fmt) for fmt in FORMATS] + [(how, fmt) for how in [*LOADERS][1:] for fmt in FORMATS[::5]]


@pytest.mark.parametrize(("how", "fmt"), WAYS)
def test_every_way_to_load_gives_what_was_saved(how, fmt, source, tmp_path):
    expected = logits(converted(source, fmt))
    out = tmp_path / "out"
    save_converted(source, recipe(fmt), "float32", out)
    model = LOADERS[how](out, fmt)
    assert torch.equal(logits(model), expected)
    assert conversion_of(model) is not None


@pytest.mark.parametrize("fmt", FORMATS)
def test_saving_a_loaded_model_again_changes_nothing(fmt, tmp_path):
    model = build("llama")
    mxlab.apply(model, recipe(fmt))
    for name in ("one", "two", "three"):
        expected = logits(model)
        model.save_pretrained(tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        assert torch.equal(logits(model), expected)
    assert getattr(model.config, "quantization_config", None) is None


def test_another_order_of_imports(source, tmp_path):
    """transformers may be imported before mxlab, or after it."""
    save_converted(source, recipe("fp4_e2m1@32"), "float32", tmp_path / "out")
    program = (
        "{}\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained({!r})\n"
        "print(sum(type(m).__name__ == 'MxLinear' for m in model.modules()))\n"
    )
    for imports in ("import mxlab\nimport transformers", "import transformers\nimport mxlab"):
        code = program.format(imports, str(tmp_path / "out"))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
        assert done.stdout.strip() == "6", done.stderr


def test_transformers_alone_loads_the_weights_on_the_grid(source, tmp_path):
    save_converted(source, recipe("fp4_e2m1@32"), "float32", tmp_path / "out")
    code = (
        "import transformers, sys\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        "assert 'mxlab' not in sys.modules\n"
        "print(len(model.model.layers[0].mlp.up_proj.weight.unique()) > 2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr
    assert "mxlab" in done.stderr  # it says that it does not know the method


def test_weights_that_were_changed_since_are_quantized(source, tmp_path):
    save_converted(source, recipe("int4@32,scale_rule=mase_int"), "float32", tmp_path / "out")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "out" / "model.safetensors"
    state = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name] * 1.7 + 0.01
    save_file(state, file, metadata={"format": "pt"})
    model = load_model(str(tmp_path / "out"), "float32", "cpu").model
    fmt = mxlab.MXFormat.parse("int4@32,scale_rule=mase_int")
    assert torch.equal(model.get_parameter(name), mxlab.quantize(state[name], fmt))


def test_a_trained_model_saves_its_master(source, tmp_path):
    """Which is no frozen weight: it is quantized when it is loaded."""
    model = converted(source, "int4@32,scale_rule=mase_int").train()
    model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["frozen"] == {}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model.eval()))


@pytest.mark.skipif(IS_OLD, reason="experts are linear layers in transformers 4")
def test_experts(tmp_path):
    import transformers

    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=4)).eval()
    fmt = mxlab.MXFormat.parse("int4@8,scale_rule=mase_int")
    mxlab.apply(model, Recipe("mine", (Rule(part="mlp", weight=fmt),)))
    expected = logits(model)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(loaded), expected)


def test_a_tied_head_is_saved_in_full_precision(tmp_path):
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)).eval()
    mxlab.apply(
        model, Recipe("mine", (Rule(name="lm_head", weight=mxlab.MXFormat.parse("int4@8,scale_rule=mase_int")),))
    )
    expected = logits(model)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)), expected)


def test_hybrids_too(tmp_path):
    model = small("jamba")
    mxlab.apply(model, Recipe("mine", (Rule(part="mixer", weight=mxlab.MXFormat.parse("int4@8,scale_rule=mase_int")),)))
    expected = logits(model)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)), expected)


# ---- what is refused, and what says so


@pytest.fixture
def folder(source, tmp_path):
    save_converted(source, recipe("fp4_e2m1@32"), "float32", tmp_path / "out")
    return tmp_path / "out"


def test_another_recipe_is_refused(folder):
    for other in ("baseline", "ex1", "tier_a"):
        model = load_model(str(folder), "float32", "cpu").model
        with pytest.raises(ConversionError, match=r"quantized already, under a recipe mine that is not the recipe"):
            mxlab.apply(model, other)


def test_there_is_nothing_to_compare_with(folder, tmp_path):
    request = TextRequest(recipe("fp4_e2m1@32"), str(folder), text="passages", window=32, windows=1, compare=True)
    with pytest.raises(SpecError, match="no unquantized model to compare with"):
        evaluate_text(request, tmp_path)


def test_an_evaluation_without_a_recipe_is_one_under_its_own(folder, tmp_path, monkeypatch, capfd):
    pytest.importorskip("typer")
    from mxlab.cli import main as cli

    out = tmp_path / "results"
    arguments = ["eval", "--model", folder, "--text", "passages", "--window", 32, "--windows", 1, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["mxlab", *map(str, arguments), "--dtype", "float32", "--out", str(out)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert [path.name for path in out.iterdir()] == ["mine"]
    [record] = out.glob("mine/*/run.json")
    assert json.loads(record.read_text())["quantized"] is True


def test_a_broken_configuration_is_named(folder):
    file = folder / "config.json"
    good = json.loads(file.read_text())
    for broken, message in [
        ({"quant_method": "mxlab", "recipe": {"name": "x", "rulez": []}}, "unknown key 'rulez'"),
        ({**good["quantization_config"], "frozen": {"x": 3}}, "broken table frozen"),
    ]:
        file.write_text(json.dumps({**good, "quantization_config": broken}))
        with pytest.raises(Exception, match=message):
            load_model(str(folder), "float32", "cpu")
    AutoTokenizer.from_pretrained(folder)
