"""The benchmarks: how they alternate, what they write, what they refuse. Never how long anything takes."""

import contextlib
import json
import logging
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from mxlab.bench import figures, mxpackage, results, suite, tables, targets, workload
from mxlab.bench.results import Measurement, Row, Spread, ratios, read, spread, write
from mxlab.bench.tables import grid
from mxlab.bench.timing import Contender, Effort, Stopwatch, alternate, clock_for, threads
from mxlab.bench.workload import expand_formats, parse_shape
from mxlab.cli import main as cli
from mxlab.errors import MxlabError, SourceError, SpecError

ONCE = Effort(repeats=3, warmup=1, min_sample=0)
QUICK = {"repeats": 2, "warmup": 1, "threads": 1}


class FakeClock:
    """Every call of A takes 2 seconds, of B 3, later ones longer by a hundredth; the order is kept."""

    SECONDS: ClassVar = {"A": 2.0, "B": 3.0, "C": 5.0}

    def __init__(self):
        self.calls = []

    def contender(self, name, **settings):
        return Contender(name, lambda: self.calls.append(name), **settings)

    def seconds(self, call, number):
        for _ in range(number):
            call()
        return self.SECONDS[self.calls[-1]] + len(self.calls) / 100


# ---- timing and statistics


def test_contenders_take_turns():
    clock = FakeClock()
    first, second = alternate([clock.contender("A"), clock.contender("B")], ONCE, clock)
    assert clock.calls == ["A", "B"] + ["A", "B"] * 3
    assert first.samples == pytest.approx([2.03, 2.05, 2.07])
    assert second.samples == pytest.approx([3.04, 3.06, 3.08])
    assert first.failure is second.failure is None


def test_a_short_call_is_repeated_within_a_sample():
    clock = FakeClock()
    alternate([clock.contender("A")], Effort(repeats=1, warmup=1, min_sample=5), clock)
    assert clock.calls == ["A"] * (1 + 3)  # three times two seconds make five


def test_a_contender_leaves_when_its_time_is_up_and_the_others_go_on():
    clock = FakeClock()
    found = alternate([clock.contender("A"), clock.contender("B", time_limit=1)], ONCE, clock)
    assert [len(series.samples) for series in found] == [3, 2]


@pytest.mark.parametrize("works", [0, 1, 2])
def test_an_optional_contender_may_fail(works):
    """In the warm-up, or in a later round."""
    clock = FakeClock()

    def call():
        if clock.calls.count("C") >= works:
            raise RuntimeError("no such kernel")
        clock.calls.append("C")

    found = alternate([clock.contender("A"), Contender("C", call, optional=True), clock.contender("B")], ONCE, clock)
    assert [series.failure for series in found] == [None, "RuntimeError: no such kernel", None]
    assert [len(series.samples) for series in found] == [3, 0, 3]


def test_a_stopwatch_takes_what_the_call_returns():
    seconds = iter([9.0, 1.0, 2.0, 3.0])
    [series] = alternate([Contender("A", lambda: next(seconds))], Effort(3, warmup=1, min_sample=0), Stopwatch())
    assert series.samples == [1.0, 2.0, 3.0]


def test_rounds_are_shown(monkeypatch):
    from mxlab import progress

    seen = []

    class Seen:
        def begin(self, steps):
            seen.append((steps.description, steps.total))

        def advance(self, steps):
            seen.append(steps.done)

        def end(self, steps):
            seen.append("end")

    with progress.shown_by(Seen()):
        clock = FakeClock()
        alternate([clock.contender("A")], ONCE, clock, "a case")
    assert seen == [("a case", 3), 1, 2, 3, "end"]


def test_another_contender_may_not():
    def call():
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        alternate([Contender("A", call)], ONCE, FakeClock())


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_gpu_is_timed_between_events_after_it_is_idle(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 8.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("idle"))
    clock = clock_for(torch.device("cuda"))
    assert clock.seconds(lambda: log.append("call"), 2) == 0.004
    assert log == ["idle", "event", "call", "call", "event", "idle"]


def test_quartiles():
    assert spread([5, 1, 2, 4, 3]) == Spread(3, 2, 4, 5)
    assert spread([1, 2]) == Spread(1.5, 1.25, 1.75, 2)
    assert spread([7]) == Spread(7, 7, 7, 1)
    with pytest.raises(ValueError, match="nothing was measured"):
        spread([])


def test_the_ratio_is_that_within_a_round():
    assert ratios([2, 40], [1, 10, 100]) == [2, 4]
    row = Row({}, "B", [2.0, 40.0, 6.0], "A", [1.0, 10.0, 2.0])
    assert row.ratio == Spread(3, 2.5, 3.5, 3)  # the ratio of the medians would be 6 / 2 as well, of the means 3.7
    assert Row({}, "A", [1.0]).ratio is None


def test_targets():
    bound = targets.quantize_target("exact", "cpu", "float32", 1)
    assert bound is not None
    assert (bound.met(2.5), bound.met(2.51)) == (True, False)
    bandwidth = targets.bandwidth_target()
    assert bandwidth is not None
    assert bandwidth.met(0.71)
    assert not bandwidth.met(0.69)
    assert targets.quantize_target("exact", "cpu", "float32", 2) is None
    assert targets.quantize_target("exact, in place", "cpu", "float32", 1) is None
    common = {"dtype": "bfloat16", "threads": 2, "storage": "grid"}
    smollm2 = {"model": "smollm2", "device": "cpu", "batch": 16, **common}
    llama = {"model": "llama-1b-random", "device": "cuda", "batch": 32, **common}
    for recipe, dtype, limit in [("ex1", "bfloat16", 1.08), ("ex2", "bfloat16", 1.12), ("ex2", "float32", 1.08)]:
        found = targets.model_target("forward", recipe, **{**smollm2, "dtype": dtype})
        assert found == targets.Target("ratio", limit)
    assert targets.model_target("forward", "ex2", **llama) == targets.Target("ratio", 1.15)
    assert targets.model_target("forward", "ex1", **{**smollm2, "threads": 1}) is None
    assert targets.model_target("forward", "kv_only", **smollm2) is None
    packed = {**smollm2, "dtype": "float32", "storage": "packed"}
    assert targets.model_target("forward", "ex2", **packed) == targets.Target("ratio", 0.85)
    generation = {**smollm2, "tokens": 64}
    assert targets.model_target("generate", "ex2", **generation) == targets.Target("ratio", 1.15)
    assert targets.seconds_target("import") == targets.Target("seconds", 0.2)


def test_a_wheel_has_no_targets(monkeypatch, tmp_path):
    monkeypatch.setattr(targets.shipped, "PACKAGE", tmp_path / "mxlab")
    targets._targets.cache_clear()
    assert targets.quantize_target("exact", "cpu", "float32", 1) is None
    targets._targets.cache_clear()


def test_results_of_another_instruction_set_are_not_replaced(tmp_path):
    here = document("quantize")
    there = {**here, "instruction set": "kernels avx2, torch AVX2, bfloat16 units no"}
    results.write(here, tmp_path, "quantize")
    with pytest.raises(SourceError, match=r"quantize\.json was measured with .*kernels avx2.*do not compare"):
        results.write(there, tmp_path, "quantize")
    assert results.write(here, tmp_path, "quantize")[1]


def test_figures_of_instruction_sets_stand_apart():
    here = document("quantize")
    there = {**here, "instruction set": "kernels avx2, torch AVX2, bfloat16 units no"}
    page = tables.markdown({"a": here, "b": there, "c": here})
    parts = [line for line in page.splitlines() if line.startswith("# ")]
    assert len(parts) == 3  # the title, and one part for each
    assert page.index("`c.json`") < page.index("`b.json`")


def test_slow_dtypes_come_last_and_are_measured_less(monkeypatch):
    monkeypatch.setattr(workload, "is_native", lambda dtype, device: dtype == torch.float32)
    chosen = suite.BENCHMARKS["linear"].of("cpu", repeats=7)
    assert chosen.in_order(("bfloat16", "float32")) == ["float32", "bfloat16"]
    assert (chosen.effort_in("float32").repeats, chosen.effort_in("bfloat16").repeats) == (7, 3)


# ---- each benchmark


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(results, "busy_cores", lambda: 0.0)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    logger = logging.getLogger("lm_eval")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def no_mx(monkeypatch):
    monkeypatch.setattr(mxpackage, "is_there", lambda: False)


def performed(name: str, **given) -> dict:
    chosen = suite.BENCHMARKS[name].of("cpu", **{**QUICK, **given})
    assert len(list(chosen.cases())) == len(chosen)
    document = suite.perform(name, chosen, f"mxlab bench {name}")
    assert json.loads(json.dumps(document)) is not None
    return document


def contenders(document: dict) -> list[str]:
    return [row["contender"] for row in document["rows"]]


@pytest.mark.usefixtures("no_mx")
def test_quantize():
    given = {"shapes": ["3x64"], "dtypes": ["bfloat16"], "formats": ["int8", "fp4_e2m1@16"], "values": "random"}
    document = performed("quantize", blocks=[32], **given)
    names = ["clone", "exact", "microxcaling", "exact, in place", "microxcaling, in place"]
    assert contenders(document) == names * 2
    assert [row["case"]["format"] for row in document["rows"]] == ["int8@32"] * 5 + ["fp4_e2m1@16"] * 5
    clone, exact = document["rows"][:2]
    assert clone["reference"] is clone["ratio"] is clone["target"] is None
    assert exact["reference"] == "clone"
    assert len(exact["samples"]) == exact["ratio"]["n"] == 2
    assert exact["case"]["values"] == "normal random numbers"
    assert exact["figures"]["ns/element"] == pytest.approx(exact["seconds"]["median"] / 192 * 1e9, rel=1e-4)
    assert exact["figures"]["GB/s"] == pytest.approx(192 * 2 * 2 / exact["seconds"]["median"] / 1e9, rel=1e-4)
    assert exact["target"]["limit"] == 2.5
    assert exact["target"]["value"] == exact["ratio"]["median"]
    assert document["machine"]["threads"] == document["settings"]["threads"] == 1
    assert document["standard"] is False
    assert document["failures"] == []


def test_quantize_activations():
    row = performed("quantize", shapes=["8x576"], dtypes=["float32"], blocks=[32], numerics=["exact"])["rows"][1]
    assert row["case"]["values"] == "input of SmolLM2's q_proj"


@pytest.mark.usefixtures("no_mx")
def test_the_share_of_the_copy_bandwidth():
    given = {"shapes": ["2x32"], "dtypes": ["float32"], "blocks": [32], "values": "random", "numerics": ["exact"]}
    *_, copy, exact = performed("quantize", copy_gib=2**-14, **given)["rows"]
    assert (copy["contender"], copy["case"]["shape"]) == ("copy", "4x4096")
    assert exact["target"]["figure"] == "fraction of copy"
    assert exact["figures"]["fraction of copy"] == pytest.approx(1 / exact["ratio"]["median"], rel=1e-4)


@pytest.mark.usefixtures("no_mx")
def test_linear():
    document = performed("linear", shapes=["64x32"], tokens=[1, 3], dtypes=["float32"], recipe="ex2")
    assert contenders(document) == ["unquantized", "exact", "microxcaling", "packed"] * 2
    assert [row["case"]["tokens"] for row in document["rows"]] == [1] * 4 + [3] * 4


def test_a_linear_layer_quantizes_at_every_call(monkeypatch):
    """Else the benchmark would time nothing."""
    from mxlab.bench import linear
    from mxlab.model.nn.operands import LinearOperands

    count = []
    on_activation = LinearOperands.on_activation
    monkeypatch.setattr(LinearOperands, "on_activation", lambda *a: count.append(1) or on_activation(*a))
    layer, x = linear._quantized(torch.nn.Linear(64, 32).eval(), "ex1", "exact"), torch.ones(1, 64)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    assert len(count) == 3


@pytest.mark.usefixtures("no_mx")
def test_forward():
    document = performed("forward", model="random-tiny", batch=2, tokens=8, dtypes=["float32"])
    assert contenders(document) == ["unquantized", *["exact", "microxcaling"] * 2, "packed", "packed"] * 2
    assert [row["case"]["attention"] for row in document["rows"]] == ["eager"] * 7 + ["sdpa"] * 7
    assert [row["case"]["recipe"] for row in document["rows"]] == [
        "baseline", "ex1", "ex1", "ex2", "ex2", "ex1", "ex2"
    ] * 2  # fmt: skip
    first = document["rows"][0]
    assert (first["case"]["rows"], first["case"]["tokens"]) == ("random tokens", 16)
    assert first["figures"]["tokens/s"] == pytest.approx(16 / first["seconds"]["median"], rel=1e-4)
    assert document["settings"]["rows"] == "random tokens"


@pytest.mark.usefixtures("no_mx")
def test_forward_over_text(tiny_llama, tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "lambada_openai.jsonl").write_text('{"text": "Bread and butter"}\n{"text": "Well"}\n\n{"text": "x"}\n')
    given = {"model": str(tiny_llama), "batch": 2, "dtypes": ["float32"], "attentions": ["sdpa"], "recipes": ["ex1"]}
    [first, *_] = performed("forward", data_dir=tmp_path, **given)["rows"]
    assert first["case"]["rows"] == "lambada_openai"
    longest = len(AutoTokenizer.from_pretrained(tiny_llama)("Bread and butter")["input_ids"])
    assert first["case"]["tokens"] == 2 * longest  # "Well" is padded
    with pytest.raises(SourceError, match="3 rows, and the batch 4: choose a smaller one"):
        performed("forward", data_dir=tmp_path, **{**given, "batch": 4})
    [passages, *_] = performed("forward", tokens=4, **given)["rows"]
    assert passages["case"]["rows"] == "mxlab_passages"


def test_decode():
    document = performed("decode", model="random-tiny", context=300, dtypes=("float32",))
    rows = {row["contender"]: row for row in document["rows"]}
    assert list(rows) == ["unquantized", "grid", "packed"]
    # Keys and values of two layers, two heads of 16 elements: four bytes each, or blocks of 4 bits and a scale.
    assert (
        rows["unquantized"]["figures"]["MB of K and V"]
        == rows["grid"]["figures"]["MB of K and V"]
        == 300 * 2 * 2 * 2 * 16 * 4 / 1e6
    )
    assert rows["packed"]["figures"]["MB of K and V"] == 300 * 2 * 2 * 2 * (8 + 1) / 1e6


def test_llama_cpp():
    document = performed("llama.cpp", model="random-tiny", prompt=20, tokens=3)
    assert contenders(document) == ["unquantized", "packed"] * 2
    assert [row["case"]["tokens"] for row in document["rows"][::2]] == ["20, at once", "3, one by one"]
    assert all(row["figures"]["tokens/s"] > 0 for row in document["rows"])


def test_generate():
    document = performed("generate", model="random-tiny", tokens=3)
    assert contenders(document) == ["unquantized", "exact", "packed"]
    row = document["rows"][1]
    assert row["figures"]["ms/token"] == pytest.approx(row["seconds"]["median"] * 1000 / 3, rel=1e-4)


def test_lm_eval(tiny_llama):
    document = performed("lm-eval", model=str(tiny_llama), limit=2, batch=2, dtype="float32", recipes=["ex2"], warmup=0)
    assert contenders(document) == ["baseline", "ex2"] * 2
    assert [row["case"]["timed"] for row in document["rows"]] == ["whole run"] * 2 + ["forward passes"] * 2
    assert all(row["figures"]["examples/s"] > 0 for row in document["rows"])


def test_memory(tiny_llama):
    given = {"model": str(tiny_llama), "limit": 2, "dtype": "float32", "recipes": ["ex2"], "repeats": 1, "warmup": 0}
    first, second = performed("memory", **given)["rows"]
    assert [first["contender"], second["contender"]] == ["baseline", "ex2"]
    assert first["figures"]["of the baseline's"] == 1
    ratio = second["figures"]["peak MiB"] / first["figures"]["peak MiB"]
    assert second["figures"]["of the baseline's"] == pytest.approx(ratio, rel=1e-4)
    assert 100 < first["figures"]["peak MiB"] < 10_000  # torch alone takes more than the one


def test_an_evaluation_that_dies_is_told(monkeypatch, tiny_llama):
    from mxlab.bench import evaluation

    monkeypatch.setattr(evaluation, "_ALONE", "raise SystemExit('no room')")
    with pytest.raises(MxlabError, match=r"under baseline ended with 1:\nno room"):
        performed("memory", model=str(tiny_llama), dtype="float32")


def test_files_of_earlier_versions_are_read(tmp_path):
    former = document()
    former["rows"] = [
        {"twin" if key == "contender" else key: value for key, value in row.items()} for row in former["rows"]
    ]
    results.write(former, tmp_path, "quantize")
    assert read(tmp_path)["quantize"]["rows"] == document()["rows"]


def test_convert_and_import():
    document = performed("convert", model="random-tiny", dtypes=["float32"])
    assert contenders(document) == ["mxlab.apply"]
    assert len(document["rows"][0]["samples"]) == 2
    document = performed("import")
    assert document["rows"][0]["target"]["limit"] == 0.2


# ---- microxcaling, which is not here: a stand-in


@pytest.fixture
def fake_mx(tmp_path, monkeypatch):
    """A package ``mx`` with what the benchmarks call; its files can be replaced by a test."""
    folder = tmp_path / "site" / "mx"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(
        "import torch\n"
        "class Linear(torch.nn.Linear):\n"
        "    def __init__(self, i, o, bias=True, mx_specs=None):\n"
        "        assert mx_specs['w_elem_format'] == 'fp4_e2m1' and mx_specs['bfloat'] == 16\n"
        "        assert mx_specs['custom_cuda'] is False\n"
        "        super().__init__(i, o, bias)\n"
    )
    (folder / "specs.py").write_text("def finalize_mx_specs(specs): return dict(specs, final=True)\n")
    (folder / "mx_ops.py").write_text(
        "def quantize_mx_op(A, mx_specs, elem_format=None, axes=None, round='nearest'):\n"
        "    assert mx_specs['final'] and elem_format == 'fp6_e2m3' and axes == [-1]\n"
        "    return A.clone()\n"
    )
    monkeypatch.syspath_prepend(folder.parent)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "mx"]:
        del sys.modules[name]


QUANTIZE = {"shapes": ["2x64"], "dtypes": ["float32"], "blocks": [32], "values": "random"}


@pytest.mark.usefixtures("fake_mx")
def test_microxcaling_is_timed_where_it_is():
    assert mxpackage.is_there()
    assert contenders(performed("quantize", **QUANTIZE))[-1] == "mx package"
    assert contenders(performed("linear", shapes=["64x32"], tokens=[2], dtypes=["float32"]))[-1] == "mx package"
    document = performed("forward", model="random-tiny", batch=1, tokens=4, dtypes=["float32"], attentions=["sdpa"])
    others = [row["case"]["recipe"] for row in document["rows"] if row["contender"] == "mx package"]
    assert others == ["ex1"]  # it has no quantized K and V
    assert document["failures"] == []


def test_a_microxcaling_that_fails_breaks_nothing(fake_mx):
    (fake_mx / "mx_ops.py").write_text("raise OSError('compiled for another torch')\n")
    document = performed("quantize", **QUANTIZE)
    assert "mx package" not in contenders(document)
    assert document["failures"] == [
        "mx package, quantize 2x64 float32 fp6_e2m3@32: OSError: compiled for another torch"
    ]
    assert "compiled for another torch" in tables.markdown({"x": document})


@pytest.mark.parametrize("origin", [None, str(Path(cli.__file__).parent / "mx.py")])
def test_another_mx_is_not_taken_for_it(monkeypatch, origin):
    spec = origin and type("Spec", (), {"origin": origin})
    monkeypatch.setattr(mxpackage.importlib.util, "find_spec", lambda _: spec)
    assert not mxpackage.is_there()


# ---- what is refused


def test_shapes_and_formats():
    assert parse_shape("2048x576") == (2048, 576)
    assert parse_shape("7") == (7,)
    found = expand_formats(("fp6_e2m3", "int8@16", "fp4_e2m1,rounding=even"), (32, 64))
    assert list(map(str, found)) == [
        "fp6_e2m3@32",
        "fp6_e2m3@64",
        "int8@16",
        "fp4_e2m1@32,rounding=even",
        "fp4_e2m1@64,rounding=even",
    ]


@pytest.mark.parametrize("text", ["", "2048", "0x3", "2048X576", "2048x", "-1x4", "a x b"])
def test_no_shape(text):
    if text != "2048":
        with pytest.raises(SpecError, match="write the lengths of its axes"):
            parse_shape(text)
    with pytest.raises(SpecError, match=r"like 2048x576|in x out"):
        suite.BENCHMARKS["linear"].of("cpu", shapes=[text])


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("quantize", {"repeats": 0}, "repeats is 0: it must be a whole number, 1 or more"),
        ("quantize", {"threads": 0}, "threads is 0"),
        ("quantize", {"dtypes": ["float23"]}, "dtype is 'float23'.*did you mean 'float32'"),
        ("quantize", {"formats": ["fp7"]}, "fp7"),
        ("quantize", {"numerics": ["exakt"]}, "did you mean 'exact'"),
        ("quantize", {"values": "zeros"}, "values is 'zeros'"),
        ("quantize", {"copy_gib": -1.0}, "copy_gib is -1"),
        ("linear", {"recipe": "ex9"}, "no recipe 'ex9'"),
        ("linear", {"recipe": "kv_only"}, "recipe kv_only quantizes no linear layer"),
        ("linear", {"tokens": [0]}, "tokens is 0"),
        ("forward", {"recipes": ["ex1", "ex9"]}, "no recipe 'ex9'"),
        ("forward", {"attentions": ["flash"]}, "attention is 'flash'"),
        ("forward", {"data_dir": Path("/nowhere")}, "/nowhere/lambada_openai.jsonl is missing"),
        ("generate", {"tokens": 0}, "tokens is 0"),
        ("decode", {"context": 0}, "context is 0"),
        ("llama.cpp", {"prompt": 0}, "prompt is 0"),
        ("lm-eval", {"limit": 0}, "limit is 0"),
        ("convert", {"recipes": ["ex9"]}, "no recipe 'ex9'"),
    ],
)
def test_bad_settings(name, given, message):
    with pytest.raises(MxlabError, match=message):
        suite.BENCHMARKS[name].of("cpu", **given)


def test_rows_that_are_no_json(tmp_path):
    (tmp_path / "lambada_openai.jsonl").write_text("Bread\n")
    with pytest.raises(SourceError, match="it must hold lines of"):
        performed("forward", model="smollm2", batch=1, dtypes=["float32"], data_dir=tmp_path)


# ---- files


def document(name: str = "quantize", **changes) -> dict:
    """A small document of either benchmark that is drawn."""
    reference = [1.0, 1.1, 1.2]
    rows = [Row({"shape": "8x32"}, "clone", reference, figures={"ns/element": 0.5})]
    for dtype in ("float32", "bfloat16"):
        case = {"shape": "8x32", "dtype": dtype, "format": "fp6_e2m3@32", "attention": "sdpa", "recipe": "ex1"}
        for contender, factor in (("exact", 1.5), ("microxcaling", 6.0), ("mx package", 20.0)):
            samples = [factor * s for s in reference]
            target = targets.quantize_target(contender, "cpu", dtype, 1)
            rows.append(Row(case, contender, samples, "clone", reference, {"ns/element": factor / 2}, target))
    return {
        "benchmark": name,
        "standard": True,
        "command": f"mxlab bench {name}",
        "measured on": "Some(R) CPU, 2 cores",
        "machine": {"date": "2026-11-21T10:00:00", "torch": "2.13.0", "CPU kernels": "avx2"},
        "load": {"average": [0.1], "busy cores before": 0.0, "busy cores after": 1.0},
        "settings": {"threads": 1, "repeats": 3, "device": "cpu"},
        "failures": [],
        "rows": [row.to_dict() for row in rows],
        **changes,
    }


def test_file_names_say_the_machine_and_other_settings():
    assert suite.file_name(document()) == "quantize-some-cpu-2-cores-avx2"
    others = [document(standard=False, settings={"repeats": n, "device": "cpu"}) for n in (3, 4)]
    names = {suite.file_name(one) for one in others}
    assert len(names) == 2
    assert all(len(name) == len("quantize-some-cpu-2-cores-avx2-123456") for name in names)
    gpu = {"cpu": "Some CPU", "GPU 0": "NVIDIA H200", "GPU 1": "Tesla T4"}
    assert [results.name(gpu, device) for device in ("cpu", "cuda", "cuda:1")] == [
        "Some CPU",
        "NVIDIA H200",
        "Tesla T4",
    ]


def test_the_standard_settings_are_those_of_the_device(monkeypatch, tmp_path):
    (tmp_path / "lambada_openai.jsonl").write_text('{"text": "x"}\n')
    forward = suite.BENCHMARKS["forward"]
    settings = forward.of("cpu", data_dir=tmp_path)
    assert settings.to_dict() == settings.standard()
    assert str(tmp_path) not in json.dumps(settings.to_dict())  # where the data lies is nobody's affair
    settings = forward.of("cpu")  # the passages are not what the targets were set for
    assert settings.to_dict() != settings.standard()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    settings = forward.of("cuda")
    assert settings.to_dict() == settings.standard()
    assert (settings.model, settings.batch, settings.tokens) == ("llama-1b-random", 32, 128)


def test_files_are_read_back(tmp_path):
    path, replaced = write(document(), tmp_path / "new", "a")
    assert not replaced
    assert json.loads(path.read_text()) == document()
    assert write(document(), tmp_path / "new", "a") == (path, True)
    (tmp_path / "new" / "memory.json").write_text('{"environment": {}}')
    assert read(tmp_path / "new") == {"a": document()}


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(SourceError, match="no benchmark results in"):
        read(tmp_path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(SourceError, match=r"a\.json"):
        read(tmp_path)
    with pytest.raises(SourceError, match="choose another folder"):
        write(document(), tmp_path / "a.json", "x")
    only = {"x": document("linear")}
    with pytest.raises(SourceError, match="to draw"):
        figures.draw(only, tmp_path / "figs")


def test_failures_are_told_once():
    measured = Measurement()
    measured.add(Measurement(failures=["x"]))
    measured.add(Measurement(failures=["x", "y"]))
    assert measured.failures == ["x", "y"]


def test_grid():
    found = grid(document())
    case = ["dtype", "format", "attention", "recipe"]
    assert found.heads == [*case, "contender", "time (quartiles)", "ns/element", "ratio (quartiles)", "target"]
    assert found.common == "shape 8x32"
    assert found.rows[1][-5:] == ["exact", "1.65 s (1.57–1.73 s)", "0.75", "1.500 (1.500–1.500)", "≤ 2.5, met"]
    assert found.rows[2][-2:] == ["6.00 (6.00–6.00)", "≤ 5, missed"]
    assert found.marks[:4] == [None, True, False, None]


def test_tables():
    text = tables.markdown({"quantize-some": document(failures=["mx package: |x|"])})
    assert "## quantize, Some(R) CPU, 2 cores" in text
    assert "`quantize-some.json` on 2026-11-21" in text
    assert "other processes used 0.0 cores before and 1.0 after" in text
    assert r"Not measured: mx package: \|x\|" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 7
    assert len({line.count("|") for line in lines}) == 1


def test_figures(tmp_path):
    every = {"a": document(), "b": document("forward"), "c": document("linear")}
    paths = figures.draw(every, tmp_path)
    assert [path.name for path in paths] == ["bench_quantize.png", "bench_forward.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_a_figure_shows_ratios_and_targets():
    chart = figures.CHARTS[0]
    figure = figures.plot(chart, [document(), document()])
    [first, _] = figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == [
        "8×32, fp32, fp6_e2m3@32",
        "8×32, bf16, fp6_e2m3@32",
    ]
    drawn = {round(float(line.get_xdata()[0]), 6) for line in first.lines if line.get_marker() in ("o", "s", "D")}
    assert drawn == {1.5, 6, 20}
    limits = {segment[0][0] for collection in first.collections for segment in collection.get_segments()}
    assert {2.5, 5.0} <= limits
    assert first.get_xscale() == "log"


def test_only_standard_settings_are_drawn_where_there_are_any():
    every = {"a": document(), "b": document(standard=False)}
    assert figures._chosen("quantize", every) == [every["a"]]
    assert figures._chosen("quantize", {"b": every["b"]}) == [every["b"]]


# ---- the command


@pytest.mark.usefixtures("no_mx")
def test_command(mxlab, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "busy_cores", lambda: 1.5)
    arguments = ["--shape", "2x33", "--block", 32, "--values", "random", "--repeats", 1, "--out", tmp_path / "results"]
    code, out, _ = mxlab("bench", "quantize", *arguments)
    assert code == 0
    assert "≤ 2.5, m" in out
    assert "not quiet: other processes used 1.5 cores" in out
    [file] = (tmp_path / "results").iterdir()
    assert f"written: {file}" in out
    found = json.loads(file.read_text())
    assert found["command"].startswith("mxlab bench quantize --shape 2x33")
    code, out, _ = mxlab("bench", "quantize", *arguments)
    assert f"replaced: {file}" in out
    code, out, _ = mxlab("bench", "plot", "--results", tmp_path / "results", "--out", tmp_path / "figs")
    assert (code, [p.name for p in (tmp_path / "figs").iterdir()]) == (0, ["bench_quantize.png"])
    code, out, _ = mxlab("bench", "tables", "--results", tmp_path / "results")
    assert out.startswith("# Benchmarks")
    assert mxlab("bench", "tables", "--results", tmp_path / "results", "--out", tmp_path / "docs" / "bench.md")[0] == 0
    assert (tmp_path / "docs" / "bench.md").read_text() == out.removesuffix("\n")


def test_the_command_does_not_tell_where_data_lies(monkeypatch):
    from mxlab.cli import bench as command

    monkeypatch.setattr(sys, "argv", ["/usr/bin/mxlab", "bench", "--data-dir", "/home/me/my data", "-o", "x y"])
    assert command._command() == "mxlab bench --data-dir DATA -o 'x y'"


@pytest.mark.parametrize("arguments", [[], ["all"], ["--out", "x", "--device", "cpu"]])
def test_without_a_name_all_are_run(mxlab, monkeypatch, arguments):
    from mxlab.cli import bench as command

    ran = []
    monkeypatch.setattr(command, "_run", lambda name, **given: ran.append((name, given)))
    assert mxlab("bench", *arguments)[0] == 0
    assert [name for name, _ in ran] == list(suite.BENCHMARKS)
    assert [name for name, given in ran if "data_dir" in given] == [
        "forward",
        "generate",
        "decode",
        "llama.cpp",
        "lm-eval",
        "memory",
    ]


def test_errors_are_told_in_a_line(mxlab, tmp_path):
    for arguments, message in [
        (["quantize", "--shape", "2048*576"], "write the lengths of its axes, 1 or more, like 2048x576"),
        (["forward", "--recipe", "ex3"], "no recipe 'ex3'"),
        (["forward", "--data-dir", tmp_path], "lambada_openai.jsonl is missing"),
        (["linear", "--repeats", 0], "repeats is 0"),
        (["plot", "--results", tmp_path], "no benchmark results in"),
    ]:
        code, _, err = mxlab("bench", *arguments)
        assert code == 2
        assert message in " ".join(err.split())
        assert "Traceback" not in err


def test_what_cannot_be_written_or_read_is_named(tmp_path):
    from mxlab.bench.results import make_folder, read

    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SourceError, match="--out"):
        make_folder(file)
    with pytest.raises(SourceError, match="no folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "forward.json").write_text('{"benchmark": "forward", "rows": [], "machine": {}}')
    with pytest.raises(SourceError, match=r"forward.json lacks measured on"):
        read(tmp_path)


@pytest.mark.parametrize(("limit", "rounds"), [(0.0, (3, 3)), (0.12, (3, 4)), (60.0, (9, 9))])
def test_no_round_begins_after_the_time_limit(limit, rounds):
    clock = FakeClock()

    def slow() -> None:
        time.sleep(0.05)
        clock.calls.append("A")

    [series] = alternate([Contender("A", slow)], Effort(repeats=9, warmup=0, time_limit=limit), clock)
    assert rounds[0] <= len(series.samples) <= rounds[1]
