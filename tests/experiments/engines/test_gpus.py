"""A sweep in several processes."""

import json
import os
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from mxlab.errors import FormatError, RunError, SpecError
from mxlab.experiments.engines import gpus
from mxlab.experiments.sweep import Summary, Sweep, run_sweep

SETTINGS = {"text": "passages", "window": 32, "windows": 1, "dtype": "float32"}


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs, as far as this process knows; the workers find none and compute on the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_two_workers(tiny_llama, tmp_path, two_gpus):
    models = [str(tiny_llama), str(tmp_path / "no-such-model")]
    sweep = Sweep("stage", "ex1", {**SETTINGS}, {"model": models, "block_size": [8, 16]})
    assert run_sweep(sweep, tmp_path, workers=2) == Summary(finished=2, failed=2)
    records = [json.loads(file.read_text("utf-8")) for file in (tmp_path / "stage").glob("2*/run.json")]
    assert sorted(record["options"]["block_size"] for record in records) == [8, 16]
    failures = (tmp_path / "stage" / "failures.jsonl").read_text("utf-8").splitlines()
    assert all("no model folder" in json.loads(line)["error"] for line in failures)
    assert run_sweep(sweep, tmp_path) == Summary(skipped=2, failed=2)


def test_a_gpu_for_each(monkeypatch, two_gpus):
    assert gpus._visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5,6")
    assert gpus._visible_gpus() == ["4", "GPU-5"]


def test_too_many_workers(tmp_path, two_gpus):
    sweep = Sweep("stage", "ex1", SETTINGS)
    with pytest.raises(SpecError, match="workers is 3, one for each GPU, and torch sees 2 here"):
        run_sweep(sweep, tmp_path, workers=3)
    with pytest.raises(FormatError, match="workers is 0"):
        run_sweep(sweep, tmp_path, workers=0)
    with pytest.raises(SpecError, match="device is 'cuda:1': the workers have a GPU each"):
        run_sweep(Sweep("stage", "ex1", {**SETTINGS, "device": "cuda:1"}), tmp_path, workers=2)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_dies(two_gpus):
    with pytest.raises(RunError, match=r"a worker died.* start the same command again"), gpus.started([], 2):
        raise BrokenProcessPool


def test_a_worker_sees_its_gpu_alone(monkeypatch):
    from queue import Queue

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    queue = Queue()
    queue.put("1")
    gpus._take_gpu(queue)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
