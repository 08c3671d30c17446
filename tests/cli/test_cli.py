"""The mxlab command: exit codes, and one-line messages instead of tracebacks."""

import functools
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from mxlab import __version__, rundir
from mxlab.cli import console
from mxlab.cli import main as cli
from mxlab.cli.help import EXAMPLES
from mxlab.progress import Steps
from mxlab.recipe import load_recipe

from support.paths import ROOT

pytestmark = pytest.mark.usefixtures("restored")

QUICK = ["--dtype", "float32", "--batch-size", "2", "--device", "cpu", "--limit", "2"]


def only(folder: Path) -> Path:
    [found] = folder.iterdir()
    return found


# ---- eval


def test_eval(mxlab, tiny_llama, tmp_path):
    arguments = ["eval", "--model", tiny_llama, *QUICK, "--recipe", "ex2", "--set", "block_size=16"]
    code, out, _ = mxlab(*arguments, "--set", "custom_cuda=false", "--out", tmp_path)
    assert code == 0
    folder = only(tmp_path / "ex2")
    assert folder.name.endswith("_bs16_sb8_ccfalse")
    assert f"written: {folder}" in out
    assert "perplexity" in out
    found = load_recipe(folder / "recipe.toml")
    assert ({fmt.block_size for fmt in found.formats}, found.numerics) == ({16}, "microxcaling")
    command = (folder / "command.txt").read_text(encoding="utf-8")
    assert command.startswith("mxlab eval --model ")
    assert "--set block_size=16 --set custom_cuda=false" in command


def test_eval_of_a_file_under_its_own_name(mxlab, tiny_llama, tmp_path):
    file = tmp_path / "file.toml"
    file.write_text('name = "mine"\n[[rules]]\nmodules = ".*_proj"\nweight = "int8@8"\n', encoding="utf-8")
    assert mxlab("eval", "--model", tiny_llama, *QUICK, "--recipe", file, "-o", tmp_path / "out")[0] == 0
    assert only(tmp_path / "out" / "mine").name.endswith("_bs8_sb8_cctrue")


def test_eval_of_a_text(mxlab, tiny_llama, tmp_path):
    arguments = ["--model", tiny_llama, "--dtype", "float32", "--device", "cpu", "--text", "passages"]
    windows = ["--window", 64, "--stride", 32, "--windows", 3, "--batch-size", 2, "--compare"]
    code, out, _ = mxlab("eval", *arguments, *windows, "--recipe", "ex1", "--out", tmp_path)
    assert code == 0
    for name in ("passages", "perplexity", "kl_divergence", "top1_agreement"):
        assert name in out
    [metrics] = only(tmp_path / "ex1").glob("metrics_*.json")
    config = json.loads(metrics.read_text(encoding="utf-8"))["config"]
    assert [config[key] for key in ("window", "stride", "windows", "batch_size", "compare")] == [64, 32, 3, 2, True]


def test_eval_of_a_mase_file(mxlab, tiny_llama, tmp_path, caplog):
    file = tmp_path / "mine.toml"
    keys = "weight_block_size = 16\nweight_width = 4\nbias_block_size = 16\nbias_width = 4\n"
    file.write_text(f"by = 'regex_name'\n['model.*_proj']\nname = 'mxint'\n{keys}", encoding="utf-8")
    assert mxlab("eval", "--model", tiny_llama, *QUICK, "--recipe", file, "-o", tmp_path / "out")[0] == 0
    assert any("bias_... is for the layers that have a bias" in message for message in caplog.messages)
    [rule] = load_recipe(only(tmp_path / "out" / "mine") / "recipe.toml").rules
    assert str(rule.weight) == "int4@16,scale_rule=mase_int,rounding=even"


def test_specs_of_the_environment_are_used(mxlab, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("MX_SPECS_JSON", '{"block_size": 8, "kv_elem_format": "int8"}')
    assert mxlab("eval", "--model", tiny_llama, *QUICK, "--out", tmp_path)[0] == 0
    folder = only(tmp_path / "mx_specs")
    assert [str(fmt) for fmt in load_recipe(folder / "recipe.toml").formats] == [
        "fp4_e2m1@8",
        "fp6_e2m3@8",
        "int8@8",
        "int8@8",
    ]
    assert json.loads((folder / "inventory.json").read_text(encoding="utf-8"))["linear_layers"] == 14


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--limit", "0"], ["limit is 0.0"]),
        (["--limit", "1.5"], ["limit is 1.5", "whole number of rows, or a fraction"]),
        (["--limit", "-1"], ["limit is -1.0"]),
        (["--limit", "nan"], ["limit is nan"]),
        (["--limit", "inf"], ["limit is inf"]),
        (["--limit", "some"], ["--limit"]),
        (["--batch-size", "0"], ["batch_size is 0"]),
        (["--batch-size", "auto"], ["--batch-size"]),
        (["--max-length", "1"], ["max_length is 1"]),
        (["--dtype", "float64"], ["--dtype", "float64"]),
        (["--device", "gpu"], ["device is 'gpu'"]),
        (["--device", "meta"], ["device is 'meta'"]),
        (["--tasks", ","], ["tasks is ()"]),
        (["--text", "passages", "--tasks", "wikitext"], ["tasks is given, which is not for a text"]),
        (["--text", "passages", "--limit", "4"], ["limit is given, which is not for a text"]),
        (["--windows", "4"], ["windows is given, which needs a text to score"]),
        (["--compare"], ["compare is given, which needs a text to score"]),
        (["--text", "passages", "--window", "1"], ["window is 1"]),
        (["--text", "passages", "--stride", "0"], ["stride is 0"]),
        (["--text", "nothing"], ["no text 'nothing': give wikitext2"]),
        (["--text", "pile"], ["cannot load the text pile", "--text FILE reads a file"]),
        (["--model", ""], ["model is ''"]),
        (["--model", "/no/such"], ["no model folder /no/such"]),
        (["--model", "no-such/model"], ["cannot load 'no-such/model' from the Hugging Face hub", "--model smollm2"]),
        (["--tasks", "wikitext"], ["cannot load the data of wikitext", "--data-dir"]),
        (["--tasks", "wikitext", "--data-dir", "/nowhere"], ["/nowhere/wikitext2_test.raw is missing"]),
        (["--recipe", "ex3"], ["no recipe 'ex3'", "baseline, ex1, ex2"]),
        (["--recipe", "pyproject.toml"], ["pyproject.toml: unknown key"]),
        (["--set", "block_size"], ["cannot read 'block_size'"]),
        (["--set", "blok_size=16"], ["unknown option 'blok_size'", "did you mean 'block_size'"]),
        (["--set", "block_size=x"], ["block_size is 'x'"]),
        (["--set", "w_elem_format=[1]"], ["w_elem_format", "[1] is not the name"]),
        (["--no-such-option"], ["--no-such-option"]),
    ],
)
def test_bad_input(arguments, parts, mxlab, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, _, err = mxlab("eval", *arguments, "--out", tmp_path / "out")
    assert code == 2
    assert "Traceback" not in err
    for part in parts:
        assert part in err
    assert not list((tmp_path / "out").rglob("*.*"))


@pytest.mark.parametrize(
    ("specs", "arguments", "parts"),
    [
        ("{}", ["eval", "--recipe", "ex1"], ["MX_SPECS_JSON is set and --recipe ex1 is given", "quantize twice"]),
        ("{}", ["eval", "--recipe", "baseline"], ["quantize twice"]),
        ("", ["eval"], ["MX_SPECS_JSON is not valid JSON", "line 1, column 1"]),
        ('{"block_size": }', ["eval"], ["line 1, column 16 (character 15)"]),
        ('{"scale_bit": 8}', ["eval"], ["did you mean 'scale_bits'"]),
        ("{}", ["sweep", "ex1"], ["MX_SPECS_JSON is set: mxlab sweep has recipes of its own; unset it"]),
        ("{}", ["demo"], ["MX_SPECS_JSON is set: mxlab demo"]),
        ("{", ["run", "true"], ["MX_SPECS_JSON is not valid JSON"]),
    ],
)
def test_specs_that_do_not_fit(specs, arguments, parts, mxlab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MX_SPECS_JSON", specs)
    code, _, err = mxlab(*arguments)
    assert code == 2
    for part in parts:
        assert part in err
    assert list(tmp_path.iterdir()) == []


def test_out_is_a_file(mxlab, tiny_llama, tmp_path):
    (tmp_path / "out").touch()
    for arguments in (["eval"], ["sweep", "baseline", "--tasks", "mxlab_passages"]):
        code, _, err = mxlab(*arguments, "--model", tiny_llama, *QUICK, "--out", tmp_path / "out")
        assert code == 2
        assert "cannot write to" in err
        assert "Traceback" not in err


def test_progress_off_a_terminal(mxlab, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(console, "LineReporter", functools.partial(console.LineReporter, interval=0.01))
    code, _, err = mxlab("eval", "--model", tiny_llama, *QUICK, "--recipe", "ex1", "--out", tmp_path)
    assert code == 0
    lines = err.splitlines()
    begun = [line for line in lines if line.endswith(" ...")]
    assert begun[0] == "loading libraries ..."
    assert "loading tasks ..." in begun
    assert any(re.match(r"quantizing weights \(\d+\) \.\.\.", line) for line in begun)
    assert any(re.match(r"rows: \d of 2, 0:\d\d passed", line) for line in lines)


def test_progress_on_a_terminal(monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(console, "stderr", screen)
    with console.progress(), Steps("a sweep", 2) as outer:
        outer.advance()
        with Steps("rows", 4) as rows:
            rows.advance(3)
            time.sleep(0.3)  # bars are drawn ten times a second
    drawn = screen.file.getvalue()
    for part in ("a sweep", "1/2", "rows", "3/4"):
        assert part in drawn


def test_refused_runs_leave_no_folder(mxlab, tiny_llama, tmp_path):
    file = tmp_path / "none.toml"
    file.write_text('name = "none"\n[[rules]]\nmodules = "nothing"\nweight = "int8@8"\n', encoding="utf-8")
    for arguments in (["--model", "/no/such"], ["--model", tiny_llama, "--recipe", file]):
        assert mxlab("eval", *arguments, *QUICK, "--out", tmp_path / "out")[0] == 2
        assert not (tmp_path / "out").exists()


# ---- sweep and report


def test_sweep_report_and_resume(mxlab, tiny_llama, tmp_path):
    file = tmp_path / "sweep.toml"
    text = (
        'stage = "ex1"\nrecipe = "ex1"\nmodel = "/no/such"\n[grid]\nblock_size = [8, 16]\ncustom_cuda = [true, false]\n'
    )
    file.write_text(text, encoding="utf-8")
    out = tmp_path / "results"
    arguments = ["sweep", file, "--tasks", "mxlab_passages", *QUICK, "--out", out]
    code, printed, err = mxlab(*arguments)
    assert (code, "0 runs made, 0 found finished, 4 failed" in printed) == (1, True)
    assert f"see {out / 'ex1' / rundir.FAILURES}" in err
    assert sum("failed: SourceError" in line or "failed: no model" in line for line in printed.splitlines()) == 4
    assert "no model folder /no/such" in err
    assert len((out / "ex1" / rundir.FAILURES).read_text(encoding="utf-8").splitlines()) == 4

    code, printed, _ = mxlab(*arguments, "--model", tiny_llama)
    assert (code, "4 runs made, 0 found finished, 0 failed" in printed) == (0, True)
    head, *rows = [line.split() for line in printed.splitlines() if " acc" in line or "finished" in line.split()[-1:]]
    assert head[:3] == ["stage", "block_size", "custom_cuda"]
    assert [row[:3] for row in rows] == [["ex1", size, cuda] for size in ("8", "16") for cuda in ("True", "False")]
    code, printed, _ = mxlab(*arguments, "--model", tiny_llama)
    assert (code, "0 runs made, 4 found finished, 0 failed" in printed) == (0, True)
    assert sum("skipped" in line for line in printed.splitlines()) == 4
    assert len(list((out / "ex1").glob("2*"))) == 4

    code, printed, _ = mxlab("report", out, "-o", tmp_path / "report")
    assert code == 0
    assert list((tmp_path / "report").rglob("*.png"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('stage = "s"\nrecipe = "ex1"\nblok_size = 16', ["sweep.toml: unknown key 'blok_size'; did you mean"]),
        ('stage = "s"\nrecipe = "ex1"\n[grid]\nblock_size = 16', ["sweep.toml, [grid]: block_size is 16"]),
        ("stage", ["sweep.toml is not valid TOML"]),
    ],
)
def test_bad_sweeps(text, parts, mxlab, tmp_path):
    (tmp_path / "sweep.toml").write_text(text, encoding="utf-8")
    code, _, err = mxlab("sweep", tmp_path / "sweep.toml", "--out", tmp_path / "out")
    assert code == 2
    for part in parts:
        assert part in err
    assert not (tmp_path / "out").exists()


def test_a_bad_setting_is_found_before_anything_runs(mxlab, tmp_path):
    code, _, err = mxlab("sweep", "ex1", "--limit", "1.5", "--out", tmp_path / "out")
    assert (code, "limit is 1.5" in err) == (2, True)
    assert mxlab("sweep", "ex9")[0] == 2
    assert not (tmp_path / "out").exists()


def test_report_of_nothing(mxlab, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        code, _, err = mxlab("report", folder, "-o", tmp_path / "report")
        assert code == 2
        assert str(folder) in err
    assert not (tmp_path / "report").exists()


# ---- results, and JSON


@pytest.fixture
def published(tmp_path) -> Path:
    """A tree as the seed left it: a run directory with lm-eval's metrics and no run.json, and a crashed one."""
    folder = tmp_path / "published" / "ex1" / "20260207_220640_bs16_sb6_ccfalse"
    folder.mkdir(parents=True)
    metrics = {
        "results": {
            "lambada_openai": {"alias": "lambada", "acc,none": 0.5, "acc_stderr,none": 0.25, "perplexity,none": "N/A"},
            "wikitext": {"word_perplexity,none": float("nan"), "word_perplexity_stderr,none": "N/A"},
        },
        "n-samples": {"lambada_openai": {"original": 8, "effective": 4}},
        "model_name": "meta-llama/Llama-3.2-1B",
        "config": {"model_dtype": "torch.bfloat16", "batch_size": "32"},
        "total_evaluation_time_seconds": "12.5",
    }
    (folder / "metrics_2026.json").write_text(json.dumps(metrics), encoding="utf-8")
    crashed = folder.with_name("20260207_213059_bs16_sb8_cctrue")
    crashed.mkdir()
    (crashed / "command.txt").touch()
    return tmp_path / "published"


def test_results_of_a_published_tree(mxlab, published):
    code, out, _ = mxlab("results", published, "--json")
    found = json.loads(out, parse_constant=pytest.fail)  # NaN is not JSON
    [run] = found["runs"]
    assert code == 0
    assert (run["stage"], run["run"]) == ("ex1", "20260207_220640_bs16_sb6_ccfalse")
    assert (run["recipe"], run["model"], run["dtype"]) == (None, "meta-llama/Llama-3.2-1B", "bfloat16")
    assert run["options"] == {"block_size": 16, "scale_bits": 6, "custom_cuda": False}
    assert (run["seconds"], run["rows"]) == (12.5, {"lambada_openai": 4})
    assert run["metrics"] == {
        "lambada_openai": {"acc": {"value": 0.5, "stderr": 0.25}},
        "wikitext": {"word_perplexity": {"value": "nan", "stderr": None}},
    }
    assert "20260207_213059_bs16_sb8_cctrue: no `metrics_" in found["incomplete"][0]
    assert found["failed"] == []


def test_results_as_a_table(mxlab, published):
    code, out, err = mxlab("results", published)
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["lambada_openai", "4", "acc", "0.5", "0.25"] in [line[-5:] for line in lines]
    assert "incomplete: ex1/20260207_213059_bs16_sb8_cctrue" in err
    code, _, err = mxlab("results", published / "nowhere")
    assert (code, "nowhere is no folder" in err) == (2, True)


def test_results_as_json_alone(mxlab, tiny_llama, tmp_path):
    """What eval and sweep print under --json is all that is on standard output, and what `results` prints later."""
    arguments = ["--model", tiny_llama, *QUICK, "--json", "--out", tmp_path]
    code, out, _ = mxlab("eval", "--recipe", "tier_a", *arguments)
    assert code == 0
    evaluated = json.loads(out)
    assert (evaluated["recipe"], evaluated["stage"], evaluated["dtype"]) == ("tier_a", "tier_a", "float32")
    assert evaluated["rows"] == {"mxlab_passages": 2}
    assert Path(evaluated["folder"]).name.endswith("_tier_a_tiny-llama_bs32_sb8_cctrue")
    assert evaluated["metrics"]["mxlab_passages"].keys() == {"acc", "perplexity"}
    file = tmp_path / "sweep.toml"
    file.write_text('stage = "tier_a"\n[grid]\nrecipe = ["tier_a", "ex1"]\nmodel = ["none"]', encoding="utf-8")
    code, out, _ = mxlab("sweep", file, "--tasks", "mxlab_passages", *arguments)
    swept = json.loads(out)
    assert (code, len(swept["runs"]), swept["failed"]) == (0, 2, [])
    assert swept["runs"][0] == {**evaluated, "options": swept["runs"][0]["options"]}
    assert swept["runs"][1]["recipe"] == "ex1"
    code, out, _ = mxlab("results", tmp_path, "--json")
    by_run = {run["run"]: run for run in json.loads(out)["runs"]}
    assert by_run == {run["run"]: run for run in swept["runs"]}
    code, out, err = mxlab("sweep", file, *arguments, "--model", "/no/such")
    assert (code, json.loads(out)["runs"]) == (1, [])
    assert all("no model folder /no/such" in failure for failure in json.loads(out)["failed"])
    assert f"see {tmp_path / 'tier_a' / rundir.FAILURES}" in err


def test_doctor_as_json(mxlab):
    code, out, _ = mxlab("doctor", "--json")
    assert code == 0
    found = json.loads(out)
    assert {"patch", "kernels", "hub", "torch", "data"} <= found.keys()
    assert found["MX_SPECS_JSON"] == {"ok": True, "found": "is not set: a patched Llama is stock Llama"}


# ---- compare


def test_compare_with_settings_of_its_own(mxlab, tiny_llama, tmp_path):
    file = tmp_path / "mine.toml"
    keys = f'text = "passages"\nwindow = 16\nwindows = 64\nmodel = "{tiny_llama}"\n'
    file.write_text(f'formats = ["int8@16"]\nroles = ["kv"]\n{keys}', encoding="utf-8")
    arguments = ["compare", file, "--windows", 2, "--dtype", "float32", "--device", "cpu"]
    assert mxlab(*arguments, "--out", tmp_path / "out")[0] == 0
    made = json.loads((tmp_path / "out" / "study.json").read_text(encoding="utf-8"))
    assert (made["windows"], made["dtype"]) == (2, "float32")
    code, _, err = mxlab("compare", file, "--windows", 0, "--out", tmp_path / "other")
    assert (code, "windows is 0" in err) == (2, True)
    file.write_text(keys, encoding="utf-8")
    code, _, err = mxlab("compare", file, "--out", tmp_path / "other")
    assert (code, "mine.toml: needs formats, such as formats = [" in err) == (2, True)
    assert not (tmp_path / "other").exists()


# ---- run, doctor, help


def test_version(mxlab):
    assert mxlab("--version") == (0, f"mxlab {__version__}\n", "")


def _commands() -> dict[str, Any]:
    """The commands by name, those of `mxlab bench` aside."""
    return typer.main.get_command(cli.app).commands  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_shown_and_can_be_parsed(name, mxlab):
    code, out, _ = mxlab(name, "--help")
    assert code == 0
    for example in EXAMPLES[name]:
        assert f"   {example}\n" in out
        program, command, *arguments = shlex.split(example)
        assert (program, command) == ("mxlab", name)
        # Raises where an option is unknown or an argument is missing; calls nothing.
        context = _commands()[name].make_context(name, arguments)
        if name == "bench":
            _, inner, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
            inner.make_context(inner.name, rest, parent=context)


def test_every_command_has_examples():
    assert set(_commands()) == {*EXAMPLES, "run"}


@pytest.mark.parametrize(("command", "kind"), [("sweep", "sweep"), ("compare", "study"), ("eval", "recipe")])
def test_help_lists_all_that_is_shipped(command, kind, mxlab):
    _, out, _ = mxlab(command, "--help")
    files = {"sweep": "recipes/sweeps", "study": "recipes/studies", "recipe": "recipes"}[kind]
    listed = dict(
        line.strip().split(maxsplit=1) for line in out.partition(" Shipped ")[2].splitlines()[1:] if line.strip()
    )
    assert set(listed) == {file.stem for file in (ROOT / files).glob("*.toml")}
    assert all(len(summary) > 10 for summary in listed.values())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mxlab swe", {"sweep"}),
        ("mxlab sweep t", {"tiers"}),
        ("mxlab eval --recipe tier_", {"tier_a", "tier_b", "tier_c", "tier_d"}),
        ("mxlab convert smollm2 ex", {"ex1", "ex2", "ex2_gptq", "ex2_best"}),
        ("mxlab compare w", {"whole_text"}),
        ("mxlab bench li", {"linear"}),
        ("mxlab sweep ./my", set()),  # for the shell, which knows paths
    ],
)
def test_completion(words, expected):
    """As bash asks for it: the name of the program is that of its process."""
    asked = {"_MXLAB_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    code = "import sys; from mxlab.cli.main import main; sys.argv[0] = 'mxlab'; main()"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True)
    assert (done.returncode, set(done.stdout.split()), done.stderr) == (0, expected, "")


def test_run(mxlab):
    assert mxlab("run", "--block_size", "16", "--", "sh", "-c", "exit 7")[0] == 7
    # The command's own `--` and options are its own.
    echo = ["sh", "-c", 'echo "$@" >&2; exit 5', "x", "a", "--", "--block_size", "--help"]
    for separator in ([], ["--"]):
        for options in ([], ["--custom_cuda"], ["--round=even", "--block-size", "16"]):
            code, _, err = mxlab("run", *options, *separator, *echo)
            assert (code, err) == (5, "a -- --block_size --help\n")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "no command"),
        (["--block_size", "16"], "no command"),
        (["--", "no-such-command"], "there is no command 'no-such-command'"),
        (["--block_size", "-1", "true"], "block_size is -1"),
        (["--blok_size", "16", "true"], "usage: mxlab run"),
        (["--", "true"], "made no quantized Llama"),
    ],
)
def test_bad_runs(arguments, part, mxlab):
    code, _, err = mxlab("run", *arguments)
    assert (code, part in err) == (2, True), err


def test_help_of_run(mxlab):
    code, out, _ = mxlab("run", "--help")
    assert code == 0
    assert "--kv-elem-format" in out


@pytest.mark.parametrize("data", ["none", "missing", "complete"])
def test_doctor(data, mxlab, tmp_path, monkeypatch):
    monkeypatch.setenv("MX_SPECS_JSON", '{"block_sise": 16}' if data == "missing" else "{}")
    if data == "complete":
        for name in ("lambada_openai.jsonl", "wikitext2_test.raw"):
            (tmp_path / name).touch()
    code, out, _ = mxlab("doctor", *([] if data == "none" else ["--data-dir", tmp_path]))
    assert code == 0
    rows = {line.split()[1]: line for line in out.splitlines()}
    assert {"patch", "kernels", "hub", "torch", "transformers", "token"} <= rows.keys()
    assert "switched off by HF_HUB_OFFLINE" in rows["hub"]
    assert "smollm2 is installed" in out
    assert "transformers" in rows["patch"]
    said = {
        "none": "is embedded",
        "missing": "lambada_openai.jsonl, wikitext2_test.raw missing",
        "complete": "complete",
    }
    assert said[data] in rows["data"]
    assert rows["data"].startswith("--" if data == "missing" else "ok")
    assert rows["MX_SPECS_JSON"].startswith("--" if data == "missing" else "ok")


def test_doctor_says_that_the_kernels_are_missing(mxlab, monkeypatch):
    monkeypatch.setattr("mxlab.numerics.kernels.native.MISSING", "No module named _native")
    _, out, _ = mxlab("doctor")
    row = next(line for line in out.splitlines() if " kernels " in line)
    assert row.startswith("--")
    assert "compiler" in " ".join(out.split())


def test_the_program_itself(tmp_path):
    """One process of its own: the entry point, no traceback, a quick answer without torch."""
    code = "import sys; from mxlab.cli.main import main; sys.argv[0] = 'mxlab'; main()"
    command = [sys.executable, "-c", code, "eval", "--recipe", "ex3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "COLUMNS": "300"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: no recipe 'ex3'")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    version = subprocess.run([sys.executable, "-c", "import mxlab, sys; sys.exit('torch' in sys.modules)"])
    assert version.returncode == 0


# ---- convert


def test_a_dry_run_shows_the_inventory(mxlab, tiny_llama):
    code, out, _ = mxlab("convert", "--dry-run", tiny_llama, "tier_d", "--set", "block_size=16")
    assert code == 0
    assert "model.layers.*.mlp.down_proj" in out
    assert "fp4_e2m1@16,rounding=even" in out
    assert "linear layers in high precision: lm_head" in out
    assert re.search(r"average bits per parameter: \d+\.\d{4} in every phase", out)
    assert "average bits per element of K and V: " in out
    assert "element-wise rounding: none" in out


def test_a_dry_run_fits_a_narrow_terminal(mxlab, tiny_llama, monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=60, no_color=True)
    monkeypatch.setattr(console, "console", screen)
    assert mxlab("convert", "--dry-run", tiny_llama, "tier_a")[0] == 0
    lines = re.sub(r"\x1b\[[\d;]*m", "", screen.file.getvalue()).splitlines()
    assert max(map(len, lines)) <= 60
    assert any("lm_head" in line for line in lines)


def test_convert(mxlab, tiny_llama, tmp_path):
    assert mxlab("convert", tiny_llama, "ex1", "--out", tmp_path / "model")[0] == 0
    assert (tmp_path / "model" / "recipe.toml").is_file()
    for arguments in (["--dry-run", "--out", tmp_path / "other"], []):
        code, _, err = mxlab("convert", tiny_llama, "ex1", *arguments)
        assert code == 2
        assert "give --out FOLDER for the converted model, or --dry-run" in err
