"""A quantization that was killed goes on where it was, with the bits of one that was not; or says why it cannot."""

import logging
from pathlib import Path

import pytest
import torch
from ptq.test_pipeline import DISTILLED, IDS, logits, recipe

from mxlab.errors import RunError
from mxlab.ptq import distillation
from mxlab.ptq.calibration import Windows
from mxlab.ptq.layers import LayerQuantizer
from mxlab.ptq.pipeline import quantize_model
from mxlab.ptq.resume import Progress, describe

from support.llama import tiny

WINDOWS = Windows(IDS, 2, IDS[:4])
RECIPE = recipe(linear="wush@16", algorithms=DISTILLED)


def run(folder=None, resume=True):
    model, original = tiny().eval(), tiny().eval()
    progress = Progress(folder, describe(model, RECIPE, WINDOWS, "1"), resume)
    quantize_model(model, original, RECIPE, WINDOWS, progress)
    return logits(model)


class KilledError(Exception):
    pass


def killed_after(count, method):
    left = [count]

    def counted(*args, **kwargs):
        if not left[0]:
            raise KilledError
        left[0] -= 1
        return method(*args, **kwargs)

    return counted


@pytest.mark.parametrize("count", [0, 1, 5, 9])
def test_killed_between_layers(count, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(LayerQuantizer, "_choose", killed_after(count, LayerQuantizer._choose))
        with pytest.raises(KilledError):
            run(tmp_path / "kept")
    chosen = []
    choose = LayerQuantizer._choose
    monkeypatch.setattr(LayerQuantizer, "_choose", lambda *a: chosen.append(1) or choose(*a))
    again = run(tmp_path / "kept")
    assert len(chosen) == 14 - count
    assert torch.equal(again, run())


@pytest.mark.parametrize("count", [3, 4, 9])
def test_killed_while_distilling(count, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        accumulate = distillation._accumulate_gradients
        patch.setattr(distillation, "_accumulate_gradients", killed_after(count, accumulate))
        with pytest.raises(KilledError):
            run(tmp_path / "kept")
    assert torch.equal(run(tmp_path / "kept"), run())


def test_a_file_that_was_cut_short_is_computed_again(tmp_path, monkeypatch, caplog):
    run(tmp_path / "kept")
    file = tmp_path / "kept" / "model.layers.0.mlp.up_proj.pt"
    file.write_bytes(file.read_bytes()[:100])
    (tmp_path / "kept" / "distillation.pt").unlink()
    assert torch.equal(run(tmp_path / "kept"), run())
    assert "cannot read" in caplog.text


def test_what_belongs_to_something_else_is_not_used(tmp_path, caplog):
    folder = tmp_path / "kept"
    belongs_to = describe(tiny().eval(), RECIPE, WINDOWS, "1")
    Progress(folder, belongs_to).keep("a", {"x": torch.zeros(1)})
    assert Progress(folder, belongs_to, resume=True).load("a") is not None
    other = describe(tiny(seed=1).eval(), RECIPE, Windows(IDS + 1, 2, IDS), "2")
    caplog.set_level(logging.WARNING)
    assert Progress(folder, other, resume=True).load("a") is None
    assert "was made with another model, text, code: starting over" in caplog.text


def test_without_resume_it_starts_over_and_says_so(tmp_path, caplog):
    Progress(tmp_path / "kept", {"a": 1}).keep("a", {"x": torch.zeros(1)})
    assert Progress(tmp_path / "kept", {"a": 1}).load("a") is None
    assert "is not to be resumed (--resume): starting over" in caplog.text


def test_a_folder_that_is_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="is in the way, and holds no unfinished quantization"):
        Progress(tmp_path, {"a": 1})
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
def test_a_full_disk_keeps_what_is_done(tmp_path):
    progress = Progress(tmp_path / "kept", {"a": 1})
    progress.keep("a", {"x": torch.zeros(1)})

    (tmp_path / "kept" / "b.partial").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"cannot write .*b\.pt.*No space left.*--resume"):
        progress.keep("b", {"x": torch.zeros(1)})
    assert progress.load("a") is not None
    assert progress.load("b") is None


def test_what_is_kept_is_read_from_its_file_and_written_to_in_memory(tmp_path):
    kept = Progress(tmp_path / "kept", {"a": 1}).keep("layer.0", {"x": torch.arange(5000.0), "y": None})
    assert set(kept) == {"x"}
    if (maps := Path("/proc/self/maps")).exists():
        assert any("layer.0.pt" in line and holds(line, kept["x"]) for line in maps.read_text().splitlines())
    kept["x"].zero_()
    again = Progress(tmp_path / "kept", {"a": 1}, resume=True).load("layer.0")
    assert torch.equal(again["x"], torch.arange(5000.0))


def holds(mapping, x):
    start, end = (int(part, 16) for part in mapping.split()[0].split("-"))
    return start <= x.data_ptr() < end


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of what is mapped")
def test_weights_that_are_done_stay_in_their_files(tmp_path):
    model, original = tiny().eval(), tiny().eval()
    only_gptq = recipe(linear="wush@16")
    quantize_model(model, original, only_gptq, WINDOWS, Progress(tmp_path / "kept", {"a": 1}))
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "kept" in line]
    layer = model.model.layers[0]
    for weight in (layer.self_attn.q_proj.weight, layer.mlp.down_proj.weight):
        assert any(holds(line, weight) for line in mapped)


def test_a_kill_before_the_record_is_whole_leaves_a_folder_to_begin_in(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "fingerprint.partial").write_text("{")
    progress = Progress(tmp_path / "kept", {"a": 1}, resume=True)
    progress.keep("x", {"x": torch.zeros(1)})
    assert Progress(tmp_path / "kept", {"a": 1}, resume=True).load("x") is not None


def test_the_record_stays_as_it_is_where_a_run_goes_on(tmp_path):
    Progress(tmp_path / "kept", {"a": 1})
    record = tmp_path / "kept" / "fingerprint.json"
    record.chmod(0o444)
    before = record.stat().st_ino
    Progress(tmp_path / "kept", {"a": 1}, resume=True)
    assert record.stat().st_ino == before


def test_the_order_of_the_tokens_counts():
    shuffled = Windows(IDS.flip(1), 2, IDS[:4])
    described = [describe(tiny(), RECIPE, windows, "1") for windows in (WINDOWS, shuffled)]
    assert described[0]["text"] != described[1]["text"]
    assert {k: v for k, v in described[0].items() if k != "text"} == {
        k: v for k, v in described[1].items() if k != "text"
    }
