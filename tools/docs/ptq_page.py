"""Fill docs/ptq.md with the rows that record_ptq.py kept, and draw figs/ptq_steps.png and figs/ptq_lambada.png.

python tools/docs/ptq_page.py [--check]

The tables stand behind ``<!-- steps -->``, ``<!-- texts -->``, ``<!-- changes -->`` and ``<!-- tried -->``, up to
``<!-- end -->``. With --check nothing is written, and a page that is out of date is an error.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
from formats_page import table, write_or_check

from mxlab.report.style import DPI, SHAPES, STYLE

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "ptq.md"
FIGURE = ROOT / "figs" / "ptq_steps.png"
RESULTS = ROOT / "results" / "smollm2-135m" / "ptq"
ROWS, TRIED = RESULTS / "rows.jsonl", RESULTS / "tried.jsonl"
LAMBADA, LAMBADA_FIGURE = ROOT / "results" / "ptq_lambada", ROOT / "figs" / "ptq_lambada.png"
# Folders of runs on lambada_openai, by recipe, and what they show.
LAMBADA_RUNS = {
    "baseline": "unquantized",
    "ex2": "rounded\nto nearest",
    "ex2_gptq": "GPTQ",
    "ex2_reconstructed": "transforms,\nGPTQ,\nreconstruction",
    "ex2_best": "transforms,\nGPTQ,\ndistillation",
}
# By the plain recipe of each. What comes behind its name, and what was changed, tell the steps.
FORMATS = {"mxfp4_w4a4kv4": "MXFP4", "mxint4_w4a4kv4": "MXINT4", "nvfp4_w4a4kv4": "NVFP4", "ex2": "Exercise 2"}
STEPS = {
    ("", ""): "rounded to nearest",
    ("_gptq", ""): "GPTQ",
    ("_best", "without distillation"): "transforms, GPTQ",
    ("_best", ""): "transforms, GPTQ, distillation",
}
PLAIN = ("", "")
TEXT, OTHER_TEXT = "wikitext2", "passages"
WINDOW, SHORT_WINDOW = 2048, 512  # of the steps, and of the changes and the other text
# What try_ptq.py tried, by the name of the trial.
TRIALS = {
    "nothing": "nothing: transforms, GPTQ",
    "first_tokens": "K and V of the first {value} tokens unquantized",
    "pair_scale": "K divided by the size of each rotary pair to the power of {value}",
    "mean_of_values": "V quantized without its mean",
    "bias": "the mean of what each decoder layer has lost added to its output",
    "low_rank": "a product of rank {value} beside each weight, for {bits_more:.2f} bits a weight more",
    "permutation": "inputs of `down_proj` in an order that spreads the large ones over the blocks",
    "smoothing": "inputs behind the norms divided by their size to the power of {value}",
    "residual_rotation": "hidden states rotated between the layers (576), linear layers with transform {value}",
}


@dataclass(frozen=True)
class Step:
    """The rows of one recipe, one for each seed, on one text."""

    fmt: str
    step: tuple[str, str]
    rows: tuple[dict[str, Any], ...]

    def mean(self, name: str) -> float:
        """The mean over the seeds."""
        return mean(row[name] for row in self.rows)

    @property
    def spread(self) -> float | None:
        """The standard deviation of the cross entropy over the seeds; None for one."""
        return stdev(row["cross_entropy"] for row in self.rows) if len(self.rows) > 1 else None


def _rows(text: str, window: int) -> list[dict[str, Any]]:
    """Return the rows of a text in windows of that many tokens."""
    rows = (json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if (row["text"], row["window"]) == (text, window)]


def read(text: str = TEXT, window: int = WINDOW) -> tuple[float, list[Step]]:
    """Return the unquantized model's cross entropy on a text, and the steps of every format."""
    rows = _rows(text, window)
    [unquantized] = [row["cross_entropy"] for row in rows if row["recipe"] == "baseline"]
    steps = [
        Step(fmt, step, found)
        for fmt in FORMATS
        for step in STEPS
        if (found := tuple(r for r in rows if (r["recipe"], r["changes"]) == (fmt + step[0], step[1])))
    ]
    return unquantized, steps


HEADS = (
    "format", "step", "#perplexity", "#lost, nats", "#won back", "#KL divergence", "#top-1 agreement", "#bits a weight",
    "#minutes", "#peak memory, GiB", "seeds",
)  # fmt: skip

CHANGE_HEADS = (
    "recipe", "changed", "#perplexity", "#KL divergence", "#top-1 agreement", "#bits a weight",
)  # fmt: skip


def fill(page: str) -> str:
    """``page`` with its tables as the rows have them."""

    def filled(found: re.Match[str]) -> str:
        heads, lines = TABLES[found["name"]]
        return found[1] + table(heads, lines()) + found[3]

    sections = re.compile(rf"(<!-- (?P<name>{'|'.join(TABLES)}) -->\n).*?(<!-- end -->)", re.DOTALL)
    return sections.sub(filled, page)


def _changes() -> Iterator[Sequence[str]]:
    """Yield what recipes give with something changed, and without."""
    for row in _rows(TEXT, SHORT_WINDOW):
        bits = "-" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}"
        values = (f"{row['perplexity']:.2f}", f"{row['kl_divergence']:.3f}", f"{row['top1_agreement']:.1%}", bits)
        yield f"`{row['recipe']}`", row["changes"] or "-", *values


def _tried() -> Iterator[Sequence[str]]:
    """Yield what was tried, and what it gave."""
    for row in (json.loads(line) for line in TRIED.read_text(encoding="utf-8").splitlines()):
        yield TRIALS[row["trial"]].format(**row), f"{row['perplexity']:.2f}", f"{row['kl_divergence']:.3f}"


def _on_another_text() -> Iterator[Sequence[str]]:
    """Yield what the steps give on a text of another kind."""
    unquantized, steps = read(OTHER_TEXT, SHORT_WINDOW)
    plain = {step.fmt: step.mean("cross_entropy") - unquantized for step in steps if step.step == PLAIN}
    for step in steps:
        lost = step.mean("cross_entropy") - unquantized
        back = f"{1 - lost / plain[step.fmt]:.0%}" if step.step != PLAIN else "-"
        values = (f"{math.exp(step.mean('cross_entropy')):.2f}", f"{lost:.3f}", back)
        yield FORMATS[step.fmt], STEPS[step.step], *values, f"{step.mean('kl_divergence'):.3f}"


def _lines() -> Iterator[Sequence[str]]:
    unquantized, steps = read()
    plain = {step.fmt: step.mean("cross_entropy") - unquantized for step in steps if step.step == PLAIN}
    for step in steps:
        lost = step.mean("cross_entropy") - unquantized
        spread = f" ± {step.spread:.3f}" if step.spread is not None else ""
        yield (
            FORMATS[step.fmt],
            STEPS[step.step],
            f"{math.exp(step.mean('cross_entropy')):.2f}",
            f"{lost:.3f}{spread}",
            f"{1 - lost / plain[step.fmt]:.0%}" if step.step != PLAIN and step.fmt in plain else "-",
            f"{step.mean('kl_divergence'):.3f}",
            f"{step.mean('top1_agreement'):.1%}",
            f"{step.mean('bits_per_weight'):.2f}",
            f"{step.mean('seconds') / 60:.0f}" if "seconds" in step.rows[0] else "-",
            f"{step.mean('peak_memory_bytes') / 2**30:.1f}" if "peak_memory_bytes" in step.rows[0] else "-",
            ", ".join(str(row["seed"]) for row in step.rows) if step.step != PLAIN else "-",
        )


TABLES = {
    "steps": (HEADS, _lines),
    "texts": (("format", "step", "#perplexity", "#lost, nats", "#won back", "#KL divergence"), _on_another_text),
    "changes": (CHANGE_HEADS, _changes),
    "tried": (("tried", "#perplexity", "#KL divergence"), _tried),
}


def draw() -> None:
    """Draw the perplexity of every format after each step."""
    unquantized, steps = read()
    shown = [name for name in STEPS if any(step.step == name for step in steps)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.8))
        for (fmt, name), (colour, marker) in zip(FORMATS.items(), SHAPES, strict=False):
            if not (of := [step for step in steps if step.fmt == fmt]):
                continue
            places = [shown.index(step.step) for step in of]
            axes.plot(places, [math.exp(s.mean("cross_entropy")) for s in of], marker=marker, color=colour, label=name)
        axes.axhline(math.exp(unquantized), color="#555555", linestyle="--", label="unquantized")
        axes.set_yscale("log")
        ticks = [20, 25, 30, 40, 50, 75, 100, 150, 200]
        axes.set_yticks(ticks, [str(tick) for tick in ticks], minor=False)
        axes.minorticks_off()
        axes.set_xticks(range(len(shown)), [STEPS[name].replace(", ", ",\n") for name in shown])
        axes.margins(x=0.2)
        axes.set_ylabel("perplexity, WikiText-2")
        axes.legend()
        figure.tight_layout()
        figure.savefig(FIGURE, dpi=DPI)
        plt.close(figure)


def accuracy(recipe: str) -> tuple[float, float, int]:
    """Return the accuracy of the newest run under a recipe, its standard error, and how many rows it is of."""
    newest = max((LAMBADA / recipe).glob("*/metrics*.json"))
    found = json.loads(newest.read_text(encoding="utf-8"))["results"]["lambada_openai"]
    return found["acc,none"], found["acc_stderr,none"], found["sample_len"]


def draw_lambada() -> None:
    """Draw the accuracy that Exercise 2 leaves, and what each step wins back of it."""
    found = {label: accuracy(recipe) for recipe, label in LAMBADA_RUNS.items()}
    values = [accuracy for accuracy, _, _ in found.values()]
    lost = values[0] - values[1]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.6))
        colours = ["#888888", *(colour for colour, _ in SHAPES)]
        errors = [error for _, error, _ in found.values()]
        bars = axes.bar(list(found), values, yerr=errors, color=colours[: len(found)], capsize=4, width=0.6)
        axes.axhline(values[0], color="#555555", linestyle="--", linewidth=1)
        notes = [
            f"{v:.3f}" + (f"\n{1 - (values[0] - v) / lost:.0%} back" if i > 1 else "") for i, v in enumerate(values)
        ]
        axes.bar_label(bars, notes, padding=4, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axes.set_ylim(0, 1.25 * max(values))
        axes.set_ylabel("accuracy, lambada_openai")
        axes.set_title("SmolLM2-135M: MXFP4 weights and KV cache, MXFP6 activations", fontsize=10)
        figure.tight_layout()
        figure.savefig(LAMBADA_FIGURE, dpi=DPI)
        plt.close(figure)


if __name__ == "__main__" and write_or_check(PAGE, fill, sys.argv[1:]):
    draw()
    draw_lambada()
