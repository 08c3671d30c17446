"""Sweeps: files, grids, what is skipped, what fails."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from mxlab import progress, rundir
from mxlab.errors import RunError, SourceError, SpecError
from mxlab.eval.request import LoadModel, Outcome
from mxlab.eval.tasks import TaskRequest
from mxlab.eval.text import TextRequest
from mxlab.experiments import provenance, runs, sweep
from mxlab.experiments.demo import SWEEPS
from mxlab.experiments.sweep import Summary, Sweep, run_sweep, with_settings
from mxlab.model.apply import Conversion
from mxlab.recipe import load_recipe
from mxlab.recipe.mx_specs import OPTIONS
from mxlab.sources import models

GRID = {(b, s, c) for b in (16, 32, 64) for s in (8, 6) for c in (True, False)}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[TaskRequest]:
    """Evaluations that cost nothing; the list holds their requests. The model ``bad`` fails."""
    seen = []

    def evaluate(request: TaskRequest, folder: Path, load: LoadModel) -> Outcome:
        seen.append(request)
        if request.model == "bad":
            raise ZeroDivisionError("a bug")
        if request.model == "stop":
            raise KeyboardInterrupt
        file = folder / "metrics_1.json"
        file.write_text('{"results": {}}', encoding="utf-8")
        return Outcome(file, {}, Conversion(nn.Linear(1, 1), request.recipe, ()), 0.0, {})

    monkeypatch.setattr(TaskRequest, "evaluate", evaluate)
    return seen


def written(folder: Path, text: str) -> Path:
    file = folder / "my.toml"
    file.write_text(text, encoding="utf-8")
    return file


def grid(**keys: list[Any]) -> Sweep:
    return Sweep("stage", "ex1", {"model": "m", "tasks": ["t"]}, keys)


def failures(folder: Path) -> list[dict]:
    lines = (folder / "stage" / rundir.FAILURES).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# ---- the shipped ones


@pytest.mark.parametrize("name", ["ex1", "ex2"])
def test_the_grid_of_the_seed(name):
    shipped = sweep.load_sweep(name)
    requests = [shipped.request(point, None) for point in shipped.points()]
    found = [tuple(request.recipe.options.values()) for request in requests]
    assert (len(found), set(found)) == (12, GRID)
    assert len({request.recipe.hash for request in requests}) == 12
    default = next(r for r in requests if r.recipe.options == load_recipe(name).options)
    assert default.recipe.hash == load_recipe(name).hash
    assert {(r.tasks, r.limit) for r in requests} == {(("lambada_openai",), 0.25 if name == "ex2" else None)}
    assert {bool(r.recipe.rules[1:]) for r in requests} == {name == "ex2"}
    assert shipped.stage == name


def test_the_baseline():
    shipped = sweep.load_sweep("baseline")
    [point] = shipped.points()
    assert point == {}
    assert shipped.request(point, None).recipe == load_recipe("baseline")


def test_the_demo():
    points = [(s.stage, p.get("block_size")) for s in SWEEPS for p in s.points()]
    sizes = (16, 32, 64)
    assert points == [("baseline", None), *(("ex1", b) for b in sizes), *(("ex2", b) for b in sizes)]
    for s in SWEEPS:
        for p in s.points():
            request = s.request(p, None)
            assert (request.model, request.tasks) == ("smollm2", ("mxlab_passages",))


# ---- files


def test_a_file(tmp_path):
    text = """
    stage = "s"
    recipe = "ex1"
    limit = 4
    tasks = "a"
    block_size = 64
    [grid]
    scale_bits = [8, 6]
    kv_elem_format = ["none", "int8"]
    """
    loaded = sweep.load_sweep(written(tmp_path, text))
    requests = [loaded.request(point, tmp_path) for point in loaded.points()]
    assert [(r.recipe.formats[0].scale_bits, len(r.recipe.rules)) for r in requests] == [(8, 1), (8, 2), (6, 1), (6, 2)]
    assert {(r.limit, r.tasks, r.data_dir, r.recipe.formats[-1].block_size) for r in requests} == {
        (4, ("a",), tmp_path, 64)
    }


HEAD = 'stage = "s"\nrecipe = "ex1"\n'


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["needs stage"]),
        ('stage = "s"', ["needs recipe"]),
        ('stage = 5\nrecipe = "ex1"', ["needs stage"]),
        ('stage = "s"\nrecipe = "ex9"', ["no recipe 'ex9'"]),
        ('stage = "a/b"\nrecipe = "ex1"', ["stage is 'a/b'", "folder"]),
        ('stage = ".."\nrecipe = "ex1"', ["stage is '..'"]),
        ("stage = ", ["is not valid TOML"]),
        (HEAD + "stage = 's'", ["is not valid TOML"]),
        (HEAD + "blok_size = 16", ["unknown key 'blok_size'", "did you mean 'block_size'?"]),
        (HEAD + "[grid]\nblock_sizes = [16]", ["[grid]: unknown key 'block_sizes'", "did you mean 'block_size'?"]),
        (HEAD + "[grid]\nstage = ['a']", ["[grid]: unknown key 'stage'"]),
        (HEAD + "[grdi]\nblock_size = [16]", ["unknown key 'grdi'", "did you mean 'grid'?"]),
        (HEAD + "grid = [16]", ["grid must be a table"]),
        (HEAD + "[grid]\nblock_size = []", ["[grid]: block_size is []", "list of values"]),
        (HEAD + "[grid]\nblock_size = 16", ["[grid]: block_size is 16", "list of values"]),
        (HEAD + "[grid]\nround = 'even'", ["[grid]: round is 'even'", "list of values"]),
        (HEAD + "[grid]\nblock_size = [16, -1]", ["block_size is -1"]),
        (HEAD + "[grid]\nw_elem_format = ['fp4', 'fp5']", ["w_elem_format", "unknown element format 'fp5'"]),
        (HEAD + "[grid]\nw_elem_format = [['fp4']]", ["w_elem_format", "['fp4'] is not the name"]),
        (HEAD + "[grid]\nrecipe = ['ex1', 'ex9']", ["no recipe 'ex9'", "did you mean 'ex2'"]),
        (HEAD + "[grid]\nrecipe = [5]", ["recipe is 5"]),
        (HEAD + "[grid]\ndtype = ['bfloat16', 'float64']", ["dtype is 'float64'"]),
        (HEAD + "[grid]\nlimit = [16, 1.5]", ["limit is 1.5"]),
        (HEAD + "limit = 0", ["limit is 0"]),
        (HEAD + "limit = nan", ["limit is nan"]),
        (HEAD + "limit = inf", ["limit is inf"]),
        (HEAD + "limit = true", ["limit is True"]),
        (HEAD + "limit = '16'", ["limit is '16'"]),
        (HEAD + "batch_size = 0", ["batch_size is 0"]),
        (HEAD + "batch_size = 'auto'", ["batch_size is 'auto'"]),
        (HEAD + "max_length = 1", ["max_length is 1"]),
        (HEAD + "tasks = 5", ["tasks is (5,)"]),
        (HEAD + "tasks = []", ["tasks is ()"]),
        (HEAD + "tasks = ['']", ["tasks is ('',)"]),
        (HEAD + "model = 5", ["model is 5"]),
        (HEAD + "[grid]\nmodel = ['']", ["model is ''"]),
        (HEAD + "device = 0", ["device is 0"]),
        (HEAD + "data_dir = 'x'", ["unknown key 'data_dir'"]),
        (HEAD + "fp = 16", ["bfloat is 16 and fp is 16"]),
        ('stage = "s"\n[grid]\nblock_size = [16]', ['needs recipe, such as recipe = "ex1", or a list of recipes in']),
        ('stage = "s"\nrecipe = 5\n[grid]\nrecipe = ["ex1"]', ["needs recipe"]),
        ('stage = "s"\n[grid]\nrecipe = ["ex1", ""]', ["no recipe ''"]),
    ],
)
def test_bad_files(text, parts, tmp_path, quick):
    with pytest.raises(SpecError) as caught:
        sweep.load_sweep(written(tmp_path, text))
    for part in ("my.toml", *parts):
        assert part in str(caught.value), caught.value


def test_recipes_in_the_grid_alone(tmp_path, quick):
    loaded = sweep.load_sweep(written(tmp_path, 'stage = "s"\ntasks = "t"\n[grid]\nrecipe = ["ex1", "tier_a"]\n'))
    requests = [loaded.request(point, None) for point in loaded.points()]
    assert [request.recipe.name for request in requests] == ["ex1", "tier_a"]
    assert run_sweep(loaded, tmp_path) == Summary(finished=2)
    labels = {folder.name.split("_", 2)[2] for folder in (tmp_path / "s").iterdir()}
    assert labels == {"ex1_smollm2_bs32_sb8_cctrue", "tier_a_smollm2_bs32_sb8_cctrue"}
    [request] = [with_settings(loaded, {"recipe": "ex2"}).request({}, None)]
    assert request.recipe.name == "ex2"


def test_dtypes_of_torch(tmp_path, quick):
    assert run_sweep(grid(dtype=["float32", torch.float16]), tmp_path) == Summary(finished=2)
    assert run_sweep(grid(dtype=[torch.float32, "float16"]), tmp_path) == Summary(skipped=2)
    chosen = with_settings(grid(), {"dtype": torch.float32}).request({}, None)
    assert chosen.dtype == "float32"


@pytest.mark.parametrize("name", ["ex3", "no/such.toml", ""])
def test_no_such_file(name):
    with pytest.raises(SpecError, match="give a TOML file or one of baseline, ex1, ex2"):
        sweep.load_sweep(name)


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "my.toml").write_bytes(b'stage = "\xff"')
    with pytest.raises(SpecError, match=r"cannot read .*my\.toml.*utf-8"):
        sweep.load_sweep(tmp_path / "my.toml")


# ---- running


def test_a_bad_point_is_found_before_anything_runs(tmp_path, quick):
    with pytest.raises(SpecError, match="block_size is -1"):
        run_sweep(grid(block_size=[16, -1]), tmp_path)
    assert quick == []
    assert list(tmp_path.iterdir()) == []


def test_any_key_can_be_swept(tmp_path, quick):
    values = {
        "recipe": ["ex1", "kv_only"],
        "w_elem_format": ["int8", "none"],
        "kv_elem_format": ["fp4", "int4"],
        "quantize_linear": [False, True],
        "round": ["even", "floor"],
        "shared_exp_method": ["max", "none"],
        "bfloat": [0, 16],
        "model": ["a", "b"],
        "tasks": [["t"], ["t", "u"]],
        "dtype": ["float32", "float16"],
        "limit": [4, 0.5],
        "batch_size": [1, 2],
        "max_length": [64, 128],
        "device": ["cpu"],
    }
    for key, entries in values.items():
        summary = run_sweep(replace(grid(**{key: entries}), stage=key), tmp_path)
        assert summary == Summary(finished=len(entries)), key
        records = [json.loads(file.read_text(encoding="utf-8")) for file in (tmp_path / key).glob("*/run.json")]
        assert sorted(str(record["options"][key]) for record in records) == sorted(map(str, entries))
    assert {r.recipe.formats[0].element for r in quick if r.recipe.rules} >= {"int8", "fp4_e2m1", "fp6_e2m3"}
    assert len(OPTIONS) > 20


def test_finished_runs_are_skipped(tmp_path, quick):
    wide = grid(block_size=[16, 32], scale_bits=[8, 6])
    assert run_sweep(grid(block_size=[16]), tmp_path) == Summary(finished=1)
    assert run_sweep(wide, tmp_path) == Summary(finished=3, skipped=1)
    assert run_sweep(wide, tmp_path) == Summary(skipped=4)
    assert len(quick) == 4
    # The name of a directory is a label; an incomplete one is no result.
    one, other, *_ = (tmp_path / "stage").glob("2*")
    one.rename(one.with_name("renamed"))
    next(other.glob("metrics_*.json")).unlink()
    assert run_sweep(wide, tmp_path) == Summary(finished=1, skipped=3)


@pytest.mark.parametrize(
    "settings",
    [
        {"limit": 8},
        {"model": "other"},
        {"tasks": ["t", "u"]},
        {"dtype": "float16"},  # neither of those that auto can mean on a CPU
        {"batch_size": 1},
        {"max_length": 64},
        {"round": "even"},
        {"custom_cuda": False},
    ],
)
def test_what_differs_is_run_again(settings, tmp_path, quick):
    first = grid(block_size=[16, 32])
    assert run_sweep(first, tmp_path) == Summary(finished=2)
    assert run_sweep(with_settings(first, settings), tmp_path) == Summary(finished=2)
    assert run_sweep(first, tmp_path) == run_sweep(with_settings(first, settings), tmp_path) == Summary(skipped=2)


def test_a_new_version_of_the_code_runs_again(tmp_path, quick, monkeypatch):
    assert run_sweep(grid(), tmp_path) == Summary(finished=1)
    monkeypatch.setattr(provenance, "code_version", lambda: "0.1.0+0")
    assert run_sweep(grid(), tmp_path) == Summary(finished=1)


def test_changed_data_runs_again(tmp_path, quick):
    sweeping = with_settings(grid(), {"tasks": ["lambada_openai"]})
    for text in ("a b", "a c"):
        (tmp_path / "lambada_openai.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
        assert run_sweep(sweeping, tmp_path, tmp_path) == Summary(finished=1)
        assert run_sweep(sweeping, tmp_path, tmp_path) == Summary(skipped=1)


def test_a_failing_point_does_not_end_the_others(tmp_path, quick):
    sweeping = grid(model=["a", "bad", "b"], block_size=[16])
    assert run_sweep(sweeping, tmp_path) == Summary(finished=2, failed=1)
    [entry] = failures(tmp_path)
    assert entry["label"] == "model=bad block_size=16"
    assert entry["error"] == "ZeroDivisionError: a bug"
    assert "Traceback" in entry["traceback"]
    # Only the failed one is tried again.
    assert run_sweep(sweeping, tmp_path) == Summary(skipped=2, failed=1)
    assert len(failures(tmp_path)) == 2
    assert not list((tmp_path / "stage").glob(".partial-*"))


def test_missing_data_fails_point_by_point(tmp_path, quick):
    sweeping = grid(tasks=["lambada_openai", "t"])
    assert run_sweep(sweeping, tmp_path, tmp_path / "nowhere") == Summary(finished=1, failed=1)
    assert "lambada_openai.jsonl is missing" in failures(tmp_path)[0]["error"]


def test_ctrl_c_ends_the_sweep_and_the_next_one_goes_on(tmp_path, quick):
    with pytest.raises(KeyboardInterrupt):
        run_sweep(grid(model=["a", "stop", "b"]), tmp_path)
    assert [r.model for r in quick] == ["a", "stop"]
    assert not (tmp_path / "stage" / rundir.FAILURES).exists()
    assert run_sweep(grid(model=["a", "c", "b"]), tmp_path) == Summary(finished=2, skipped=1)


def test_a_place_that_cannot_be_written_ends_the_sweep(tmp_path, quick):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write to .*give another --out folder"):
        run_sweep(grid(block_size=[16, 32]), tmp_path / "file")
    assert quick == []


def test_the_points_are_tracked(tmp_path, quick):
    reporter = Mock()
    with progress.shown_by(reporter):
        run_sweep(grid(block_size=[16, 32]), tmp_path)
    [steps] = [call.args[0] for call in reporter.begin.call_args_list]
    assert (steps.description, steps.total, steps.done) == ("stage", 2, 2)
    reporter.end.assert_called_once_with(steps)


def test_settings_take_the_place_of_grid_keys():
    changed = with_settings(sweep.load_sweep("ex1"), {"scale_bits": 4, "limit": 16})
    requests = [changed.request(point, None) for point in changed.points()]
    assert len(requests) == 6
    assert {(r.limit, r.recipe.formats[0].scale_bits) for r in requests} == {(16, 4)}


def test_a_real_sweep(tiny_llama, tmp_path):
    settings = {"tasks": ["mxlab_passages"], "limit": 2, "dtype": "float32", "batch_size": 2, "device": "cpu"}
    names = [str(tiny_llama), str(tmp_path / "no-such-model")]
    sweeping = Sweep("stage", "ex2", settings, {"model": names, "block_size": [8, 16]})
    assert run_sweep(sweeping, tmp_path) == Summary(finished=2, failed=2)
    assert {entry["error"].split(":")[0] for entry in failures(tmp_path)} == {"SourceError"}
    first, second = sorted((tmp_path / "stage").glob("2*"))
    labels = {first.name.split("_", 2)[2], second.name.split("_", 2)[2]}
    assert labels == {"ex2_tiny-llama_bs8_sb8_cctrue", "ex2_tiny-llama_bs16_sb8_cctrue"}
    assert runs.read_metrics(first) != runs.read_metrics(second)
    assert run_sweep(sweeping, tmp_path) == Summary(skipped=2, failed=2)


# ---- texts, and many models


def test_models_and_recipes(tiny_llama, tmp_path):
    """Two models under three recipes, one of which fits the second model alone."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    deeper = LlamaConfig.from_pretrained(tiny_llama, num_hidden_layers=3)
    torch.manual_seed(1)
    LlamaForCausalLM(deeper).save_pretrained(tmp_path / "deeper")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "deeper")
    file = tmp_path / "third.toml"
    file.write_text('name = "third"\n[[rules]]\nmodules = ".*layers.2.*_proj"\nweight = "int8@8"', encoding="utf-8")
    text = f"""
    stage = "grid"
    recipe = "baseline"
    text = "passages"
    window = 64
    windows = 2
    dtype = "float32"
    [grid]
    model = ["{tiny_llama}", "{tmp_path / "deeper"}"]
    recipe = ["baseline", "{file}", "ex1"]
    """
    sweeping = sweep.load_sweep(written(tmp_path, text))
    assert run_sweep(sweeping, tmp_path) == Summary(finished=5, failed=1)
    [failure] = [json.loads(line) for line in (tmp_path / "grid" / rundir.FAILURES).read_text("utf-8").splitlines()]
    assert failure["label"] == f"model={tiny_llama} recipe={file}"
    assert "matches no module" in failure["error"]
    folders = sorted((tmp_path / "grid").glob("2*"))
    values = {float(row[2]) for folder in folders for row in runs.read_metrics(folder) if row[1] == "perplexity"}
    assert len(values) == 5  # each has its own; none was computed on a model that an earlier one had converted
    assert run_sweep(sweeping, tmp_path) == Summary(skipped=5, failed=1)


def test_a_missing_source_is_asked_for_once(tmp_path, monkeypatch):
    asked = []

    def load(name, *_):
        asked.append(name)
        raise SourceError(f"no {name}")

    monkeypatch.setattr(models, "load_model", load)
    sweeping = Sweep("stage", "ex1", {"text": "passages"}, {"model": ["a", "b"], "block_size": [16, 32, 64]})
    assert run_sweep(sweeping, tmp_path) == Summary(failed=6)
    assert asked == ["a", "b"]
    assert [entry["error"] for entry in failures(tmp_path)] == ["SourceError: no a"] * 3 + ["SourceError: no b"] * 3
    assert run_sweep(sweeping, tmp_path) == Summary(failed=6)  # a second sweep asks again
    assert asked == ["a", "b"] * 2


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (HEAD + "text = 'passages'\ntasks = ['a']", ["tasks is given, which is not for a text"]),
        (HEAD + "text = 'passages'\nlimit = 3", ["limit is given, which is not for a text"]),
        (HEAD + "windows = 3", ["windows is given, which needs a text to score"]),
        (HEAD + "[grid]\ntext = ['passages', '']", ["text is ''"]),
        (HEAD + "text = 'passages'\n[grid]\nstride = [16, 513]", ["stride is 513"]),
        (HEAD + "text = 'passages'\nwindow = 1.5", ["window is 1.5"]),
        (HEAD + "text = 'passages'\nwindos = 1", ["unknown key 'windos'", "did you mean 'windows'?"]),
    ],
)
def test_bad_files_for_texts(text, parts, tmp_path):
    with pytest.raises(SpecError) as caught:
        sweep.load_sweep(written(tmp_path, text))
    for part in ("my.toml", *parts):
        assert part in str(caught.value), caught.value


def test_a_text_takes_the_place_of_tasks():
    shipped = sweep.load_sweep("ex2")
    assert "limit" in shipped.settings
    scored = with_settings(shipped, {"text": "passages", "windows": 2})
    assert {type(scored.request(point, None)) for point in scored.points()} == {TextRequest}
    back = with_settings(scored, {"tasks": ["t"]})
    [request, *_] = [back.request(point, None) for point in back.points()]
    assert (type(request), request.tasks) == (TaskRequest, ("t",))
    with pytest.raises(SpecError, match="tasks is given, which is not for a text"):
        with_settings(shipped, {"text": "passages", "tasks": ["t"]}).request({}, None)
