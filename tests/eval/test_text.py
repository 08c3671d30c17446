"""Scoring a text from end to end: definition, run directory, comparison, errors."""

import json
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import mxlab
from mxlab.errors import ConversionError, FormatError, MetricError, RunError, SourceError, SpecError
from mxlab.eval.request import Outcome, check_rules_acted
from mxlab.eval.text import TextRequest, evaluate_text
from mxlab.experiments import runs
from mxlab.formats import MXFormat
from mxlab.recipe import Recipe, Rule, load_recipe
from mxlab.report import read
from mxlab.sources import models, texts
from mxlab.sources.model_pool import ModelPool
from mxlab.sources.models import load_model

from support.architectures import build, run

SETTINGS = {"text": "passages", "window": 64, "windows": 4, "dtype": "float32", "device": "cpu", "batch_size": 3}


def tiny(model: Path, name: str = "baseline", **settings: Any) -> TextRequest:
    return TextRequest(load_recipe(name), str(model), **{**SETTINGS, **settings})


def score(request: TextRequest, folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    [values] = request.evaluate(folder).results.values()
    return values


@cache
def whole(name: str, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's logits on the passages' first two windows, and these, computed without mxlab's scoring."""
    loaded = models.load_model(name, "float32", "cpu")
    lines = texts.PASSAGES_FILE.read_text("utf-8").splitlines()
    text = "\n\n".join(json.loads(line)["text"] for line in lines)
    ids = torch.tensor(loaded.tokenizer(text, add_special_tokens=False)["input_ids"][: 2 * length]).view(2, length)
    with torch.no_grad():
        return loaded.model(ids).logits, ids


# ---- the embedded model


def test_two_windows_of_the_embedded_model(tmp_path):
    request = TextRequest(Recipe("baseline"), text="passages", window=96, windows=2, dtype="float32", device="cpu")
    found = score(request, tmp_path)
    logits, ids = whole(models.EMBEDDED, 96)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert found["tokens"] == 2 * 95
    assert found["cross_entropy,none"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity,none"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)
    assert 1 < found["perplexity,none"] < 60
    assert 0 < found["topk_entropy,none"] < loss + 1


def test_quantizing_costs(tmp_path):
    request = TextRequest(load_recipe("ex1"), text="passages", window=96, windows=1, device="cpu", compare=True)
    pool = ModelPool()
    ex1, baseline = (
        replace(request, recipe=load_recipe(name)).evaluate(tmp_path, pool.load).results["passages"]
        for name in ("ex1", "baseline")
    )
    assert ex1["perplexity,none"] > 1.1 * baseline["perplexity,none"]
    assert baseline["kl_divergence,none"] == pytest.approx(0, abs=1e-6)
    assert baseline["top1_agreement,none"] == 1
    assert 0.05 < ex1["kl_divergence,none"] < 5
    assert 0.3 < ex1["top1_agreement,none"] < 0.95


# ---- a tiny model


def test_a_saved_quantized_model_is_compared_with_the_one_it_was_made_from(tiny_llama, tmp_path):
    loaded = load_model(str(tiny_llama), "float32", "cpu")
    mxlab.apply(loaded.model, "ex2")
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = replace(tiny(tiny_llama, "ex2", reference=str(tiny_llama)), model=str(tmp_path / "saved"))
    found, expected = (score(r, tmp_path) for r in (again, tiny(tiny_llama, "ex2", compare=True)))
    assert found["kl_divergence,none"] == expected["kl_divergence,none"] > 0
    with pytest.raises(SpecError, match=r"no unquantized model to compare with.*--reference"):
        evaluate_text(replace(again, reference=None, compare=True), tmp_path)
    with pytest.raises(SpecError, match=r"the reference .* is quantized itself"):
        evaluate_text(replace(again, reference=again.model), tmp_path)


def test_the_run_directory(tiny_llama, tmp_path):
    request = tiny(tiny_llama, "ex2", stride=16, compare=True)
    folder = runs.run(request, tmp_path / "stage", command="mxlab eval")
    [file] = folder.glob("metrics_*.json")
    files = ["command.txt", "env.json", "env.txt", "inventory.json", "output.log", "recipe.toml", "run.json"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([file.name, *files])
    metrics = json.loads(file.read_text(encoding="utf-8"))
    values = metrics["results"]["passages"]
    measured = ("perplexity", "cross_entropy", "topk_entropy", "kl_divergence", "top1_agreement")
    assert values.keys() == {*(f"{name},none" for name in measured), "tokens"}
    assert values["tokens"] == 63 + 3 * 16
    assert metrics["config"]["text"]["sha256"] == request.key()["data"]["passages"]
    assert (metrics["config"]["window"], metrics["config"]["stride"], metrics["config"]["windows"]) == (64, 16, 4)
    assert metrics["n-samples"]["passages"]["effective"] == 4 < metrics["n-samples"]["passages"]["original"]
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert 0 < record["forward_seconds"] < metrics["total_evaluation_time_seconds"]
    assert record["scale_clamps"].keys() == {"weight", "activation", "k", "v"}
    assert runs.find(tmp_path / "stage", runs.run_key(request)) == folder
    assert {(row[0], row[1]) for row in runs.read_metrics(folder)} == {("passages", name) for name in measured}


def test_the_report_reads_it(tiny_llama, tmp_path):
    runs.run(tiny(tiny_llama, "ex1"), tmp_path / "ex1")
    [result] = read.read_tree(tmp_path).results
    assert result.task == "passages"
    assert result.ppl is not None
    assert result.ppl.value > 1
    assert (result.n, result.limited, result.run.dtype, result.run.batch_size) == (4, True, "float32", "3")
    assert result.data == tiny(tiny_llama).key()["data"]["passages"][:12]
    assert set(result.other_metrics) == {"cross_entropy", "topk_entropy"}


def test_the_whole_text(tiny_llama, tmp_path):
    (tmp_path / "a.txt").write_text("one two three four five six seven eight nine ten", encoding="utf-8")
    request = tiny(tiny_llama, text=str(tmp_path / "a.txt"), window=4, windows=None)
    outcome: Outcome = request.evaluate(tmp_path)
    metrics = json.loads(outcome.metrics_file.read_text(encoding="utf-8"))
    assert metrics["n-samples"] == {"a.txt": {"original": 3, "effective": 3}}
    assert outcome.results["a.txt"]["tokens"] == 3 + 3 + 1


def test_the_same_request_gives_the_same_metrics(tiny_llama, tmp_path):
    first, second = (score(tiny(tiny_llama, "ex2"), tmp_path / name) for name in "ab")
    assert first == second
    one_by_one = score(tiny(tiny_llama, "ex2", batch_size=1), tmp_path)
    assert one_by_one["perplexity,none"] == pytest.approx(first["perplexity,none"], rel=1e-4)


def test_what_makes_two_runs_the_same(tiny_llama, tmp_path):
    (tmp_path / "passages.txt").write_text("a", encoding="utf-8")
    request = tiny(tiny_llama)
    key = request.key()
    assert json.loads(json.dumps(key)) == key
    for same in ({"stride": 64}, {"device": "auto"}, {"data_dir": tmp_path}, {"recipe": Recipe("other")}):
        assert replace(request, **same).key() == key
    changes = [
        {"recipe": load_recipe("ex1")},
        {"model": "smollm2"},
        {"text": str(tmp_path / "passages.txt")},
        {"window": 32},
        {"stride": 32},
        {"windows": 3},
        {"windows": None},
        {"batch_size": 1},
        {"dtype": "bfloat16"},
        {"compare": True},
    ]
    keys = [json.dumps(replace(request, **change).key()) for change in changes]
    assert len({json.dumps(key), *keys}) == len(changes) + 1


# ---- errors


def test_windows_that_do_not_fit(tiny_llama, tmp_path):
    (tmp_path / "a.txt").write_text("just a few words", encoding="utf-8")
    with pytest.raises(
        MetricError, match=r"has 4 tokens, fewer than one window of 64: give a longer text or a shorter"
    ):
        score(tiny(tiny_llama, text=str(tmp_path / "a.txt")), tmp_path)
    with pytest.raises(MetricError, match=r"holds 2 windows of 2, fewer than the 3 asked for"):
        score(tiny(tiny_llama, text=str(tmp_path / "a.txt"), window=2, windows=3), tmp_path)
    with pytest.raises(SpecError, match=r"window is 129 tokens, and the model's context 128: give a shorter window"):
        score(tiny(tiny_llama, window=129), tmp_path)
    assert not list(tmp_path.glob("metrics_*"))


def test_a_recipe_or_a_text_that_does_not_fit(tiny_llama, tmp_path):
    with pytest.raises(ConversionError, match="matches no module"):
        score(replace(tiny(tiny_llama), recipe=Recipe("r", (Rule("nothing", weight=MXFormat("fp4")),))), tmp_path)
    with pytest.raises(SourceError, match="no text 'nothing'"):
        score(tiny(tiny_llama, text="nothing"), tmp_path)


def test_a_model_that_gives_no_numbers(tiny_llama, tmp_path):
    def broken(*_: str) -> models.LoadedModel:
        loaded = models.load_model(str(tiny_llama), "float32", "cpu")
        loaded.model.model.norm.weight.data[:] = float("nan")
        return loaded

    with pytest.raises(MetricError, match=r"the logits of \d+ positions of \d+ are NaN"):
        tiny(tiny_llama).evaluate(tmp_path, broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 1}, "window is 1"),
        ({"window": 8.0}, "window is 8.0"),
        ({"stride": 0}, "stride is 0"),
        ({"stride": 513}, "stride is 513: it must be a whole number of tokens up to 512"),
        ({"windows": 0}, "windows is 0"),
        ({"windows": True}, "windows is True"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"model": ""}, "model is ''"),
        ({"text": 5}, "text is 5"),
        ({"device": None}, "device is None"),
        ({"compare": 1}, "compare is 1"),
    ],
)
def test_bad_requests(change, message):
    with pytest.raises((SpecError, FormatError), match=re.escape(message)):
        TextRequest(Recipe("r"), **change)


# ---- rules that never act


def test_a_rule_for_decode_is_not_scored_by_a_text(tiny_llama, tmp_path):
    """It would be the baseline's perplexity, with int2 in the inventory."""
    int2 = MXFormat.parse("int2@32")
    idle = Recipe("idle", (Rule(part="mlp", phase="decode", weight=int2, activation=int2),))
    request = TextRequest(idle, str(tiny_llama), text="passages", window=32, windows=1, dtype="float32", device="cpu")
    with pytest.raises(RunError, match=r"phase = 'decode' never acted.*nothing was generated.*choose a task"):
        evaluate_text(request, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_inventory_says_which_sites_acted(tiny_llama, tmp_path):
    fp4 = MXFormat.parse("fp4_e2m1@32")
    prefill, decode = Rule(part="mlp", phase="prefill", weight=fp4), Rule(part="mlp", phase="decode", activation=fp4)
    both = Recipe("both", (prefill, decode))
    loaded = load_model(str(tiny_llama), "float32", "cpu")
    conversion = mxlab.apply(loaded.model, both)
    assert {tuple(site["acted"]) for site in conversion.inventory()["sites"]} == {()}
    assert len(conversion.idle_rules()) == 2
    ids = torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        loaded.model(ids)
    assert {tuple(site["acted"]) for site in conversion.inventory()["sites"]} == {("prefill",)}
    assert conversion.inventory()["idle_rules"] == ["the rule for part = 'mlp', phase = 'decode'"]
    loaded.model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert {tuple(site["acted"]) for site in conversion.inventory()["sites"]} == {("prefill", "decode")}
    assert conversion.idle_rules() == []


def test_an_expert_that_no_token_goes_to_makes_no_rule_idle():
    model = build("mixtral")
    conversion = mxlab.apply(model, Recipe("test", (Rule(part="mlp", weight=MXFormat.parse("fp4_e2m1@8")),)))
    run(model)
    assert conversion.idle_rules() == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_compiled_code_hides_who_acts(tiny_llama, caplog):
    model = load_model(str(tiny_llama), "float32", "cpu").model
    conversion = mxlab.apply(model, "ex1")
    model.model = torch.compile(model.model)
    check_rules_acted(conversion)
    assert "never acted" in caplog.text


# ---- the beginning of a text


@pytest.fixture
def with_bos(tiny_llama, tmp_path):
    """A model whose tokenizer begins every text with a token."""
    folder = tmp_path / "bos"
    shutil.copytree(tiny_llama, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    first = tokenizer["added_tokens"][0]
    template = {"SpecialToken": {"id": first["content"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {first["content"]: {"id": first["content"], "ids": [first["id"]], "tokens": [first["content"]]}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": tokens,
    }  # fmt: skip
    file.write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": first["content"]}))
    return folder, first["id"]


def test_a_text_may_begin_with_the_token_that_a_model_is_used_to(with_bos, tmp_path, caplog):
    """Against the definition: the token before each window, the same tokens scored."""
    folder, bos = with_bos
    given = {"text": "passages", "window": 16, "windows": 2, "dtype": "float32", "device": "cpu"}
    plain = evaluate_text(TextRequest(load_recipe("baseline"), str(folder), **given), tmp_path)
    assert "is used to" in caplog.text
    assert "--bos" in caplog.text
    caplog.clear()
    found = evaluate_text(TextRequest(load_recipe("baseline"), str(folder), **given, bos=True), tmp_path)
    assert "is used to" not in caplog.text
    loaded = load_model(str(folder), "float32", "cpu")
    ids = texts.encode(loaded.tokenizer, texts.load_text("passages", None))[:32].view(2, 16)
    with torch.no_grad():
        logits = loaded.model(torch.cat([torch.full((2, 1), bos), ids], 1)).logits[:, 1:-1]
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    results, without = found.results["passages"], plain.results["passages"]
    assert results["cross_entropy,none"] == pytest.approx(loss.item(), rel=1e-5)
    assert results["tokens"] == without["tokens"] == 30
    assert results["cross_entropy,none"] != without["cross_entropy,none"]


def test_a_tokenizer_without_such_a_token(tiny_llama, tmp_path, monkeypatch):
    loaded = load_model(str(tiny_llama), "float32", "cpu")
    loaded.tokenizer.bos_token = None
    request = TextRequest(load_recipe("baseline"), str(tiny_llama), text="passages", window=16, windows=1, bos=True)
    with pytest.raises(SpecError, match="has no token for a text's beginning: leave --bos out"):
        evaluate_text(request, tmp_path, lambda *_: loaded)
    assert "bos" in request.key()
    assert "bos" not in replace(request, bos=False).key()
