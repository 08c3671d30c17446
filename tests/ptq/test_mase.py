"""MASE's algorithms with MASE's meaning: against brute force, and whole files end to end."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import mxlab
from mxlab.compat import mase as files
from mxlab.errors import ConversionError, SpecError
from mxlab.formats import parse_format
from mxlab.numerics import hadamard
from mxlab.ptq import mase
from mxlab.ptq.calibration import Windows
from mxlab.ptq.mase.gptq import block_gptq, output_judge, round_by_quantiles, weight_error
from mxlab.ptq.mase.rotation import greedy
from mxlab.ptq.pipeline import quantize_model
from mxlab.ptq.resume import Progress
from mxlab.recipe import Recipe, Rule
from mxlab.recipe.transform import Derotated, parse_transform

from support.llama import tiny

INT4 = mxlab.MXFormat("int4", 16, scale_rule="mase_int")
FINE = "integer,width=31,frac=24"  # to 2^-24: no rounding that matters
IDS = torch.randint(0, 60, (4, 24), generator=torch.Generator().manual_seed(0))

GPTQ = """
[gptq]
model_name = "unsloth/Llama-3.2-1B"
format = "mxint"
dataset = "wikitext2"
nsamples = 4
seqlen = 24
cali_batch_size = 2
quantile_search = true
clip_search_y = true
checkpoint_dir = "checkpoints/gptq"
    [gptq.weight_config]
    weight_block_size = 16
    weight_width = 4
"""
ROTATION = """
[rotation_search]
calib_nsamples = 4
calib_seqlen = 24
improvement_eps = 0.0
cache_path = "checkpoints/rotation_decisions.json"
"""


def file(gptq="", rotation="", more="") -> Recipe:
    """A file in the shape of those of MASE's tutorial 7, for blocks of 16."""
    more += "\ngptq = true" if gptq else ""
    linear = (
        f"name = 'mxint'\nweight_block_size = 16\nweight_width = 4\ndata_in_block_size = 16\ndata_in_width = 4{more}"
    )
    layers = r"model\.layers\.\d+\."
    text = f"""by = "regex_name"
{gptq}{rotation}
['{layers}self_attn$']
name = "mxint"
['{layers}self_attn$'.qk_matmul]
bypass = true
['{layers}self_attn$'.kv_cache]
data_in_block_size = 16
data_in_width = 4
['{layers}self_attn\\.(q|k|v|o)_proj']
{linear}
['{layers}mlp\\.(gate|up|down)_proj']
{linear}
"""
    return files.load(text).recipe


def quantized(recipe, model=None, original=None, progress=None):
    model = model or tiny()
    return quantize_model(model, original or tiny(), recipe, Windows(IDS, 0, IDS), progress)


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


# ---- blocks


def test_a_block_is_rounded_at_once_and_later_ones_make_up_for_it():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    gram = x.t() @ x
    found = block_gptq(weight, gram, 4, 0.01, lambda part, start: part.round())

    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped)).mT  # of the lower factor: U is the one with U^T U = H^-1
    left, expected = weight.clone(), torch.zeros_like(weight)
    for block in range(3):
        inside = range(4 * block, 4 * block + 4)
        for i in inside:
            expected[:, i] = left[:, i].round()
        errors = {i: (left[:, i] - expected[:, i]) / upper[i, i] for i in inside}
        for j in range(4 * block + 4, 12):
            for i in inside:
                left[:, j] -= errors[i] * upper[i, j]
    assert torch.equal(found, expected)
    assert not torch.equal(found, weight.round())


def test_an_input_that_is_always_zero_has_no_weight():
    gram = torch.eye(4, dtype=torch.float64)
    gram[2, 2] = 0
    assert block_gptq(torch.ones(2, 4).double(), gram, 2, 0.01, lambda part, _: part)[:, 2].eq(0).all()


def test_a_scale_is_that_of_the_quantile_that_loses_least():
    part = torch.full((2, 16), 0.4)
    part[:, 0] = torch.tensor([1.1, 40.0])
    found = round_by_quantiles(part, INT4, weight_error)
    assert found[0, 0] == 0.875  # clamped to 7/8 of 2^0, for the sake of the others
    assert torch.equal(found[1], mxlab.quantize(part[1], INT4))


def test_the_error_of_the_output_is_that_of_the_batches_added_up():
    x, difference = torch.randn(4, 3, 8), torch.randn(5, 2)
    expected = sum((x[i : i + 2, :, 4:6].flatten(0, 1) @ difference.t()).norm(dim=0) for i in (0, 2))
    assert torch.allclose(output_judge(x, 2)(difference, 4), expected)


# ---- the rotation


def test_a_derotated_transform_changes_nothing_without_rounding():
    model = tiny()
    before = logits(model)
    rules = (
        Rule(modules=r".*_proj", activation=parse_format(FINE), transform=Derotated()),
        Rule(part="attention", k=parse_format(FINE), v=parse_format(FINE), transform=Derotated()),
    )
    mxlab.apply(model, Recipe("fine", rules))
    assert (logits(model) - before).abs().max() < 1e-5 * before.abs().max()


def test_only_the_activation_is_transformed_and_transformed_back():
    model = tiny()
    layer = model.model.layers[0].mlp.down_proj
    weight = layer.weight.detach().clone()
    mxlab.apply(model, Recipe("a", (Rule(part="mlp", weight=INT4, activation=INT4, transform=Derotated(8)),)))
    assert torch.equal(layer.weight, mxlab.quantize(weight, INT4))
    x = torch.randn(3, 96)
    inside = mxlab.quantize(hadamard.transform(x, 8), INT4)
    assert torch.allclose(layer.mx.on_activation(x), hadamard.transform(inside, 8, inverse=True))


@pytest.mark.parametrize("text", ["derotated_hadamard", "derotated_hadamard@32"])
def test_a_derotated_transform_is_spelled_and_read(text):
    assert str(parse_transform(text)) == text
    rule = Rule.from_dict({"part": "mlp", "activation": "int4@32", "transform": text}, "file")
    assert Rule.from_dict(rule.to_dict(), "file") == rule


@pytest.mark.parametrize("role", ["weight", "q"])
def test_a_derotated_transform_of_a_weight_alone_is_refused(role):
    with pytest.raises(SpecError, match="transforms activation, k, v, and there is no format for any of them"):
        Rule(part="attention", transform=Derotated(), **{role: INT4})


def test_the_search_keeps_a_type_only_if_the_loss_falls():
    gains = {"a": 1.0, "b": -1.0, "c": 3.0, "d": 0.25}
    assert greedy(list(gains), lambda chosen: 9 - sum(gains[kind] for kind in chosen), 0.0) == ["c", "a", "d"]
    assert greedy(list(gains), lambda chosen: 9 - sum(gains[kind] for kind in chosen), 0.5) == ["c", "a"]
    assert greedy(["a"], lambda chosen: 9, 0.0) == []


# ---- whole files


@pytest.mark.parametrize(
    ("gptq", "rotation"), [("", ""), (GPTQ, ""), (GPTQ, ROTATION)], ids=["rtn", "gptq", "rotation"]
)
def test_a_file_of_the_tutorial_is_run_and_saved(tmp_path, gptq, rotation):
    model = tiny()
    conversion = quantized(file(gptq, rotation), model)
    assert "rotation_search" not in conversion.recipe.algorithms.get("mase", {})
    layer = model.model.layers[1].mlp.down_proj
    blocks = layer.weight.detach().unflatten(1, (-1, 16))
    steps = blocks * 8 / torch.exp2(blocks.abs().amax(-1, keepdim=True).log2().ceil())
    assert torch.equal(steps, steps.round())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.layers[1].mlp.down_proj.weight, layer.weight)
    assert torch.equal(logits(again), logits(model))


def test_gptq_and_clipping_choose_other_weights_than_rounding_to_nearest():
    models = [tiny() for _ in range(3)]
    for model, recipe in zip(models, (file(), file(GPTQ), file(more="\nclip_search = true")), strict=True):
        quantized(recipe, model)
    weights = [model.model.layers[0].mlp.up_proj.weight for model in models]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_what_was_rotated_is_in_the_rules(monkeypatch):
    monkeypatch.setattr("mxlab.ptq.mase.rotation.greedy", lambda *_: ["down_proj", "kv_cache"])
    recipe = quantized(file(rotation=ROTATION)).recipe
    rotated = {rule.name for rule in recipe.rules if rule.transform == Derotated()}
    assert rotated == {f"model.layers.{i}.{name}" for i in range(2) for name in ("mlp.down_proj", "self_attn")}
    assert not recipe.algorithms


def test_steps_that_were_kept_are_not_repeated(tmp_path, monkeypatch):
    first, second = tiny(), tiny()
    quantized(file(GPTQ, ROTATION), first, progress=Progress(tmp_path / "steps", {}))
    monkeypatch.setattr("mxlab.ptq.mase.gptq.block_gptq", None)
    monkeypatch.setattr("mxlab.ptq.mase.rotation.greedy", None)
    quantized(file(GPTQ, ROTATION), second, progress=Progress(tmp_path / "steps", {}, resume=True))
    assert torch.equal(logits(first), logits(second))


def test_windows_are_those_that_the_tables_ask_for():
    names = []

    def read(name):
        names.append(name)
        return torch.arange(500)

    found = mase.windows(file(GPTQ, ROTATION.replace("calib_seqlen = 24", "calib_seqlen = 9")), read)
    assert (found.ids.shape, found.rest.shape) == ((4, 24), (4, 9))
    assert names == ["wikitext2_valid"] * 2
    assert mase.windows(file(), read).ids.numel() == 0


# ---- what cannot be done


@pytest.mark.parametrize(
    ("gptq", "rotation", "message"),
    [
        (GPTQ.replace("nsamples = 4", "max_layers = 1"), "", r"\[gptq\]: max_layers = 1 cannot be done"),
        (
            GPTQ.replace("nsamples = 4", "nsample = 4"),
            "",
            r"nsample is not known; did you mean 'nsamples'\?: take it out",
        ),
        (GPTQ.replace("nsamples = 4", "nsamples = 0"), "", "nsamples is 0: it must be a whole number from 1"),
        (GPTQ.replace("nsamples = 4", "percdamp = 0"), "", "percdamp is 0: it must be above 0"),
        (GPTQ.replace("quantile_search = true", "quantile_search = 1"), "", "quantile_search is 1"),
        ("", ROTATION + "matmul_types = ['qk_matmul']\n", "'qk_matmul', which mxlab does not rotate"),
        ("", ROTATION.replace("0.0", "-1.0"), "improvement_eps is -1.0"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_named(gptq, rotation, message):
    with pytest.raises(SpecError, match=message):
        quantized(file(gptq, rotation))


def test_a_size_without_a_hadamard_matrix_is_an_error():
    model = tiny(intermediate_size=92)
    types = "'q_proj', 'k_proj', 'v_proj', 'o_proj', 'up_proj', 'gate_proj', 'kv_cache'"
    with pytest.raises(ConversionError, match=r"cannot rotate down_proj: .*size 92") as found:
        quantized(file(rotation=ROTATION), model, tiny(intermediate_size=92))
    assert f"matmul_types = [{types}]" in str(found.value)


def test_a_text_that_is_not_there_or_too_short_is_named():
    read: list[str] = []
    mase.windows(file(GPTQ.replace('"wikitext2"', '"c4"')), lambda name: read.append(name) or torch.arange(500))
    assert read == ["c4"]
    with pytest.raises(SpecError, match="20 tokens, too few for windows of 24"):
        mase.windows(file(GPTQ), lambda _: torch.arange(20))
