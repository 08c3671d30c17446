"""Run directories: complete or absent, whatever ends a run; and found again by what they hold."""

import copy
import datetime
import errno
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lm_eval.loggers import EvaluationTracker
from torch import nn

from mxlab import rundir
from mxlab.errors import ConversionError, MxlabError, RunError, SourceError
from mxlab.eval.request import LoadModel, Outcome
from mxlab.eval.tasks import TaskRequest
from mxlab.experiments import provenance, runs
from mxlab.model.apply import Conversion
from mxlab.recipe import Recipe, load_recipe
from mxlab.recipe.mx_specs import override

FILES = ["command.txt", "env.json", "env.txt", "inventory.json", "output.log", "recipe.toml", "run.json"]


@pytest.fixture
def request_(tiny_llama: Path) -> TaskRequest:
    """A request that takes a second."""
    return TaskRequest(load_recipe("ex2"), str(tiny_llama), limit=2, dtype="float32", batch_size=2, device="cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[TaskRequest]:
    """Evaluations that cost nothing; the list holds their requests."""
    seen = []

    def evaluate(request: TaskRequest, folder: Path, load: LoadModel) -> Outcome:
        seen.append(request)
        file = folder / "metrics_1.json"
        file.write_text('{"results": {}}', encoding="utf-8")
        return Outcome(file, {}, Conversion(nn.Linear(1, 1), request.recipe, ()), 0.0, {})

    monkeypatch.setattr(TaskRequest, "evaluate", evaluate)
    return seen


def names(folder: Path) -> list[str]:
    """Everything in the folder, hidden files too; nothing where it is not there."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


# ---- what a run directory holds


def test_a_run_directory(request_, tmp_path, monkeypatch):
    written = []
    save = EvaluationTracker.save_results_aggregated

    def keep(self, *args, **kwargs):
        save(self, *args, **kwargs)
        written.extend(path.read_bytes() for path in Path(self.output_path).parent.glob("metrics_*.json"))

    monkeypatch.setattr(EvaluationTracker, "save_results_aggregated", keep)
    folder = runs.run(request_, tmp_path / "stage", {"block_size": 32, "model": "tiny"}, "mxlab eval --set 'a b'")
    [metrics] = folder.glob("metrics_*.json")
    assert names(folder) == sorted([*FILES, metrics.name])
    assert names(tmp_path / "stage") == [folder.name]
    date, clock, label = folder.name.split("_", 2)
    assert datetime.datetime.strptime(date + clock, "%Y%m%d%H%M%S") <= datetime.datetime.now()
    assert label == "ex2_tiny-llama_bs32_sb8_cctrue"

    assert [metrics.read_bytes()] == written
    found = read(folder, metrics.name)
    assert found["results"]["mxlab_passages"].keys() >= {"acc,none", "perplexity,none"}
    assert found["n-samples"]["mxlab_passages"]["effective"] == 2
    assert float(found["total_evaluation_time_seconds"]) > 0
    assert found["config"]["model_args"] == {"pretrained": request_.model}

    assert load_recipe(folder / "recipe.toml") == request_.recipe
    assert (folder / "command.txt").read_text(encoding="utf-8") == "mxlab eval --set 'a b'\n"
    described = read(folder, "env.json")
    for name in ("torch", "transformers", "lm_eval", "python", "mxlab", "commit", "cpu", "threads"):
        assert described[name]
        assert f"{name}: {described[name]}\n" in (folder / "env.txt").read_text(encoding="utf-8")
    assert described["mxlab"] == provenance.code_version()
    inventory = read(folder, "inventory.json")
    assert (inventory["linear_layers"], inventory["attentions"]) == (14, 2)
    log = (folder / "output.log").read_text(encoding="utf-8")
    assert log.count("recipe ex2: 14 linear layers") == 1
    assert "[lm_eval" in log

    record = read(folder, "run.json")
    assert record["schema"] == rundir.SCHEMA
    assert record["stage"] == "stage"
    assert record["options"] == {"block_size": 32, "model": "tiny"}
    assert record["key"] == runs.run_key(request_)
    assert record["forward_seconds"] > 0
    assert record["scale_clamps"].keys() == {"weight", "activation", "k", "v"}
    assert runs.find(tmp_path / "stage", runs.run_key(request_)) == folder

    rows = runs.read_metrics(folder)
    assert {(task, metric) for task, metric, *_ in rows} == {("mxlab_passages", m) for m in ("acc", "perplexity")}


def test_the_recipes_options_are_recorded(request_, tmp_path, quick):
    folder = runs.run(request_, tmp_path)
    assert read(folder, "run.json")["options"] == {"block_size": 32, "scale_bits": 8, "custom_cuda": True}
    assert (folder / "command.txt").read_text(encoding="utf-8").strip()


@pytest.mark.parametrize(
    ("name", "options", "label"),
    [
        ("baseline", {}, "baseline"),
        ("ex1", {}, "bs32_sb8_cctrue"),
        ("ex2", {"block_size": 16, "scale_bits": 6, "custom_cuda": False}, "bs16_sb6_ccfalse"),
        ("ex1", {"w_elem_format": "none", "a_elem_format": "none"}, "bsmix_sbmix_cctrue"),
    ],
)
def test_labels_of_the_exercises(name, options, label):
    assert runs.label(override(load_recipe(name), options), "meta-llama/Llama-3.2-1B", name) == label


@pytest.mark.parametrize(
    ("name", "model", "stage", "label"),
    [
        ("baseline", "smollm2", "tiers", "baseline_smollm2"),
        ("tier_c", "meta-llama/Llama-3.2-1B", "tier_c", "tier_c_Llama-3.2-1B_bs32_sb8_cctrue"),
        ("ex1", "gpt2", "full", "ex1_gpt2_bs32_sb8_cctrue"),
        ("tier_a", "gpt2", "ex1", "tier_a_gpt2_bs32_sb8_cctrue"),
        ("kv_only", "~/my models/ünder: way/", "kv_only", "kv_only__nder__way_bs32_sb8_cctrue"),
        ("baseline", "m" * 300, "om", "baseline_" + "m" * 40),
    ],
)
def test_labels_of_other_stages(name, model, stage, label):
    assert runs.label(load_recipe(name), model, stage) == label


def test_a_run_of_the_former_name_is_found(request_, tmp_path, quick):
    folder = runs.run(request_, tmp_path)
    former = folder.rename(tmp_path / "20260207_220640_bs32_sb8_cctrue")
    assert runs.find(tmp_path, runs.run_key(request_)) == former


@pytest.mark.parametrize("is_checkout", [False, True])
def test_git_does_not_complain(is_checkout, request_, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    commit = None
    if is_checkout:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "x"]):
            subprocess.run(["git", *command], check=True)
        commit = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True).stdout.strip()
    folder = runs.run(request_, tmp_path / "stage")
    assert "fatal" not in capfd.readouterr().err
    [metrics] = folder.glob("metrics_*.json")
    assert read(folder, metrics.name)["git_hash"] == commit


def test_log_and_terminal_see_the_same(request_, tmp_path, monkeypatch, capsys):
    def evaluate(request, folder, load):
        print("printed")
        print("complained", file=sys.stderr)
        logging.getLogger("mxlab").info("told")
        logging.getLogger("lm_eval.models").info("told too")
        raise ConversionError("no")

    seen = []
    monkeypatch.setattr(TaskRequest, "evaluate", evaluate)
    monkeypatch.setattr(rundir.shutil, "rmtree", lambda folder, **_: seen.append((folder / "output.log").read_text()))
    levels = [logging.getLogger(name).level for name in ("mxlab", "lm_eval")]
    with pytest.raises(ConversionError):
        runs.run(request_, tmp_path)
    for line in ("printed", "complained", "INFO [mxlab] told", "INFO [lm_eval.models] told too"):
        assert line in seen[0]
    assert capsys.readouterr().out == "printed\n"
    assert levels == [logging.getLogger(name).level for name in ("mxlab", "lm_eval")]
    assert not isinstance(sys.stdout, runs._Tee)


# ---- runs that end early


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ConversionError("x"), RuntimeError("x")])
def test_an_exception_leaves_nothing(error, request_, tmp_path, monkeypatch):
    def evaluate(request, folder, load):
        (folder / "metrics_1.json").write_text("{}", encoding="utf-8")
        raise error

    monkeypatch.setattr(TaskRequest, "evaluate", evaluate)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        runs.run(request_, tmp_path / "results" / "stage")
    assert names(tmp_path) == []


@pytest.mark.parametrize("file", ["command.txt", "env.json", "recipe.toml", "inventory.json", "run.json"])
def test_a_disk_that_fills_leaves_nothing(file, request_, tmp_path, quick, monkeypatch):
    write = Path.write_text

    def write_text(path, text, *args, **kwargs):
        write(path, text[: len(text) // 2] if path.name == file else text, *args, **kwargs)
        if path.name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", write_text)
        with pytest.raises(RunError, match=r"nothing was kept: .*No space left"):
            runs.run(request_, tmp_path)
    assert names(tmp_path) == []
    assert runs.run(request_, tmp_path).is_dir()


@pytest.fixture
def small_disk(tmp_path: Path):
    """Mounts a file system of that many bytes; skips where that is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: int, *options: str) -> Path:
        choice = ",".join([f"size={size}", *options])
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", choice, "tmpfs", place], capture_output=True)
        if done.returncode:
            pytest.skip("no right to mount a file system")
        return place

    try:
        yield mount
    finally:
        subprocess.run(["umount", place], capture_output=True)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
def test_a_full_disk(request_, small_disk):
    """Full before, in and after lm-eval's own writing, whose error it swallows; one page of 4 KiB more each time."""
    complaints, folder, pages = "", None, 2
    stage = small_disk(4096 * pages)
    while folder is None:
        try:
            folder = runs.run(request_, stage)
        except RunError as e:
            assert names(stage) == []
            complaints += str(e)
            pages += 2 if pages < 6 else 1
            small_disk(4096 * pages, "remount")
    assert names(stage) == [folder.name]
    assert runs.find(stage, runs.run_key(request_)) == folder
    assert "No space left on device; put that right" in complaints
    assert "could not write its metrics" in complaints


def test_metrics_that_the_tracker_could_not_write(request_, tmp_path, monkeypatch):
    def half(self, *args, **kwargs):
        Path(self.output_path).with_name("metrics_1.json").write_text('{"results": ', encoding="utf-8")

    for broken in (lambda self, **_: None, half):
        monkeypatch.setattr(EvaluationTracker, "save_results_aggregated", broken)
        with pytest.raises(RunError, match=r"lm-eval could not write its metrics to .*: is the disk full"):
            runs.run(request_, tmp_path)
        assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written(request_, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for stage in (tmp_path / "file", tmp_path / "file" / "stage"):
        with pytest.raises(RunError, match=r"cannot write to .*; give another --out folder"):
            runs.run(request_, stage)
        with pytest.raises(RunError, match=r"^the run's own error \(and failures\.jsonl of .* cannot be written"):
            runs.record_failure(stage, "x", MxlabError("the run's own error"))
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_bad_requests_leave_nothing(request_, tmp_path):
    for change in ({"model": "/no/such"}, {"tasks": ("lambada_openai",), "data_dir": tmp_path}):
        with pytest.raises(SourceError):
            runs.run(replace(request_, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists() or names(tmp_path / "out") == []


# ---- memory that runs out


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], list[int]]:
    """A machine that holds so many rows of a batch, or else raises; gives the batch sizes that were tried."""

    def set_up(rows: int, error: BaseException) -> list[int]:
        tried: list[int] = []
        left: list[weakref.ref[nn.Module]] = []

        def evaluate(request: TaskRequest, folder: Path, load: LoadModel) -> Outcome:
            assert all(model() is None for model in left)  # what the failed attempt held is free again
            tried.append(request.batch_size)
            model = nn.Linear(1, 1)
            left.append(weakref.ref(model))
            if request.batch_size > rows:
                raise copy.copy(error)
            file = folder / "metrics_1.json"
            file.write_text('{"results": {}}', encoding="utf-8")
            return Outcome(file, {}, Conversion(model, request.recipe, ()), 0.0, {})

        monkeypatch.setattr(TaskRequest, "evaluate", evaluate)
        return tried

    return set_up


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
def test_the_batch_size_is_halved(error, request_, tmp_path, small_memory):
    tried = small_memory(5, error)
    request_ = replace(request_, batch_size=17)
    folder = runs.run(request_, tmp_path)
    assert tried == [17, 8, 4]
    record = read(folder, "run.json")
    assert (record["batch_size"], record["key"]["batch_size"]) == (4, 17)
    assert runs.find(tmp_path, runs.run_key(request_)) == folder
    log = (folder / "output.log").read_text(encoding="utf-8")
    assert "memory ran out at a batch size of 17, trying half of it: " in log
    assert "at a batch size of 8" in log


def test_a_model_that_never_fits(request_, tmp_path, small_memory):
    tried = small_memory(0, OUT_OF_MEMORY[0])
    message = r"even at a batch size of 1: CUDA out of memory\. Tried to allocate 2 GiB\.\. Choose shorter windows"
    with pytest.raises(RunError, match=message):
        runs.run(replace(request_, batch_size=4), tmp_path)
    assert tried == [4, 2, 1]
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("out of memory, says a tokenizer")])
def test_other_errors_are_not_tried_again(error, request_, tmp_path, small_memory):
    tried = small_memory(0, error)
    with pytest.raises(type(error)):
        runs.run(request_, tmp_path)
    assert tried == [2]


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_dead_processes_left_is_removed_and_what_living_ones_write_is_kept(request_, tmp_path, quick):
    ours = f".partial-{platform.node()}-"
    living = [tmp_path / f"{ours}{os.getppid()}", tmp_path / f".partial-elsewhere-{dead_pid()}"]
    stale = [tmp_path / f"{ours}{pid}" for pid in (dead_pid(), os.getpid(), "12 (copy)")]
    for folder in (*living, *stale):
        folder.mkdir()
        (folder / "output.log").touch()
    folder = runs.run(request_, tmp_path)
    assert set(names(tmp_path)) == {*(path.name for path in living), folder.name}


# Runs mxlab, and waits to be ended where it has converted the model and begins to score; says so by a file.
_WAITING = """
import logging, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs behind a shell ignores it
class Waiting(logging.Handler):
    def emit(self, record):
        if "nothing is quantized" in record.getMessage():
            pathlib.Path(sign).touch()
            time.sleep(120)
sign = sys.argv.pop(1)
logging.getLogger("mxlab").addHandler(Waiting())
from mxlab.cli.main import main
main()
"""


@pytest.fixture
def killed(tiny_llama: Path, tmp_path: Path) -> dict[signal.Signals, tuple[int, str, Path]]:
    """Exit code, standard error and stage folder of three evaluations, each ended by a signal as it begins to score."""
    options = ["--model", tiny_llama, "--dtype", "float32", "--batch-size", "1", "--device", "cpu"]
    started = {}
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        out, sign = tmp_path / ending.name, tmp_path / f"{ending.name} waits"
        command = [sys.executable, "-c", _WAITING, sign, "eval", *options, "--out", out]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        started[ending] = process, sign, out / "baseline"
    deadline = time.monotonic() + 120
    for ending, (process, sign, _) in started.items():
        while not sign.exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(ending)
    complaints = {ending: process.communicate()[1] for ending, (process, _, _) in started.items()}
    return {ending: (process.returncode, complaints[ending], stage) for ending, (process, _, stage) in started.items()}


def test_signals_leave_no_run_and_the_next_start_goes_on(killed, request_):
    for ending, (code, complaint, stage) in killed.items():
        assert code != 0
        assert "Traceback" not in complaint
        assert [name for name in names(stage) if not name.startswith(".")] == []
        if ending is signal.SIGINT:
            assert "start the same command again" in " ".join(complaint.split())
            assert names(stage) == []
        key = runs.run_key(request_)
        assert runs.find(stage, key) is None
        folder = runs.run(request_, stage)
        assert names(stage) == [folder.name]
        assert runs.find(stage, key) == folder


# ---- many runs


def test_runs_of_one_second_get_names_of_their_own(request_, tmp_path, quick):
    folders = [runs.run(request_, tmp_path) for _ in range(4)]
    assert len(set(folders)) == 4
    assert names(tmp_path) == sorted(folder.name for folder in folders)
    assert all((folder / "run.json").is_file() for folder in folders)


def test_a_name_taken_by_another_process_is_not_overwritten(tmp_path):
    whole = []
    for i in range(8):
        folder = tmp_path / f".partial-{i}"
        folder.mkdir()
        (folder / "run.json").write_text(str(i), encoding="utf-8")
        whole.append(folder)
    threads = [threading.Thread(target=rundir.publish, args=(folder, tmp_path, "x")) for folder in whole]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.read_text(encoding="utf-8") for path in tmp_path.glob("2*/run.json")) == list("01234567")


def test_a_folder_that_vanished_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        rundir.publish(tmp_path / ".partial-1", tmp_path, "x")


# ---- finding


def test_a_run_is_found_by_its_key_and_not_by_its_name(request_, tmp_path, quick):
    key = runs.run_key(request_)
    assert runs.find(tmp_path / "nowhere", key) is None
    folder = runs.run(request_, tmp_path)
    renamed = folder.rename(tmp_path / "my best run")
    assert runs.find(tmp_path, key) == renamed
    named_alike = tmp_path / folder.name
    named_alike.mkdir()
    assert runs.find(tmp_path, key) == renamed


@pytest.mark.parametrize("spoil", ["no metrics", "no record", "not JSON", "a list", "hidden"])
def test_incomplete_runs_are_not_found(spoil, request_, tmp_path, quick):
    key = runs.run_key(request_)
    folder = runs.run(request_, tmp_path)
    match spoil:
        case "no metrics":
            (folder / "metrics_1.json").unlink()
        case "no record":
            (folder / "run.json").unlink()
        case "not JSON":
            (folder / "run.json").write_text('{"key": ', encoding="utf-8")
        case "a list":
            (folder / "run.json").write_text("[]", encoding="utf-8")
        case "hidden":
            folder.rename(tmp_path / f".{folder.name}")
    assert runs.find(tmp_path, key) is None


def test_what_makes_two_runs_the_same(request_, tmp_path, monkeypatch):
    (tmp_path / "lambada_openai.jsonl").write_text('{"text": "a b"}\n', encoding="utf-8")
    key = runs.run_key(request_)
    assert json.loads(json.dumps(key)) == key
    for same in (
        {"recipe": replace(request_.recipe, name="other")},
        {"limit": 2.0},
        {"device": "auto"},
        {"data_dir": tmp_path},
    ):
        assert runs.run_key(replace(request_, **same)) == key
    others = [
        runs.run_key(replace(request_, **change))
        for change in (
            {"recipe": Recipe("ex2")},
            {"model": "smollm2"},
            {"tasks": ("lambada_openai",)},
            {"tasks": ("lambada_openai",), "data_dir": tmp_path},
            {"limit": 3},
            {"limit": None},
            {"limit": 0.5},
            {"dtype": "bfloat16"},
            {"batch_size": 4},
            {"max_length": 64},
        )
    ]
    (tmp_path / "lambada_openai.jsonl").write_text('{"text": "a c"}\n', encoding="utf-8")
    others.append(runs.run_key(replace(request_, tasks=("lambada_openai",), data_dir=tmp_path)))
    monkeypatch.setattr(provenance, "code_version", lambda: "0.1.0+changed")
    others.append(runs.run_key(request_))
    assert len({json.dumps(k, sort_keys=True) for k in (key, *others)}) == len(others) + 1


def test_failures_are_kept_one_a_line(tmp_path):
    for text in ("first", "second\nline"):
        try:
            raise ValueError(text)
        except ValueError as e:
            runs.record_failure(tmp_path / "stage", "block_size=16", e)
    lines = (tmp_path / "stage" / "failures.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["error"] for entry in entries] == ["ValueError: first", "ValueError: second\nline"]
    assert all(
        entry["label"] == "block_size=16" and "raise ValueError(text)" in entry["traceback"] for entry in entries
    )


# ---- the code version


def test_the_code_version_changes_with_what_can_move_a_number(tmp_path, monkeypatch):
    files = ("numerics/reference.py", "numerics/kernels/csrc/mx.h", "cli/main.py", "report/page.py", "checks.py")
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("1", encoding="utf-8")
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    versions = [provenance.code_version()]
    for file in files:
        (tmp_path / file).write_text("2", encoding="utf-8")
        versions.append(provenance.code_version())
    assert len(set(versions[:3])) == 3
    assert len(set(versions[2:])) == 1
    assert provenance._commit() == "not a checkout"
