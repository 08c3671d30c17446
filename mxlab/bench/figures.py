"""The figures: how much longer each contender takes than what it is compared with, beside its target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mxlab.bench.results import Document, instruction_set_of, make_folder
from mxlab.errors import SourceError
from mxlab.report.style import DPI, STYLE

# By contender: what the legend says, the colour and the marker. What is not named here is not drawn.
_LOOKS = {
    "exact": ("exact numerics", "#0b3c6f", "o"),
    "microxcaling": ("microxcaling numerics", "#d1660a", "s"),
    "mx package": ("microxcaling itself (mx)", "#555555", "D"),
}
_LOG_BEYOND = 8.0  # ratios on a logarithmic axis
_LOG_TICKS = (0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200)
_DASHES = (0, (4, 2))
_GREY = "#777777"
_ROW = 0.23  # inches
_LABELS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """One figure: of which benchmark, its file, title and axis, and what the label of a row says."""

    benchmark: str
    file: str
    title: str
    axis: str
    unit: str
    label: Callable[[Mapping[str, Any]], str]


CHARTS = (
    Chart(
        "quantize",
        "bench_quantize.png",
        "Quantizing a tensor",
        "Time, as a multiple of tensor.clone()",
        "a clone",
        lambda c: f"{c['shape'].replace('x', '×')}, {_short(c['dtype'])}, {c['format']}",
    ),
    Chart(
        "forward",
        "bench_forward.png",
        "Forward pass",
        "Time, as a multiple of the unquantized forward pass",
        "unquantized",
        lambda c: f"{c['recipe'].capitalize()}, {_short(c['dtype'])}, {c['attention']}",
    ),
)


def draw(documents: Mapping[str, Document], folder: Path) -> list[Path]:
    """Draw each figure that there are results for, a panel for each machine.

    Raises:
        SourceError: there are results for none.
    """
    make_folder(folder)
    paths = [path for chart in CHARTS if (path := _draw(chart, documents, folder))]
    if not paths:
        raise SourceError("there are no results of `mxlab bench quantize` or `mxlab bench forward` to draw")
    return paths


def _draw(chart: Chart, documents: Mapping[str, Document], folder: Path) -> Path | None:
    chosen = _chosen(chart.benchmark, documents)
    if not chosen:
        return None
    path = folder / chart.file
    with mpl.rc_context(STYLE):
        plot(chart, chosen).savefig(path)
    return path


def _chosen(benchmark: str, documents: Mapping[str, Document]) -> list[Document]:
    """Return those in the standard settings, or where there are none, all that have something to draw."""
    found = [d for d in documents.values() if d["benchmark"] == benchmark and _points(d)]
    return [d for d in found if d["standard"]] or found


def _points(document: Document) -> list[Row]:
    return [row for row in document["rows"] if row["ratio"] and row["contender"] in _LOOKS]


def plot(chart: Chart, documents: Sequence[Document]) -> Figure:
    """Draw a panel for each document, a line in it for each case."""
    counts = [len(_labels(chart, document)) for document in documents]
    height = 1.3 + sum(0.7 + _ROW * count for count in counts)
    figure = Figure(figsize=(7.6, height), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(documents), squeeze=False, height_ratios=counts)
    for axes, document in zip(panels[:, 0], documents, strict=True):
        _panel(axes, chart, document)
    panels[-1, 0].set_xlabel(chart.axis)
    contenders = {row["contender"] for document in documents for row in _points(document)}
    has_target = any(row["target"] for document in documents for row in _points(document))
    figure.legend(handles=_handles(chart, contenders, has_target), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _panel(axes: Axes, chart: Chart, document: Document) -> None:
    labels, rows = _labels(chart, document), _points(document)
    axes.axvline(1, color="black", linewidth=1.1, zorder=1)
    for row in rows:
        _point(axes, row, labels.index(chart.label(row["case"])))
    limits = _limits(chart, rows)
    for (label, limit), color in limits.items():
        place = labels.index(label)
        axes.vlines(limit, place - 0.5, place + 0.5, color=color, linestyle=_DASHES, linewidth=1.1, zorder=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)  # the first on top
    axes.grid(visible=False, axis="y")
    axes.set_title(_title(chart, document), loc="left", fontsize=9)
    ends = [end for row in rows for end in (row["ratio"]["q1"], row["ratio"]["q3"])]
    _scale(axes, [1.0, *ends, *(limit for _, limit in limits)])


def _limits(chart: Chart, rows: Sequence[Row]) -> dict[tuple[str, float], str]:
    """Return the colour of each target, by label and limit: a contender's own, or grey where several have the same."""
    found: dict[tuple[str, float], str] = {}
    for row in rows:
        if row["target"] and row["target"]["figure"] == "ratio":
            key = chart.label(row["case"]), row["target"]["limit"]
            found[key] = _GREY if key in found else _LOOKS[row["contender"]][1]
    return found


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Set the axis to reach from the smallest to the largest of the values."""
    low, high = min(values), max(values)
    if high <= _LOG_BEYOND:
        margin = 0.06 * (high - low)
        axes.set_xlim(low - margin, high + margin)
        return
    axes.set_xscale("log")
    axes.set_xlim(low * 0.9, high * 1.1)
    ticks = [tick for tick in _LOG_TICKS if low * 0.9 <= tick <= high * 1.1]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _point(axes: Axes, row: Row, place: int) -> None:
    _, color, marker = _LOOKS[row["contender"]]
    ratio = row["ratio"]
    # Beside each other, so that equal ones stay visible.
    y = place + 0.16 * (list(_LOOKS).index(row["contender"]) - 1)
    error = [[ratio["median"] - ratio["q1"]], [ratio["q3"] - ratio["median"]]]
    axes.errorbar(
        ratio["median"], y, xerr=error, color=color, marker=marker, markersize=5, elinewidth=1.2, linestyle="none"
    )


def _handles(chart: Chart, contenders: set[str], has_target: bool) -> list[Line2D]:
    found = [
        Line2D([], [], color=color, marker=marker, linestyle="none", label=label)
        for name, (label, color, marker) in _LOOKS.items()
        if name in contenders
    ]
    found.append(Line2D([], [], color="black", linewidth=1.1, label=chart.unit))
    if has_target:
        found.append(Line2D([], [], color=_GREY, linestyle=_DASHES, linewidth=1.1, label="target, at most"))
    return found


def _title(chart: Chart, document: Document) -> str:
    """Return what was measured, where, and how often."""
    settings = document["settings"]
    threads = "" if settings["device"].startswith("cuda") else f", {_count(settings['threads'], 'thread')}"
    measured = f"{chart.title}: {document['measured on']}{threads}"
    return f"{measured}\n{instruction_set_of(document)}\nmedians and quartiles of {settings['repeats']} rounds"


def _labels(chart: Chart, document: Document) -> list[str]:
    return list(dict.fromkeys(chart.label(row["case"]) for row in _points(document)))


def _short(dtype: str) -> str:
    return _LABELS.get(dtype, dtype)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
