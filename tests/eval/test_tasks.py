"""Evaluations from end to end on the embedded model: metrics, what was converted, clamps, times."""

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from mxlab.errors import ConversionError, FormatError, SpecError
from mxlab.eval.request import Outcome
from mxlab.eval.tasks import TaskRequest, evaluate_tasks
from mxlab.formats import MXFormat
from mxlab.recipe import Recipe, Rule, load_recipe
from mxlab.recipe.mx_specs import override

SCORES = ("acc,none", "perplexity,none")


@cache
def smollm2(name: str, **options: Any) -> tuple[Outcome, dict[str, Any]]:
    """The embedded model on eight embedded passages: the outcome, and lm-eval's metrics file."""
    request = TaskRequest(override(load_recipe(name), options), limit=8, batch_size=8, device="cpu")
    with TemporaryDirectory() as folder:
        outcome = evaluate_tasks(request, Path(folder))
        return outcome, json.loads(outcome.metrics_file.read_text(encoding="utf-8"))


def scores(outcome: Outcome) -> list[float]:
    return [outcome.results["mxlab_passages"][name] for name in SCORES]


def tiny(folder: Path, model: Path, chosen: Recipe, **settings: Any) -> Outcome:
    folder.mkdir(exist_ok=True)
    settings = {"limit": 4, "dtype": "float32", "batch_size": 2, "device": "cpu", **settings}
    return evaluate_tasks(TaskRequest(chosen, str(model), **settings), folder)


# ---- the embedded model


def test_the_baseline():
    outcome, metrics = smollm2("baseline")
    assert outcome.conversion.sites == ()
    assert outcome.scale_clamps == {}
    accuracy, perplexity = scores(outcome)
    assert 0 <= accuracy <= 1
    assert 1 < perplexity < 200
    assert metrics["results"]["mxlab_passages"] == outcome.results["mxlab_passages"]
    assert metrics["n-samples"]["mxlab_passages"] == {"original": pytest.approx(200, abs=200), "effective": 8}
    assert metrics["config"]["limit"] == 8
    assert metrics["config"]["model_args"] == {"pretrained": "smollm2"}
    assert metrics["config"]["batch_size"] == 8
    assert 0 < outcome.forward_seconds < float(metrics["total_evaluation_time_seconds"])


def test_ex2_converts_everything_and_moves_the_scores():
    outcome, _ = smollm2("ex2")
    assert (len(outcome.conversion.linears), len(outcome.conversion.attentions)) == (210, 30)
    assert scores(outcome) != scores(smollm2("baseline")[0])
    assert scores(outcome)[1] > scores(smollm2("baseline")[0])[1]
    assert outcome.forward_seconds > 0


def test_no_scale_is_clamped_at_eight_bits():
    clamps = smollm2("ex2")[0].scale_clamps
    assert clamps.keys() == {"weight", "activation", "k", "v"}
    for count in clamps.values():
        assert count["blocks"] > 0
        assert (count["clamped"], count["overflowed"]) == (0, 0)
    # 30 layers of (576, 576), (192, 576), (192, 576), (576, 576) and three of 576 x 1536, in blocks of 32.
    assert clamps["weight"]["blocks"] == 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536) // 32
    assert clamps["k"] == clamps["v"]


def test_scales_are_clamped_at_two_bits():
    outcome, _ = smollm2("ex2", scale_bits=2)
    for role in ("weight", "activation", "k", "v"):
        assert outcome.scale_clamps[role]["clamped"] + outcome.scale_clamps[role]["overflowed"] > 0, role
        assert outcome.scale_clamps[role]["blocks"] >= outcome.scale_clamps[role]["clamped"]


def test_six_bits_are_as_good_as_eight():
    six, eight = smollm2("ex2", scale_bits=6)[0], smollm2("ex2")[0]
    assert scores(six) == scores(eight)
    assert six.scale_clamps == eight.scale_clamps


# ---- a tiny model


def test_the_same_request_gives_the_same_metrics(tiny_llama, tmp_path):
    outcomes = [tiny(tmp_path / name, tiny_llama, load_recipe("ex2")) for name in ("a", "b")]
    first, second = (json.loads(o.metrics_file.read_text(encoding="utf-8"))["results"] for o in outcomes)
    assert first == second
    assert outcomes[0].scale_clamps == outcomes[1].scale_clamps


def test_every_option_reaches_the_model(tiny_llama, tmp_path):
    ex2 = load_recipe("ex2")
    variants = [
        load_recipe("baseline"),
        *(load_recipe(name) for name in ("ex1", "weights_only", "activations_only", "kv_only")),
        ex2,
        *(override(ex2, {"block_size": 4}), override(ex2, {"round": "floor"}), override(ex2, {"bfloat": 10})),
    ]
    found = [scores(tiny(tmp_path / str(i), tiny_llama, r))[1] for i, r in enumerate(variants)]
    assert len(set(found)) == len(variants)


def test_limits_and_batches(tiny_llama, tmp_path):
    baseline = load_recipe("baseline")
    outcomes = [
        tiny(tmp_path / "count", tiny_llama, baseline, limit=3),
        tiny(tmp_path / "fraction", tiny_llama, baseline, limit=0.01),
        tiny(tmp_path / "one by one", tiny_llama, baseline, limit=3, batch_size=1),
    ]
    metrics = [json.loads(o.metrics_file.read_text(encoding="utf-8")) for o in outcomes]
    sizes = [m["n-samples"]["mxlab_passages"] for m in metrics]
    assert [s["effective"] for s in sizes] == [3, -(-sizes[1]["original"] // 100), 3]
    assert scores(outcomes[0]) == pytest.approx(scores(outcomes[2]), rel=1e-4)


def test_data_of_a_folder(tiny_llama, tmp_path):
    (tmp_path / "lambada_openai.jsonl").write_text('{"text": "one two three"}\n' * 3, encoding="utf-8")
    page = " = Title = \n \n Some words about it . \n"
    (tmp_path / "wikitext2_test.raw").write_text(page * 2, encoding="utf-8")
    tasks = ("lambada_openai", "wikitext")
    outcome = tiny(tmp_path / "o", tiny_llama, load_recipe("ex1"), tasks=tasks, data_dir=tmp_path, limit=None)
    assert outcome.results["lambada_openai"].keys() >= {"acc,none", "perplexity,none", "perplexity_stderr,none"}
    assert outcome.results["wikitext"].keys() >= {f"{m},none" for m in ("word_perplexity", "byte_perplexity")}
    assert outcome.results["wikitext"]["word_perplexity,none"] > 1


def test_wikitext_of_the_reference_material(tiny_llama, tmp_path, shared):
    more = {"tasks": ("wikitext",), "data_dir": shared / "data", "limit": 1}
    outcome = tiny(tmp_path / "o", tiny_llama, load_recipe("baseline"), **more)
    metrics = json.loads(outcome.metrics_file.read_text(encoding="utf-8"))
    assert metrics["n-samples"]["wikitext"] == {"original": 62, "effective": 1}


def test_lambada_of_the_reference_material(tiny_llama, tmp_path, shared):
    more = {"tasks": ("lambada_openai",), "data_dir": shared / "data", "limit": 4}
    outcome = tiny(tmp_path / "o", tiny_llama, load_recipe("baseline"), **more)
    metrics = json.loads(outcome.metrics_file.read_text(encoding="utf-8"))
    assert metrics["n-samples"]["lambada_openai"] == {"original": 5153, "effective": 4}


def test_a_context_longer_than_the_models_is_said(tiny_llama, tmp_path, caplog):
    tiny(tmp_path / "o", tiny_llama, load_recipe("baseline"))
    assert "the model's context is 128 tokens: --max-length 2048 is cut to it" in caplog.text
    caplog.clear()
    tiny(tmp_path / "o", tiny_llama, load_recipe("baseline"), max_length=64)
    assert "is cut to it" not in caplog.text


def test_a_recipe_that_does_not_fit(tiny_llama, tmp_path):
    with pytest.raises(ConversionError, match=r"matches no module .* model\.layers\.0\.self_attn\.q_proj"):
        tiny(tmp_path / "o", tiny_llama, Recipe("r", (Rule("nothing", weight=MXFormat("fp4")),)))
    assert not list((tmp_path / "o").glob("metrics_*"))


# ---- requests


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"limit": -1}, "limit is -1"),
        ({"limit": 1.5}, "limit is 1.5"),
        ({"limit": float("nan")}, "limit is nan"),
        ({"limit": float("inf")}, "limit is inf"),
        ({"limit": True}, "limit is True"),
        ({"limit": "4"}, "limit is '4'"),
        ({"tasks": ()}, "tasks is ()"),
        ({"tasks": ("",)}, "tasks is ('',)"),
        ({"tasks": (5,)}, "tasks is (5,)"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 1.0}, "batch_size is 1.0"),
        ({"max_length": 1}, "max_length is 1"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"dtype": ["float32"]}, "dtype is ['float32']"),
        ({"model": ""}, "model is ''"),
        ({"model": None}, "model is None"),
        ({"device": None}, "device is None"),
    ],
)
def test_bad_requests(change, message):
    with pytest.raises((SpecError, FormatError), match=re.escape(message)):
        replace(TaskRequest(Recipe("r")), **change)


@pytest.mark.parametrize("limit", [None, 1, 1.0, 256, 0.25, 1e-9])
def test_good_limits(limit):
    assert TaskRequest(Recipe("r"), limit=limit).limit == limit


def test_rows_that_share_a_call_of_the_model_are_counted_each(tiny_llama):
    """Multiple choice with answers of one token: lm-eval calls the model once for a question."""
    from lm_eval.api.instance import Instance

    from mxlab.eval import tasks
    from mxlab.progress import Steps, shown_by
    from mxlab.sources.models import load_model

    class Seen:
        def __init__(self):
            self.done = {}

        def begin(self, steps: Steps):
            self.done[steps.description] = 0, steps.total

        def advance(self, steps: Steps):
            self.done[steps.description] = steps.done, steps.total

        def end(self, steps: Steps):
            pass

    loaded = load_model(str(tiny_llama), "float32", "cpu")
    lm = tasks._TimedHFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=2, max_length=64)
    pairs = [(question, answer) for question in ("one", "two", "six") for answer in ("a", "b", "c", "d")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    seen = Seen()
    with shown_by(seen):
        answers = lm.loglikelihood(requests, disable_tqdm=True)
        lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("word " * 100,), 0)], disable_tqdm=True)
    assert len(answers) == 12
    assert seen.done["rows"] == (12, 12)
    windows, total = seen.done["windows"]
    assert windows > 1
    assert total is None


def test_a_dtype_of_torch_is_as_good_as_its_name():
    own: Any = torch.bfloat16
    assert TaskRequest(load_recipe("baseline"), dtype=own) == TaskRequest(load_recipe("baseline"), dtype="bfloat16")
    own = torch.int8
    with pytest.raises(FormatError, match="dtype is 'int8'"):
        TaskRequest(load_recipe("baseline"), dtype=own)
