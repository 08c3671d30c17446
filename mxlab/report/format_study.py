"""Show a study of formats as CSV tables, one line for each format under each rule, and as a figure."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from mxlab.formats import MXFormat
from mxlab.report.study_rows import ROLES, UNQUANTIZED, StudyRow, read_rows
from mxlab.report.style import DPI, STYLE

_LEAST = 0.1  # percent: what is better, or nearer to the unquantized model, is drawn there
_MEASURES = ("perplexity", "kl_divergence", "top1_agreement")


def write_study(folder: Path) -> None:
    """Write ``perplexity.csv`` and its like, and ``perplexity.png``, from the rows of a study that have no error.

    Raises:
        RunError: a row that cannot be read.
    """
    good = [row for row in read_rows(folder) if not row.error]
    for measure in _MEASURES:
        if any(getattr(row, measure) is not None for row in good):
            _write_table(good, measure, folder / f"{measure}.csv")
    _draw(good, folder / "perplexity.png")


def _write_table(rows: Sequence[StudyRow], measure: str, file: Path) -> None:
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault(row.format, _named(row.format))
        line[row.role or "all"] = f"{getattr(row, measure):.4g}"
    roles = [role for role in ROLES if any(role in line for line in lines.values())]
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, ["format", "scale_rule", *roles], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines.values())


def _named(text: str) -> dict[str, str]:
    """Return the two columns that name a line: the format without its rule, and the rule."""
    if text == UNQUANTIZED:
        return {"format": text, "scale_rule": ""}
    fmt = MXFormat.parse(text)
    scale = "" if fmt.scale == "e8m0" else f" {fmt.scale}"
    return {"format": f"{fmt.element}@{fmt.block_size}{scale}", "scale_rule": fmt.scale_rule}


def _draw(rows: Sequence[StudyRow], file: Path) -> None:
    """Draw how much perplexity rises over the unquantized model: a panel for each role, a line for each format."""
    [base] = [row.perplexity or math.nan for row in rows if row.format == UNQUANTIZED]
    shown = [(_named(row.format), row.role, row.perplexity) for row in rows if row.role and row.perplexity]
    roles = [role for role in ROLES if any(role == r for _, r, _ in shown)]
    formats, rules = (list(dict.fromkeys(name[key] for name, _, _ in shown)) for key in ("format", "scale_rule"))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.6 * len(roles) + 1.6, 0.45 * len(formats) + 1.5), dpi=DPI, layout="constrained")
        panels = figure.subplots(1, len(roles), sharey=True, squeeze=False)[0]
        for panel, role in zip(panels, roles, strict=True):
            for rule in rules:
                points = [
                    (max(100 * (value / base - 1), _LEAST), formats.index(name["format"]) + _offset(rule, rules))
                    for name, r, value in shown
                    if (r, name["scale_rule"]) == (role, rule)
                ]
                panel.plot(*zip(*points, strict=True) if points else ((), ()), "o", ms=4, label=rule)
            panel.set(xscale="log", title=role, xlabel="perplexity, + %", yticks=range(len(formats)))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        panels[0].set_yticklabels(formats)
        panels[0].invert_yaxis()
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(rules))
        figure.savefig(file)


def _offset(rule: str, rules: Sequence[str]) -> float:
    """Return where a rule of one format stands: beside the others, not on them."""
    return (rules.index(rule) - (len(rules) - 1) / 2) * 0.1
