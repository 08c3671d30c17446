"""Formats side by side: what is compared, what is kept, what goes on after a failure or a stop."""

import csv
import json
from dataclasses import replace

import pytest
import torch

import mxlab
from mxlab.errors import FormatError, MxlabError, RunError, SpecError
from mxlab.eval import scorer
from mxlab.experiments import format_study
from mxlab.experiments.format_study import FormatStudy
from mxlab.report.format_study import write_study
from mxlab.report.study_rows import StudyRow


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog and goes home again " * 40, encoding="utf-8")
    return str(file)


@pytest.fixture
def study(tiny_llama, text):
    return FormatStudy(
        formats=("fp4@16", "int8@16"),
        scale_rules=("floor", "mase_int"),
        roles=("weights", "all"),
        text=text,
        windows=2,
        window=16,
        model=str(tiny_llama),
        dtype="float32",
    )


def run(study, out):
    return format_study.run(study, out, "mxlab compare mine.toml", device="cpu")


# ---- what is compared


def test_every_format_under_every_rule_it_can_have():
    study = FormatStudy(("fp4@16", "int4@32", "nvfp4"), ("floor", "rceil", "mase_int", "max"), ("kv",))
    assert [str(fmt) for fmt, _ in study.points()] == [
        "fp4_e2m1@16",
        "fp4_e2m1@16,scale_rule=rceil",
        "int4@32",
        "int4@32,scale_rule=rceil",
        "int4@32,scale_rule=mase_int,rounding=even",
        "fp4_e2m1@16,scale=e4m3",
    ]


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("weights", [{"weight"}, {"weight"}]),
        ("activations", [{"activation"}, {"activation"}]),
        ("kv", [{"k", "v"}]),
        ("all", [{"weight", "activation"}, {"weight", "activation"}, {"k", "v"}]),
    ],
)
def test_roles(role, expected):
    rules = format_study.recipe_of(mxlab.MXFormat("fp4"), role).rules
    assert [set(rule.formats) for rule in rules] == expected
    assert {rule.part for rule in rules} <= {"mlp", "attention"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"formats": ()}, "nothing to compare"),
        ({"formats": ("fp9",)}, "unknown element format"),
        ({"scale_rules": ("round",)}, "scale_rules is 'round'"),
        ({"roles": ("bias",)}, "roles is 'bias'"),
        ({"window": 1}, "window is 1"),
        ({"windows": 0}, "windows is 0"),
        ({"batch_size": "4"}, "batch_size is '4'"),
        ({"compare": 1}, "compare is 1"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"model": ""}, "model is ''"),
        ({"text": 5}, "text is 5"),
        ({"formats": "fp4"}, "formats is 'fp4': it must be a list of names, such as"),
        ({"roles": ("kv", 5)}, "roles is .*: it must be a list of names"),
    ],
)
def test_what_cannot_be_compared(change, message):
    with pytest.raises((SpecError, FormatError), match=message):
        FormatStudy(**{"formats": ("fp4",), **change})


def test_the_shipped_comparisons_load():
    assert len(list(format_study.load_study("formats").points())) == 4 * (5 * 6 + 2 * 7 + 2)
    assert format_study.load_study("whole_text").windows is None
    with pytest.raises(SpecError, match=r"no study 'format'.*did you mean 'formats'"):
        format_study.load_study("format")


def test_a_file_with_an_unknown_key(tmp_path):
    (tmp_path / "mine.toml").write_text('formats = ["fp4"]\nrule = "floor"\n', encoding="utf-8")
    with pytest.raises(SpecError, match=r"mine\.toml: unknown key 'rule'"):
        format_study.load_study(tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("windows = 4\n", r'mine\.toml: needs formats, such as formats = \["fp4_e2m1@32"\]'),
        ('formats = "fp4"\n', r"mine\.toml: formats is 'fp4'"),
        ('formats = ["fp4"]\nwindow = "wide"\n', r"mine\.toml: window is 'wide'"),
    ],
)
def test_files_that_lack_something(text, message, tmp_path):
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    with pytest.raises(SpecError, match=message):
        format_study.load_study(tmp_path / "mine.toml")


def test_a_dtype_of_torch(study):
    assert replace(study, dtype=torch.float32) == study


def test_a_refused_comparison_leaves_no_folder(study, tmp_path):
    for change in ({"model": str(tmp_path / "no-model")}, {"windows": 10_000}):
        with pytest.raises(MxlabError):
            run(replace(study, **change), tmp_path / "out")
        assert not (tmp_path / "out").exists()


# ---- rows


def test_rows_and_tables(study, tmp_path):
    out = tmp_path / "out"
    rows = run(study, out)
    assert [(row.format, row.role) for row in rows[:3]] == [
        ("unquantized", ""),
        ("fp4_e2m1@16", "weights"),
        ("fp4_e2m1@16", "all"),
    ]
    base, weights, everything = rows[:3]
    assert (base.kl_divergence, base.top1_agreement, base.tokens) == (0.0, 1.0, 30)
    assert everything.kl_divergence > weights.kl_divergence > 0
    assert weights.bits_per_parameter == everything.bits_per_parameter < base.bits_per_parameter == 32
    write_study(out)
    lines = list(csv.DictReader((out / "perplexity.csv").read_text(encoding="utf-8").splitlines()))
    assert (lines[0]["format"], lines[0]["all"]) == ("unquantized", f"{base.perplexity:.4g}")
    assert (lines[1]["format"], lines[1]["scale_rule"]) == ("fp4_e2m1@16", "floor")
    assert float(lines[1]["weights"]) == pytest.approx(weights.perplexity, rel=1e-3)
    assert (out / "perplexity.png").stat().st_size > 10_000


def test_a_row_is_the_model_converted_and_scored(study, tmp_path):
    import torch

    from mxlab.sources import models, texts

    rows = run(study, tmp_path / "out")
    loaded = models.load_model(study.model, "float32", "cpu")
    ids = texts.encode(loaded.tokenizer, texts.load_text(study.text, None))[:32].view(2, 16)
    mxlab.apply(loaded.model, format_study.recipe_of(mxlab.MXFormat("int8", 16), "all"))
    with torch.no_grad():
        logits = loaded.model(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    found = {(row.format, row.role): row.cross_entropy for row in rows}
    assert found["int8@16", "all"] == pytest.approx(expected.item(), rel=1e-6)


def test_finished_rows_are_kept_and_the_rest_is_made(study, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = run(study, out)
    lines = (out / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (out / "rows.jsonl").write_text("".join(lines[:3]), encoding="utf-8")
    made = []
    monkeypatch.setattr(
        format_study._Rows,
        "make",
        lambda self, fmt, role: made.append(role) or StudyRow(str(fmt), role, perplexity=1.0),
    )
    assert len(run(study, out)) == len(first)
    assert len(made) == len(first) - 3
    assert len((out / "env.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_a_failing_row_does_not_end_the_others_and_is_tried_again(study, tmp_path, monkeypatch):
    def failing(model, recipe, storage):
        if recipe.name.endswith("weights"):
            raise RuntimeError("no luck")
        return real(model, recipe, storage)

    real = scorer.apply
    monkeypatch.setattr(scorer, "apply", failing)
    rows = run(study, tmp_path / "out")
    assert {row.error for row in rows if row.role == "weights"} == {"RuntimeError: no luck"}
    assert not any(row.error for row in rows if row.role == "all")
    write_study(tmp_path / "out")
    monkeypatch.setattr(scorer, "apply", real)
    assert not any(row.error for row in run(study, tmp_path / "out"))


def test_another_comparison_in_the_folder_is_refused(study, tmp_path):
    run(study, tmp_path / "out")
    with pytest.raises(RunError, match="holds another comparison"):
        run(replace(study, windows=1), tmp_path / "out")


def test_a_line_that_is_no_row(study, tmp_path):
    run(study, tmp_path / "out")
    with (tmp_path / "out" / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"format": "fp4", "colour": "red"}) + "\n")
    with pytest.raises(RunError, match=r"rows\.jsonl, line \d+ is not a row"):
        run(study, tmp_path / "out")


def test_auto_is_recorded_as_what_it_means(study, tmp_path, monkeypatch):
    monkeypatch.setattr(format_study, "choose_dtype", lambda dtype, device: "float32" if dtype == "auto" else dtype)
    rows = run(replace(study, dtype="auto"), tmp_path / "out")
    recorded = json.loads((tmp_path / "out" / "study.json").read_text(encoding="utf-8"))
    assert recorded["dtype"] == "float32"
    assert len(run(replace(study, dtype="float32"), tmp_path / "out")) == len(rows)  # the same study
