"""The report on small trees: what it reads, what it picks, what it says of runs that cannot be compared or read."""

import csv
import hashlib
import json
import re
import subprocess
import sys

import pytest
from matplotlib.image import imread

from mxlab.errors import ReportError
from mxlab.report import dot_plots, write_report
from mxlab.report.dot_plots import _compared
from mxlab.report.figures import panels, plot
from mxlab.report.read import read_tree

TASK = "lambada_openai"


def metrics(acc=0.5, ppl=8.0, seconds="100.0", n=1000, **changes):
    """A metrics file as lm-eval writes it, as far as a report reads it."""
    return {
        "results": {TASK: _scores(acc, ppl)},
        "n-samples": {TASK: {"original": 1000, "effective": n}},
        "config": {"model_dtype": "torch.bfloat16", "batch_size": "32", "device": "cuda:0", "limit": None},
        "model_name": "a/model",
        "pretty_env_info": "PyTorch version: 2.9\nGPU models and configuration: GPU 0: Tesla T4\nFlags: fpu vme",
        "transformers_version": "4.57.6",
        "lm_eval_version": "0.4.10",
        "total_evaluation_time_seconds": seconds,
    } | changes


def _scores(acc, ppl):
    scores = {"alias": TASK, "acc,none": acc, "acc_stderr,none": 0.01, "perplexity,none": ppl}
    return scores | {"perplexity_stderr,none": 0.2}


def add(folder, record=None, run=None, file="metrics_2026-01-01T00-00-00.000000.json", **changes):
    """Make a run directory; ``run`` is its run.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps(record or metrics(**changes)), encoding="utf-8")
    if run is not None:
        (folder / "run.json").write_text(
            json.dumps({"schema": 1, "stage": folder.parent.name, "key": {}, "scale_clamps": None} | run)
        )
    return folder


@pytest.fixture
def tree(tmp_path):
    """A results folder with a baseline."""
    add(tmp_path / "results" / "baseline", acc=0.6, ppl=5.0)
    return tmp_path / "results"


@pytest.fixture
def report(tree, tmp_path):
    """A function which writes the report of the tree and returns its Markdown."""

    def write():
        return write_report(tree, tmp_path / "out").markdown.read_text(encoding="utf-8")

    return write


def section(text, title):
    return text.split(f"# {title}\n")[1].split("\n## ")[0]


def rows(text, title):
    """The rows of a table of the Markdown as lists of cells, the head first."""
    lines = re.search(rf"\*\*{re.escape(title)}[^\n]*\*\*\n\n((?:\|[^\n]*\n)+)", text)
    assert lines, f"no table {title}"
    head, _, *body = lines[1].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in (head, *body)]


def run_ids(text, title):
    return [row[-1] for row in rows(text, title)[1:]]


# What wins.


def test_equal_accuracies_go_to_the_shorter_time(tree, report):
    add(tree / "ex1" / "20260101_000000_bs16_sb8_cctrue", seconds="90.0")
    add(tree / "ex1" / "20260101_000001_bs32_sb6_ccfalse", seconds="80.0")
    add(tree / "ex1" / "20260101_000002_bs64_sb6_ccfalse", seconds="70.0", acc=0.4999)
    headline = rows(report(), "Table 1")
    assert headline[2][0] == "Ex1 best (accuracy)"
    assert headline[2][-1] == "Full eval; bs=32, sb=6, custom_cuda=false"
    assert headline[3][0] == "Ex1 best (speed)"
    assert headline[3][3:] == ["70.000", "14.286", "Full eval; bs=64, sb=6, custom_cuda=false"]


def test_full_and_limited_runs_do_not_compete(tree, report):
    add(tree / "ex2" / "20260101_000000_bs16_sb8_cctrue", acc=0.4)
    add(tree / "ex2" / "20260101_000001_bs16_sb6_cctrue", acc=0.9, n=250)
    text = report()
    assert [row[0] for row in rows(text, "Table 1")[2:]] == [
        "Ex2 best (accuracy)",
        "Ex2 best (speed)",
        "Ex2 best (accuracy, limited)",
        "Ex2 best (speed, limited)",
    ]
    assert [row[7] for row in rows(text, "Table 2.1")] == ["n", "250", "1000"]


def test_a_run_of_unknown_configuration_wins_only_alone(tree, report):
    add(tree / "ex1" / "default", acc=0.9)
    assert rows(report(), "Table 1")[2][-1] == "Full eval; configuration unknown"
    add(tree / "ex1" / "20260101_000000_bs16_sb8_cctrue", acc=0.4)
    text = report()
    assert rows(text, "Table 1")[2][1] == "0.400000 ± 0.010000"
    assert run_ids(text, "Table 2.1") == ["20260101_000000_bs16_sb8_cctrue"]
    assert run_ids(text, "Table 3") == ["default"]


def test_nan_never_wins(tree, report):
    add(tree / "ex1" / "20260101_000000_bs16_sb8_cctrue", acc=float("nan"), seconds="1")
    add(tree / "ex1" / "20260101_000001_bs32_sb8_cctrue", acc=0.1)
    text = report()
    assert [row[1] for row in rows(text, "Table 1")[2:]] == ["0.100000 ± 0.010000"] * 2
    assert [row[-1] for row in rows(text, "Table 2.1")] == ["Notes", "acc not a number", ""]


def test_a_stage_of_nan_has_no_best_accuracy(tree, report):
    for second in range(2):
        folder = tree / "ex1" / f"20260101_00000{second}_bs16_sb8_cctrue"
        add(folder, acc=float("nan"), ppl=float("nan"))
    text = report()
    assert [row[0] for row in rows(text, "Table 1")[2:]] == ["Ex1 best (speed)"]
    assert rows(text, "Table 1")[2][-1].endswith("; acc and ppl not a number")
    assert "No two runs" in section(text, "Numerically identical runs")
    assert "_acc_" not in text
    assert "_ppl_" not in text


# The tables.


def test_order_of_a_sweep(tree, report):
    names = ["bs128_sb8_ccfalse", "bs16_sb8_cctrue", "bs16_sb8_ccfalse", "bs16_sb6_cctrue", "bs32_sb6_ccfalse"]
    for second, name in enumerate(names):
        add(tree / "ex1" / f"20260101_00000{second}_{name}")
    ordered = [f"20260101_00000{second}_{names[second]}" for second in (3, 2, 1, 4, 0)]
    assert run_ids(report(), "Table 2.1") == ordered


def test_options_of_run_json_win_over_the_name_and_add_columns(tree, report):
    options = {"block_size": 32, "scale_bits": 8, "custom_cuda": True, "calibration": 0.25, "rotate": False}
    add(tree / "ex1" / "20260101_000000_bs16_sb6_ccfalse", run={"stage": "ex1", "options": options})
    add(tree / "ex1" / "anything", run={"stage": "ex1", "options": {"block_size": 16}})
    head, first, second = rows(report(), "Table 2.1")
    assert head[:6] == ["block_size", "scale_bits", "custom_cuda", "calibration", "rotate", "acc (±stderr)"]
    assert first[:5] == ["16", "—", "—", "—", "—"]
    assert second[:5] == ["32", "8", "true", "0.25", "false"]


def test_every_other_stage_has_a_table(tree, report):
    add(tree / "weights_only" / "20260101_000000_bs16_sb8_cctrue")
    add(tree / "ex1" / "20260101_000000_bs16_sb8_cctrue")
    add(tree / "kv_only" / "default", run={"stage": "kv_only", "options": {}})
    text = report()
    assert re.findall(r"\*\*(Table 2.*)\*\*", text) == [
        "Table 2.1: Exercise 1 sweep results",
        "Table 2.2: Recipes compared",
    ]
    assert [row[0] for row in rows(text, "Table 2.2")[1:]] == ["Baseline", "kv_only", "weights_only"]
    assert [row[0] for row in rows(text, "Table 1")[1:]] == [
        "Baseline",
        "Ex1 best (accuracy)",
        "Ex1 best (speed)",
        "kv_only",
        "weights_only",
    ]
    assert rows(text, "Table 1")[4][-1] == "Full eval; no swept options"


def test_a_stage_of_several_models_has_a_table_and_figures_for_each(tree, report, tmp_path):
    """None is dropped because another has more runs."""
    for model, sizes in (("a/model", (16, 32, 64)), ("b/other", (16, 32))):
        for size in sizes:
            options = {"block_size": size, "scale_bits": 8, "custom_cuda": True}
            folder = tree / "ex1" / f"{model[0]}{size}"
            add(folder, model_name=model, run={"stage": "ex1", "options": options, "key": {"model": model}})
    text = report()
    assert re.findall(r"\*\*(Table 2.*)\*\*", text) == [
        "Table 2.1a: Exercise 1 sweep results, model",
        "Table 2.1b: Exercise 1 sweep results, other",
    ]
    assert [len(rows(text, f"Table 2.1{letter}")) for letter in "ab"] == [4, 3]
    drawn = {path.stem for path in (tmp_path / "out" / "figs").iterdir()}
    assert drawn == {f"ex1_{what}_vs_blocksize_{model}" for what in ("acc", "speed") for model in ("model", "other")}
    assert "Not drawn" not in text


def test_divergence_and_agreement_are_shown_where_they_were_measured(tree, report):
    scores = {
        "perplexity,none": 20.0,
        "kl_divergence,none": 0.25,
        "top1_agreement,none": 0.875,
        "cross_entropy,none": 3.0,
    }
    for stage, factor in (("one", 1), ("two", 2)):
        record = metrics() | {"results": {"passages": {**scores, "kl_divergence,none": 0.25 * factor}}}
        record["n-samples"] = {"passages": {"original": 9, "effective": 9}}
        add(tree / stage / "default", record=record, run={"stage": stage, "options": {"block_size": None}})
    text = report()
    head, *found = rows(text, "Table 2.1")
    columns = [name for name in head if "KL" in name or "agreement" in name]
    assert len(columns) == 2
    by_name = [dict(zip(head, row, strict=True)) for row in found]
    assert [row[columns[0]][:8] for row in by_name if row["recipe"] in ("one", "two")] == ["0.250000", "0.500000"]
    assert "Other metrics, not shown: cross_entropy." in text
    assert "None" not in section(text, "Headline results")


def test_a_text_has_no_empty_accuracy_axes(tree, tmp_path):
    for width in (4, 6, 8):
        record = metrics() | {"results": {"passages": {"perplexity,none": 10.0 + width}}}
        record["n-samples"] = {"passages": {"original": 9, "effective": 9}}
        options = {"calibration": width, "block_size": None}
        add(tree / "text" / str(width), record=record, run={"stage": "text", "options": options})
    [results] = _compared(read_tree(tree))
    figure = dot_plots.plot(results, [])
    [axes] = figure.axes
    assert "Perplexity" in axes.get_xlabel()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["calibration=4", "calibration=6", "calibration=8"]


def test_a_narrow_page_has_the_heads_beside_the_cells(tree, tmp_path):
    add(tree / "ex1" / "20260101_000000_bs16_sb8_cctrue")
    page = write_report(tree, tmp_path / "out").page.read_text(encoding="utf-8")
    assert 'data-head="block_size"' in page
    assert "attr(data-head)" in page


def test_tasks_have_a_row_each_and_missing_metrics_a_dash(tree, report):
    two = {
        TASK: {"acc,none": 0.5, "acc_stderr,none": "N/A"},
        "wikitext": {"word_perplexity,none": 20.5, "word_perplexity_stderr,none": 0.5},
    }
    samples = {TASK: {"original": 1000, "effective": 1000}, "wikitext": {"original": 60, "effective": 60}}
    add(tree / "ex1" / "20260101_000000_bs16_sb8_cctrue", metrics(**{"results": two, "n-samples": samples}))
    text = report()
    assert [row[3:-1] for row in rows(text, "Table 2.1")[1:]] == [
        [TASK, "0.500000 ± —", "—", "100.000", "10.600"],
        ["wikitext", "—", "20.500000 ± 0.500000", "100.000", "10.600"],
    ]
    assert [row[:2] for row in rows(text, "Table 1")[1:]] == [
        ["Baseline", TASK],
        ["Ex1 best (accuracy)", TASK],
        ["Ex1 best (speed)", TASK],
        ["Ex1 best (perplexity)", "wikitext"],
        ["Ex1 best (speed)", "wikitext"],
    ]
    comparability = section(text, "Comparability")
    assert ": task wikitext instead of lambada_openai; n 60 instead of 1000; tasks of the run " in comparability
    assert "(tasks of the run): tasks of the run lambada_openai, wikitext instead of lambada_openai." in comparability


def test_other_metrics_are_named(tree, report):
    scores = {"acc_norm,none": 0.5, "acc_norm_stderr,none": 0.1, "exact_match,strict-match": 0.2, "alias": "x"}
    add(tree / "ex1" / "20260101_000000_bs16_sb8_cctrue", metrics(results={TASK: scores}))
    text = report()
    assert "|\n\nOther metrics, not shown: acc_norm, exact_match (strict-match).\n" in text
    assert [row[0] for row in rows(text, "Table 1")[2:]] == ["Ex1 best (speed)"]


@pytest.mark.parametrize("samples", [{}, None])
def test_without_n_samples_only_the_speed_is_missing(tree, report, samples):
    add(tree / "ex1" / "20260101_000000_bs16_sb8_cctrue", metrics(**{"n-samples": samples}))
    text = report()
    (best,) = rows(text, "Table 1")[2:]
    assert best[:3] == ["Ex1 best (accuracy)", "0.500000 ± 0.010000", "8.000000 ± 0.200000"]
    assert best[3:] == ["100.000", "—", "n not recorded; bs=16, sb=8, custom_cuda=true"]
    assert [row[5:] for row in rows(text, "Table 2.1")] == [
        ["eval_time_s", "examples/sec", "n", "run_id", "Notes"],
        ["100.000", "—", "—", "20260101_000000_bs16_sb8_cctrue", "n not recorded"],
    ]
    assert "None: every run directory" in section(text, "Incomplete runs")


def test_csv_files_keep_all_digits(tree, tmp_path):
    add(tree / "ex1" / "20260101_000000_bs16_sb8_cctrue", acc=0.123456789012345, seconds="333.3333333333")
    paths = write_report(tree, tmp_path / "out")
    (path,) = (path for path in paths.tables if path.name == "table_2_1_ex1.csv")
    with path.open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["block_size"], row["custom_cuda"], row["acc_stderr"]) == ("16", "true", "0.01")
    assert float(row["acc"]) == 0.123456789012345
    assert float(row["examples/sec"]) == 1000 / 333.3333333333


def test_stages_of_two_experiments_stay_apart(tmp_path):
    for model in ("small", "large"):
        for stage in ("baseline", "ex1/20260101_000000_bs16_sb8_cctrue"):
            add(tmp_path / "results" / model / stage, metrics(model_name=model))
    text = write_report(tmp_path / "results", tmp_path / "out").markdown.read_text(encoding="utf-8")
    assert "small/ex1: comparable with the baseline in speed and accuracy." in text
    assert [row[0] for row in rows(text, "Table 1")[1:3]] == ["large/baseline", "small/baseline"]


def test_the_stage_of_run_json_wins_over_the_folder(tree, report):
    add(tree / "anywhere" / "one", run={"stage": "ex1", "options": {"block_size": 16}})
    assert "Table 2.1: Exercise 1 sweep results" in report()


# What may be compared.


@pytest.mark.parametrize(
    ("changes", "verdict", "detail"),
    [
        ({"n": 250}, "speed and accuracy", "n 250 instead of 1000"),
        ({"model_name": "other"}, "speed and accuracy", "model other instead of a/model"),
        (
            {"config": {"model_dtype": "torch.float32"}},
            "speed and accuracy",
            "dtype float32 instead of bfloat16",
        ),
        ({"config": {"batch_size": 8}}, "speed", "batch size 8 instead of 32"),
        ({"config": {"device": "cpu"}}, "speed", "device cpu instead of cuda:0 (Tesla T4)"),
    ],
    ids=["n", "model", "dtype", "batch size", "device"],
)
def test_what_differs_from_the_baseline_is_marked(tree, report, changes, verdict, detail):
    add(tree / "ex1" / "20260101_000000_bs16_sb8_cctrue", **changes)
    text = report()
    marked = f"{verdict} not comparable with the baseline ({detail.split(' instead')[0].rpartition(' ')[0]})"
    assert rows(text, "Table 1")[2][-1].split("; ")[-1] == marked
    assert f"- Ex1: {marked}: {detail}." in section(text, "Comparability")


def test_a_tree_without_baseline_says_so(tmp_path):
    add(tmp_path / "ex1" / "20260101_000000_bs16_sb8_cctrue")
    text = write_report(tmp_path, tmp_path / "out").markdown.read_text(encoding="utf-8")
    assert "Without a readable baseline run" in section(text, "Comparability")


def test_a_quantized_run_among_the_baselines_is_none(tree, report):
    options = {"block_size": 16, "scale_bits": 8, "custom_cuda": True}
    add(tree / "baseline" / "one", run={"stage": "baseline", "options": {}, "quantized": False}, acc=0.7)
    add(tree / "baseline" / "two", run={"stage": "baseline", "options": options, "quantized": True}, acc=0.4)
    text = report()
    assert [row[:2] for row in rows(text, "Table 1")[1:]] == [
        ["Baseline", "0.700000 ± 0.010000"],
        ["Baseline", "0.600000 ± 0.010000"],
        ["Baseline best (accuracy)", "0.400000 ± 0.010000"],
        ["Baseline best (speed)", "0.400000 ± 0.010000"],
    ]
    assert rows(text, "Table 1")[3][-1] == "Full eval; bs=16, sb=8, custom_cuda=true; quantized, so no baseline"
    assert [row[-2:] for row in rows(text, "Table 2.1")[1:]] == [["two", "quantized, so no baseline"]]
    assert "- Baseline, 1 of 3 runs (`two`): comparable" in section(text, "Comparability")


def test_only_baselines(report):
    assert section(report(), "Comparability").endswith("There are no other runs to compare.\n")


def test_data_are_compared_by_task_and_shown_by_their_first_digits(tree, report):
    for stage, others in (("baseline", {}), ("ex1", {"wikitext": "hub"}), ("ex2", {})):
        digest = ("f" if stage == "ex2" else "0") * 64
        key = {"data": {TASK: digest, **others}}
        add(tree / stage / "one", run={"stage": stage, "options": {}, "key": key}, acc=0.5)
    (tree / "baseline" / "metrics_2026-01-01T00-00-00.000000.json").unlink()
    comparability = section(report(), "Comparability")
    assert "data 000000000000, " in comparability
    assert "- Ex1: comparable with the baseline in speed and accuracy." in comparability
    assert "(data): data ffffffffffff instead of 000000000000." in comparability
    assert "{" not in comparability


def test_what_was_not_recorded_differs_from_nothing(tree, report):
    add(tree / "ex1" / "20260101_000000_bs16_sb8_cctrue", **{"n-samples": {}})
    add(tree / "ex1" / "20260101_000001_bs16_sb6_cctrue")
    text = report()
    assert [row[0] for row in rows(text, "Table 1")[2:]] == ["Ex1 best (accuracy)", "Ex1 best (speed)"]
    assert section(text, "Numerically identical runs").count("\n- ") == 1


def test_identical_runs_are_grouped_by_what_they_share(tree, report):
    add(tree / "ex1" / "20260101_000000_bs16_sb8_cctrue")
    add(tree / "ex1" / "20260101_000001_bs16_sb6_cctrue")
    add(tree / "ex1" / "20260101_000002_bs16_sb6_ccfalse", acc=0.5000000000000001)
    add(tree / "ex1" / "default")
    add(tree / "ex2" / "20260101_000000_bs16_sb8_cctrue")
    identical = section(report(), "Numerically identical runs")
    assert re.findall(r"^- .*", identical, re.MULTILINE) == [
        "- Ex1: scale_bits 6 and 8 give identical numbers for block_size 16, custom_cuda=true; `default`, of unknown "
        "configuration, gives the same (acc 0.500000 ± 0.010000, ppl 8.000000 ± 0.200000)."
    ]


def test_no_identical_runs(tree, report):
    assert "No two runs" in section(report(), "Numerically identical runs")


# Clamped scales.


def test_clamps_of_every_role(tree, report):
    counts = {
        "weight": {"clamped": 3, "overflowed": 0, "blocks": 400},
        "k": {"clamped": 0, "overflowed": 1, "blocks": 9},
    }
    options = {"block_size": 16, "scale_bits": 6, "custom_cuda": True}
    add(tree / "ex1" / "one", run={"stage": "ex1", "options": options, "scale_clamps": counts})
    add(tree / "ex1" / "20260101_000000_bs16_sb8_cctrue")
    text = report()
    assert rows(text, "Table 4")[1:] == [
        ["ex1", "one", "weight", "400", "3", "0.750", "0"],
        ["ex1", "one", "k", "9", "0", "0.000", "1"],
    ]
    assert "Not recorded: `ex1/20260101_000000_bs16_sb8_cctrue`." in section(text, "Clamped shared scales")


def test_clamps_of_a_foreign_tree(report):
    assert "Not recorded: no `run.json`" in section(report(), "Clamped shared scales")


# What is not a run.


def test_incomplete_runs_are_listed(tree, report):
    (tree / "ex1" / "20260101_000000_bs16_sb8_cctrue").mkdir(parents=True)
    (tree / "ex1" / "killed").mkdir()
    (tree / "ex1" / "killed" / "output.log").write_text("loading\n 50%|\rCUDA out of memory\n")
    add(tree / "ex1" / ".partial")
    (tree / "notes").mkdir()
    incomplete = section(report(), "Incomplete runs")
    assert "- `ex1/20260101_000000_bs16_sb8_cctrue`: no `metrics_*.json`; it holds nothing." in incomplete
    assert "`ex1/killed`: no `metrics_*.json`; it holds output.log; its log ends with: CUDA out of memory" in incomplete
    assert ".partial" not in incomplete
    assert "notes" not in incomplete


def test_complete_trees_say_so(report):
    assert "None: every run directory" in section(report(), "Incomplete runs")


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ('{"results": {', "not readable as JSON"),
        ("[]", "not a JSON object"),
        (json.dumps(metrics(results={})), "key 'results' is missing, empty or no dict"),
        (json.dumps(metrics(results={TASK: {"acc,none": "high"}})), "'acc,none' is 'high', not a number"),
        (json.dumps(metrics(**{"n-samples": {TASK: {}}})), "key 'effective' is missing"),
        (json.dumps(metrics(n=0)), "'effective' is 0: no example was evaluated"),
        (json.dumps(metrics(seconds=None)), "'total_evaluation_time_seconds' is missing or no time"),
        (json.dumps(metrics(seconds="0")), "'total_evaluation_time_seconds' is missing or no time"),
    ],
)
def test_unreadable_metrics_are_named(tree, report, record, why):
    folder = tree / "ex1" / "20260101_000000_bs16_sb8_cctrue"
    folder.mkdir(parents=True)
    (folder / "metrics_1.json").write_text(record)
    incomplete = section(report(), "Incomplete runs")
    assert f"- `ex1/{folder.name}`: unusable: metrics_1.json" in incomplete
    assert why in incomplete


@pytest.mark.parametrize(
    ("run", "why"),
    [
        ({"schema": 2}, "run.json: schema is 2"),
        ({"stage": None}, "run.json: key 'stage' is missing"),
        ({"quantized": "yes"}, "run.json: key 'quantized' is missing, empty or no bool"),
        ({"options": [1]}, "run.json: options: not a JSON object"),
        ({"scale_clamps": {"k": {"blocks": 1}}}, "run.json: scale_clamps of k: key 'clamped' is missing"),
    ],
)
def test_an_unreadable_run_json_is_named(tree, report, run, why):
    add(tree / "ex1" / "one", run=run)
    assert f"- `ex1/one`: unusable: {why}" in section(report(), "Incomplete runs")


def test_the_newest_of_several_metrics_counts(tree, report):
    folder = add(tree / "ex1" / "20260101_000000_bs16_sb8_cctrue", file="metrics_2026-01-02.json", acc=0.2)
    add(folder, file="metrics_2026-01-01.json", acc=0.1)
    text = report()
    assert rows(text, "Table 2.1")[1][3] == "0.200000 ± 0.010000"
    note = "holds 2 metrics files: `metrics_2026-01-02.json` is used, not `metrics_2026-01-01.json`."
    assert note in section(text, "Incomplete runs")


def test_failures_of_a_sweep_are_listed(tree, report):
    (tree / "ex1").mkdir()
    failure = {"label": "bs16 <x>", "error": "Out|of\nmemory", "time": "2026-01-01T00:00:00"}
    (tree / "ex1" / "failures.jsonl").write_text(json.dumps(failure) + "\n\nnot json\n")
    assert rows(report(), "Table 5")[1:] == [
        ["ex1", "bs16 &lt;x>", r"Out\|of memory", "2026-01-01T00:00:00"],
        ["ex1", "failures.jsonl, line 3", "unreadable line: not json", ""],
    ]


def test_a_failure_that_was_made_good_is_left_out(tree, report):
    key = {"recipe": "abc", "limit": None}
    add(tree / "ex1" / "one", run={"stage": "ex1", "options": {}, "key": {**key, "revision": "0123"}})
    failure = {"label": "x", "error": "e", "time": "t", "traceback": "..."}
    lines = {
        "ex1": [
            {"key": {**key, "code": "older", "revision": None}},
            {"key": dict(reversed(key.items()))},
            {"key": {**key, "limit": 2}, "label": "other"},
            {},
        ],
        "ex2": [{"key": key, "label": "another stage"}],
    }
    for stage, changes in lines.items():
        (tree / stage).mkdir(exist_ok=True)
        text = "".join(json.dumps(failure | change) + "\n" for change in changes)
        (tree / stage / "failures.jsonl").write_text(text)
    text = report()
    assert [row[:2] for row in rows(text, "Table 5")[1:]] == [["ex1", "other"], ["ex1", "x"], ["ex2", "another stage"]]
    sentence = "2 failures are left out: their runs succeeded"
    assert sentence in section(text, "Incomplete runs")


def test_all_failures_made_good(tree, report):
    add(tree / "ex1" / "one", run={"stage": "ex1", "options": {}, "key": {"recipe": "abc"}})
    failure = {"label": "x", "error": "e", "time": "t", "key": {"recipe": "abc"}}
    (tree / "ex1" / "failures.jsonl").write_text(json.dumps(failure))
    incomplete = section(report(), "Incomplete runs")
    assert "None: every run directory" in incomplete
    assert "1 failure is left out" in incomplete


def test_a_single_run_directory_is_a_tree(tree, tmp_path):
    folder = add(tree / "ex1" / "20260101_000000_bs16_sb8_cctrue")
    text = write_report(folder, tmp_path / "out").markdown.read_text(encoding="utf-8")
    assert run_ids(text, "Table 2.1") == [folder.name]


def test_a_tree_of_broken_runs_is_still_reported(tmp_path):
    (tmp_path / "ex1" / "20260101_000000_bs16_sb8_cctrue").mkdir(parents=True)
    text = write_report(tmp_path, tmp_path / "out").markdown.read_text(encoding="utf-8")
    assert "No run is complete" in text


# The appendices.


def test_equal_environments_are_shown_once(tree, report):
    for second in range(3):
        folder = add(tree / "ex1" / f"20260101_00000{second}_bs16_sb8_cctrue")
        (folder / "env.txt").write_text(f"date: {second}\ntorch: 2.{second // 2}\n")
        (folder / "command.txt").write_text(f"run {second}\n")
    text = report()
    environments = section(text, "Appendix A: Environments")
    assert environments.count("torch: 2.0") == 1
    assert "Ex1, 1 of 3 runs (`20260101_000002_bs16_sb8_cctrue`):\n\n```\ntorch: 2.1\n```" in environments
    assert "PyTorch version: 2.9\nGPU models and configuration: GPU 0: Tesla T4\ntransformers_version" in environments
    assert "Flags" not in environments
    assert "# 20260101_000001_bs16_sb8_cctrue\nrun 1\n" in section(text, "Appendix B: Commands")
    assert "# baseline\n# not recorded\n" in section(text, "Appendix B: Commands")


# The files.


@pytest.fixture
def sweep(tree):
    for second, name in enumerate(("bs16_sb6_cctrue", "bs16_sb8_cctrue", "bs64_sb6_cctrue", "bs64_sb8_cctrue")):
        for stage in ("ex1", "ex2"):
            add(tree / stage / f"20260101_00000{second}_{name}", n=1000 if stage == "ex1" else 250)
    return tree


def test_four_figures(sweep, tmp_path):
    paths = write_report(sweep, tmp_path / "out")
    assert [path.relative_to(tmp_path / "out").as_posix() for path in paths.figures] == [
        "figs/ex1_acc_vs_blocksize.png",
        "figs/ex1_speed_vs_blocksize.png",
        "figs/ex2_acc_vs_blocksize.png",
        "figs/ex2_speed_vs_blocksize.png",
    ]
    text = paths.markdown.read_text(encoding="utf-8")
    assert text.count("The dashed line is the baseline.") == 2
    assert text.count("No baseline is drawn: speed and accuracy not comparable with the baseline (n).") == 2
    assert all(min(imread(path).shape[:2]) >= 800 for path in paths.figures)


def test_identical_series_are_both_visible(sweep):
    accuracy, _ = panels("ex1", read_tree(sweep))
    six, eight = (container.lines[0] for container in plot(accuracy).axes[0].containers)
    assert list(six.get_ydata()) == list(eight.get_ydata())
    assert not set(six.get_xdata()) & set(eight.get_xdata())
    assert six.get_linestyle() != eight.get_linestyle()
    assert six.get_markerfacecolor() != eight.get_markerfacecolor()


def test_the_order_of_options_in_a_file_makes_no_series(tree):
    sizes_first = {"block_size": 16, "scale_bits": 8, "custom_cuda": True}
    add(tree / "ex1" / "one", run={"options": sizes_first})
    add(tree / "ex1" / "two", run={"options": dict(reversed(sizes_first.items())) | {"block_size": 32}})
    accuracy, _ = panels("ex1", read_tree(tree))
    assert [result.run.run_id for result in accuracy.series[("scale_bits", 8), ("custom_cuda", True)]] == ["one", "two"]


def test_a_task_without_accuracy_draws_its_perplexity_or_its_speed_alone(tree):
    for scores, drawn in (({"word_perplexity,none": 9.0}, ["ppl", "speed"]), ({"f1,none": 0.5}, ["speed"])):
        add(tree / "ex1" / "20260101_000000_bs16_sb8_cctrue", metrics(results={TASK: scores}))
        assert [panel.quantity.slug for panel in panels("ex1", read_tree(tree))] == drawn


def test_the_speed_of_a_run_is_drawn_once_for_all_its_tasks(tree):
    results = {task: _scores(0.5, 8.0) for task in (TASK, "piqa")}
    samples = {task: {"original": 1000, "effective": 1000} for task in results}
    for name in ("20260101_000000_bs16_sb8_cctrue", "20260101_000001_bs32_sb8_cctrue"):
        add(tree / "ex1" / name, metrics(**{"results": results, "n-samples": samples}))
    drawn = list(panels("ex1", read_tree(tree)))
    assert [panel.quantity.slug for panel in drawn] == ["acc", "acc", "speed"]
    assert [len(panel.results) for panel in drawn] == [2, 2, 2]
    assert plot(drawn[-1]).axes[0].get_title(loc="left") == "Ex1, 2 tasks"


def test_nan_is_not_drawn(tree, report):
    add(tree / "baseline", acc=float("nan"))
    add(tree / "ex1" / "20260101_000000_bs16_sb8_cctrue", acc=float("nan"))
    add(tree / "ex1" / "20260101_000001_bs32_sb8_cctrue")
    accuracy, _ = panels("ex1", read_tree(tree))
    (line,) = (container.lines[0] for container in plot(accuracy).axes[0].containers)
    assert list(line.get_ydata()) == [0.5]
    text = report()
    assert "Not drawn, because not a number: 1 result." in text
    assert "No baseline is drawn: its accuracy is not a number." in text


def test_the_page_needs_nothing_else(sweep, tmp_path):
    page = write_report(sweep, tmp_path / "out").page.read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 4
    assert not re.search(r"""(?:src|href)="(?!data:|\#)|url\(|@import|<script""", page)
    assert "<code>n=250</code>" in page


def test_a_report_is_the_same_twice(sweep, tmp_path):
    digests = []
    for name in ("first", "second"):
        write_report(sweep, tmp_path / name)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    assert digests[0] == digests[1]


def test_a_report_within_the_results_is_no_run(tree):
    first = write_report(tree, tree / "report").markdown.read_text(encoding="utf-8")
    assert write_report(tree, tree / "report").markdown.read_text(encoding="utf-8") == first


# Errors.


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(ReportError, match=r"nowhere is no folder.*metrics_\*\.json.*`mxlab demo` or `mxlab sweep`"):
        write_report(tmp_path / "nowhere", tmp_path / "out")


def test_a_folder_without_runs_is_an_error(tmp_path):
    (tmp_path / "ex1").mkdir()
    with pytest.raises(ReportError, match=r"holds no run: no metrics_\*\.json.*`mxlab demo` or `mxlab sweep`"):
        write_report(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", [".", "report"])
def test_no_report_in_a_run_directory(tree, below):
    before = sorted(tree.rglob("*"))
    with pytest.raises(ReportError, match="baseline is a run directory"):
        write_report(tree, tree / "baseline" / below)
    assert sorted(tree.rglob("*")) == before


def test_a_file_in_the_way_is_an_error(tree, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ReportError, match="cannot be made"):
        write_report(tree, tmp_path / "out")


def test_torch_is_not_imported():
    code = "import sys, mxlab.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
