"""What ``mxlab generate`` and ``mxlab memory`` say, against transformers' own generation and the bytes of tensors."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import mxlab
from mxlab.errors import RunError, SpecError
from mxlab.experiments import memory
from mxlab.experiments.generation import Generation, Generator, agreement
from mxlab.formats import MXFormat
from mxlab.model import footprint
from mxlab.model.apply import prepare
from mxlab.recipe import Recipe, Rule
from mxlab.sources import models

FP4, FP6 = MXFormat.parse("fp4_e2m1@16"), MXFormat.parse("fp6_e2m3@16")
RULES = (
    Rule(part="mlp", weight=FP4, activation=FP6),
    Rule(part="attention", weight=FP4, activation=FP6),
    Rule(part="attention", k=FP4, v=FP4),
)
RECIPE, BASELINE = Recipe("mine", RULES), Recipe("baseline", ())
PROMPT = "The sea is"


def test_the_text_is_that_of_generate(tiny_llama):
    pieces = []
    found = Generator(str(tiny_llama), PROMPT, 12, "float32", "cpu").generate(RECIPE, pieces.append)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    mxlab.apply(model, RECIPE)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = tokenizer(PROMPT, return_tensors="pt")
    wanted = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
    assert list(found.tokens) == wanted
    assert found.text == "".join(pieces) == tokenizer.decode(wanted, skip_special_tokens=True)
    assert found.prompt_tokens == ids["input_ids"].shape[1]
    assert found.first_token_s > 0
    assert found.tokens_per_second > 0
    assert found.weight_bytes < footprint.model_bytes(model)
    assert 0 < found.cache_bytes < 2 * 2 * 2 * 8 * (64 + 32) * 4
    assert json.loads(json.dumps(found.to_dict()))["recipe"] == "mine"


def test_one_token_has_no_speed(tiny_llama):
    assert Generator(str(tiny_llama), PROMPT, 1, "float32", "cpu").generate(BASELINE, str).tokens_per_second is None


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ("", 8, "the prompt is empty"),
        (PROMPT, 0, "tokens is 0: it must be 1 or more"),
        (PROMPT, 1000, r"the prompt has 3 tokens, and 1000 more are asked for: .* positions for 128; .* --tokens 125"),
    ],
)
def test_bad_input(prompt, count, message, tiny_llama):
    with pytest.raises(SpecError, match=message):
        Generator(str(tiny_llama), prompt, count, "float32", "cpu").generate(BASELINE, str)


def test_agreement():
    def written(*tokens):
        return Generation("r", "", tokens, 1, 1.0, None, 1, 1, 1)

    assert agreement([written(1, 2, 3), written(1, 2, 4)]) == 2
    assert agreement([written(1, 2), written(1, 2, 4)]) == 2
    assert agreement([written(3), written(1)]) == 0


# ---- bytes


def test_predicted_bytes_are_those_that_are_stored(tiny_llama, tmp_path):
    theory = footprint.predicted(prepare(models.skeleton(str(tiny_llama), "float32"), RECIPE), 100)
    model = models.load_model(str(tiny_llama), "float32", "cpu").model
    mxlab.apply(model, RECIPE, storage="packed")
    weights = sum(m.weight_elements.nbytes for m in model.modules() if hasattr(m, "weight_elements"))
    scales = sum(m.weight_scales.nbytes for m in model.modules() if hasattr(m, "weight_scales"))
    assert (theory.elements, theory.scales) == (weights, scales)
    assert theory.weights == footprint.model_bytes(model)
    model.save_pretrained(tmp_path / "saved")
    stored = memory.stored_bytes(tmp_path / "saved")
    assert (stored.elements, stored.scales) == (weights, scales)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(1, 100, dtype=torch.long), past_key_values=cache)
    assert footprint.cache_bytes(cache) == theory.cache == 2 * 2 * 2 * 8 * 100 * 5 // 8  # a scale for 8 elements


def test_bytes_of_an_unquantized_cache(tiny_llama):
    model = models.load_model(str(tiny_llama), "float32", "cpu").model
    with torch.no_grad():
        cache = model(torch.ones(2, 10, dtype=torch.long)).past_key_values
    assert footprint.cache_bytes(cache) == 2 * 2 * 10 * 2 * 8 * 4 * 2


def test_memory_from_outside(tiny_llama):
    found = memory.measure(str(tiny_llama), RECIPE, 20, "float32")
    lines = {line.part: line for line in found.lines}
    together = lines["weights together"]
    assert together.theory == together.stored + 2 * 4 * 4  # the frequencies of the rotary embedding, and a copy
    assert together.resident is not None
    assert lines["keys and values"].theory == 2 * 2 * 2 * 8 * 20 * 5 // 8 == lines["keys and values"].stored
    assert lines["activations"].peak >= 0
    assert all(line.reason for line in found.lines)


def test_memory_of_a_process_that_ends(tiny_llama, monkeypatch):
    monkeypatch.setattr(memory, "_CHILD", "raise SystemExit('no luck today')")
    with pytest.raises(RunError, match="the process that was measured ended:\nno luck today"):
        memory.measure(str(tiny_llama), BASELINE, 4, "float32")
    with pytest.raises(SpecError, match="tokens is 0"):
        memory.measure(str(tiny_llama), BASELINE, 0)


# ---- the commands


def test_generate_command(mxlab, tiny_llama):
    code, out, _ = mxlab(
        "generate", tiny_llama, PROMPT, "--recipe", "baseline", "--recipe", "ex1", "--tokens", 5, "--dtype", "float32"
    )
    assert code == 0
    assert f"[baseline] {PROMPT}" in out
    assert f"[ex1] {PROMPT}" in out
    assert re.search(r"tokens/s after it +[\d.]+ +[\d.]+", out)
    assert re.search(r"the same tokens up to number \d", out)


def test_generate_command_in_json(mxlab, tiny_llama):
    code, out, _ = mxlab("generate", tiny_llama, PROMPT, "--tokens", 3, "--json", "--dtype", "float32")
    assert code == 0
    assert [one["recipe"] for one in json.loads(out)] == ["baseline"]


def test_memory_command(mxlab, tiny_llama, tmp_path):
    file = tmp_path / "new" / "memory.json"
    code, out, _ = mxlab(
        "memory", tiny_llama, "--recipe", "kv_only", "--tokens", 10, "--dtype", "float32", "--out", file
    )
    assert code == 0
    assert "weights together" in out
    assert json.loads(file.read_text())["recipes"][0]["recipe"] == "kv_only"


def test_commands_and_bad_input(mxlab, tiny_llama, monkeypatch):
    code, _, err = mxlab("generate", tiny_llama, "", "--recipe", "ex1")
    assert code == 2
    assert "the prompt is empty" in err
    assert mxlab("generate", tiny_llama, PROMPT, "--recipe", "nothing")[0] == 2
    monkeypatch.setenv("MX_SPECS_JSON", "{}")
    assert "MX_SPECS_JSON is set" in mxlab("memory", tiny_llama)[2]
