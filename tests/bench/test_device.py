"""bench/device.py, which checks and times a GPU: a rehearsal on the CPU, and what becomes of kernels that fail."""

import importlib.util
import json
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

from mxlab.numerics.kernels import native

from support.paths import ROOT


@pytest.fixture(scope="module")
def device():
    return load("device")


@pytest.fixture(scope="module")
def bits():
    return load("device_bits")


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(native.MISSING is not None, reason="no native kernels to rehearse on")
def test_a_rehearsal_on_the_cpu(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "device.py"), "--device", "cpu", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    [path] = tmp_path.glob("device-cpu-*.json")
    found = json.loads(path.read_text())
    for part in ("machine", "bits", "quantize", "forward"):
        assert found[part]["failures"] == {}
        assert found[part]["skipped"] == []
    machine = found["machine"]["results"]["machine"]
    assert {"device", "torch", "mxlab", "commit"} <= machine.keys()
    assert found["bits"]["results"] > 4000
    assert len(found["quantize"]["results"]) == 9 * 2 * 2 * 2
    assert [name.split()[0] for name in found["forward"]["results"]] == ["ex1", "ex2"]
    *_, last, where = run.stdout.strip().splitlines()
    assert last.startswith(f"bits: {found['bits']['results']} of {found['bits']['results']} cases as the reference")
    assert path.name in where


def test_bits_that_differ_are_found(bits):
    x = torch.tensor([1.0, float("nan"), -0.0])
    bits.check(x.clone(), x)
    with pytest.raises(AssertionError, match=r"1 of 3 differ, such as 0.0 for -0.0"):
        bits.check(torch.tensor([1.0, float("nan"), 0.0]), x)
    with pytest.raises(AssertionError, match="bfloat16"):
        bits.check(x.bfloat16(), x)


@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_every_case_has_a_name_of_its_own(bits, place):
    names = [name for name, _ in bits.cases(place)]
    assert len(set(names)) == len(names)


def run_part(device, monkeypatch, *processes, seconds=60.0):
    """The part that processes make which say these lines, and from which case each of them starts."""
    said, firsts = iter(processes), []

    def lines(name, options, first, left):
        firsts.append(first)
        yield {"cases": ["a", "b", "c"]}
        yield from next(said)

    monkeypatch.setattr(device, "_lines", lines)
    options = Namespace(device="cuda")
    return device._run("bits", options, device.time.monotonic() + seconds), firsts


DONE = [{"begun": 2}, {"case": "c", "result": {}}, {"ending": "done"}]


def test_a_crash_costs_its_case(device, monkeypatch):
    crash = [{"begun": 0}, {"case": "a", "result": {}}, {"begun": 1}, {"ending": "its process ended with code -11"}]
    part, firsts = run_part(device, monkeypatch, crash, DONE)
    assert firsts == [0, 2]
    assert part.failures == {"b": "its process ended with code -11"}
    assert list(part.results) == ["a", "c"]
    assert part.skipped == []


def test_an_error_that_loses_the_gpu_keeps_its_message(device, monkeypatch):
    lost = [{"begun": 1}, {"case": "b", "error": "RuntimeError: illegal address"}, {"ending": "ended with code 1"}]
    part, firsts = run_part(device, monkeypatch, lost, DONE)
    assert firsts == [0, 2]
    assert part.failures == {"b": "RuntimeError: illegal address"}


def test_a_gpu_that_cannot_be_used_is_not_tried_again(device, monkeypatch):
    gone = [{"unusable": "RuntimeError: no GPU"}, {"ending": "its process ended with code 1"}]
    part, firsts = run_part(device, monkeypatch, gone)
    assert firsts == [0]
    assert part.failures == {"bits": "RuntimeError: no GPU"}
    assert part.skipped == ["a", "b", "c"]


def test_what_is_not_reached_is_said(device, monkeypatch):
    part, _ = run_part(device, monkeypatch, [{"begun": 0}, {"case": "a", "result": {}}, {"ending": "done"}])
    assert part.skipped == ["b", "c"]
    parts = {name: device.Part() for name in device.PARTS} | {"bits": part}
    assert "bits: 1 of 3 cases as the reference, 0 failed, 2 not reached" in device.table(parts)


def test_a_part_that_cannot_start_does_not_stop_the_others(device, monkeypatch):
    monkeypatch.setattr(device, "_lines", lambda *_: iter([{"ending": "its process ended with code 1"}]))
    part = device._run("bits", Namespace(device="cuda"), device.time.monotonic() + 60)
    assert part.failures == {"bits": "its process ended with code 1"}
    parts = {name: device.Part() for name in device.PARTS} | {"bits": part}
    assert "bits FAILED: bits: its process ended with code 1" in device.table(parts)


def test_failures_of_a_kind_take_one_line(device):
    part = device.Part(
        failures={f"case {i}": f"AssertionError: {i} of 9 differ, such as {i}.0 for 1" for i in range(5)}
    )
    [line] = device._failure_lines("bits", part)
    assert "case 0" in line
    assert "4 more" in line


def test_a_process_that_hangs_is_killed(device, monkeypatch, tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text(
        'import time; print(\'{"cases": ["a"]}\', flush=True); print(\'{"begun": 0}\', flush=True); time.sleep(60)'
    )
    monkeypatch.setattr(device, "__file__", str(script))
    monkeypatch.setattr(device, "PATIENCE", 2.0)
    part = device._run("bits", Namespace(device="cuda"), device.time.monotonic() + 60)
    assert part.failures == {"a": "did not end in time"}
    assert part.seconds < 30
