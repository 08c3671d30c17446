"""The figures of an inspection: SQNR by layer, what each layer costs, the exponents that formats must hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from mxlab.formats import MXFormat
from mxlab.inspect.inspection import Inspection
from mxlab.inspect.operands import Operand
from mxlab.inspect.parts import OUTSIDE
from mxlab.inspect.sensitivity import Estimate
from mxlab.recipe.rule import ATTENTION_ROLES
from mxlab.report.document import Image
from mxlab.report.style import DPI, SHAPES, STYLE

_WIDTH = 7.6  # inches
_ROW = 0.22  # of a heat map, inches
_BELOW = 8  # binades shown below the smallest element
_MOST_TICKS = 16
_BLUE, _ORANGE = SHAPES[0][0], SHAPES[1][0]

# Of a heat map: what it shows, and the SQNR in dB by row and layer.
Panels = dict[str, dict[str, dict[str, float]]]


def draw(inspection: Inspection, folder: Path) -> list[Image]:
    """Draw every figure into ``folder``."""
    figures = (
        (sqnr, "sqnr.png", "SQNR by layer", "Dark is bad. White: nothing changed, or nothing is quantized there."),
        (
            layers,
            "layers.png",
            "What each layer costs",
            "Alone: only this layer is quantized, beyond the unquantized "
            "model. Saved: the whole recipe beyond the recipe without this layer. Bars without a height: not a number.",
        ),
        (
            exponents,
            "exponents.png",
            "Exponents",
            "Left: of the elements beside their block's scale; grey is what the "
            "element format holds, subnormals left of the line. Right: of the scales.",
        ),
    )
    images = []
    for plot, name, title, caption in figures:
        with mpl.rc_context(STYLE):
            plot(inspection).savefig(folder / name)
        images.append(Image(folder / name, title, caption))
    return images


def sqnr(inspection: Inspection) -> Figure:
    """Draw a heat map for each role of linear layers, and one for all roles of attentions."""
    panels = _sqnr_panels(inspection)
    columns = _layers(inspection)
    heights = [len(rows) + 1.6 for rows in panels.values()]
    figure = Figure(figsize=(_WIDTH, _ROW * sum(heights) + 0.5), dpi=DPI, layout="constrained")
    every = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
    for axes, (title, rows) in zip(every[:, 0], panels.items(), strict=True):
        _heat_map(axes, title, rows, columns)
    every[-1, 0].set_xlabel("Decoder layer")
    return figure


def _sqnr_panels(inspection: Inspection) -> Panels:
    found = inspection.by(lambda o: (_panel(o), _row(o), _layer(o)))
    panels: Panels = {}
    for (panel, row, layer), statistics in found.items():
        panels.setdefault(panel, {}).setdefault(row, {})[layer] = statistics.sqnr_db
    return panels


def _panel(operand: Operand) -> str:
    return "K, V and other operands of attentions" if operand.role in ATTENTION_ROLES else f"{operand.role}s"


def _row(operand: Operand) -> str:
    return operand.role if operand.role in ATTENTION_ROLES else operand.projection


def _layer(operand: Operand) -> str:
    return OUTSIDE if operand.layer is None else str(operand.layer)


def _layers(inspection: Inspection) -> list[str]:
    return sorted({_layer(o) for o in inspection.operands}, key=lambda name: (name == OUTSIDE, len(name), name))


def _heat_map(axes: Axes, title: str, rows: Mapping[str, Mapping[str, float]], columns: Sequence[str]) -> None:
    cells = [[_finite(row.get(column, math.nan)) for column in columns] for row in rows.values()]
    image = axes.imshow(cells, aspect="auto", interpolation="none", cmap="viridis")
    axes.grid(visible=False)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    _name_columns(axes, columns)
    axes.set_title(title.capitalize() if title.islower() else title, loc="left", fontsize=10)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.015, fraction=0.05)
    bar.set_label("SQNR (dB)", fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _name_columns(axes: Axes, columns: Sequence[str]) -> None:
    """Name every column where there is room, else every second, or fewer."""
    step = -(-len(columns) // _MOST_TICKS)
    places = [i for i, name in enumerate(columns) if i % step == 0 or name == OUTSIDE]
    axes.set_xticks(places, [columns[i] for i in places], fontsize=8)


def layers(inspection: Inspection) -> Figure:
    """Draw what each layer costs alone, and what leaving it out saves: KL divergence above, cross-entropy below."""
    parts = inspection.sensitivity.of("layer")
    figure = Figure(figsize=(_WIDTH, 4.6), dpi=DPI, layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    sides = (
        (-0.2, _BLUE, "alone: only this layer is quantized", [part.alone for part in parts]),
        (0.2, _ORANGE, "saved: by leaving out this layer", [part.saved for part in parts]),
    )
    for place, color, label, costs in sides:
        _bars(upper, [cost and cost.kl for cost in costs], place, color, label)
        _bars(lower, [cost and cost.cross_entropy for cost in costs], place, color, label)
    upper.set_ylabel("KL divergence (nats/token)")
    lower.set_ylabel("Cross-entropy (nats/token)")
    lower.set_xlabel("Decoder layer")
    _name_columns(lower, [part.name for part in parts])
    upper.set_title(f"Recipe {inspection.recipe.name}, bars: ± one standard error", loc="left", fontsize=10)
    upper.legend(frameon=False, ncols=2)
    return figure


def _bars(axes: Axes, estimates: Sequence[Estimate | None], place: float, color: str, label: str) -> None:
    axes.bar(
        [i + place for i in range(len(estimates))],
        [e.value if e else 0.0 for e in estimates],
        yerr=[e.stderr if e else 0.0 for e in estimates],
        width=0.38,
        color=color,
        label=label,
        error_kw={"elinewidth": 0.8, "ecolor": "#444444"},
    )
    axes.grid(visible=False, axis="x")


def exponents(inspection: Inspection) -> Figure:
    """Draw a row for each role and format: exponents of the elements beside their scale, and of the scales."""
    found = inspection.by(lambda o: (o.role, o.format))
    figure = Figure(figsize=(_WIDTH, 1.55 * len(found) + 0.5), dpi=DPI, layout="constrained")
    every = figure.subplots(len(found), 2, squeeze=False, width_ratios=(5, 3))
    for (left, right), ((role, fmt), statistics) in zip(every, found.items(), strict=True):
        is_scaled = bool(statistics.scales)
        _histogram(left, statistics.elements if is_scaled else statistics.values)
        _histogram(right, statistics.scales)
        if is_scaled:
            _mark_range(left, MXFormat.parse(fmt))
        left.set_title(f"{role}, {fmt}", loc="left", fontsize=9)
        left.set_ylabel("Elements")
        right.set_ylabel("Blocks")
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
    every[-1, 0].set_xlabel("floor(log2 |element / scale|)")
    every[-1, 1].set_xlabel("floor(log2 scale)")
    return figure


def _histogram(axes: Axes, counts: Mapping[int, int]) -> None:
    total = sum(counts.values())
    axes.bar(list(counts), [n / total for n in counts.values()], width=0.9, color=_BLUE)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(visible=False, axis="x")


def _mark_range(axes: Axes, fmt: MXFormat) -> None:
    """Mark what the elements can be but zero, and where their normal numbers begin."""
    element = fmt.element_format
    smallest = element.emin - element.mantissa_bits
    axes.axvspan(smallest - 0.5, element.emax + 0.5, color="#dddddd", zorder=0)
    axes.axvline(element.emin - 0.5, color="#777777", linewidth=1)
    axes.set_xlim(smallest - _BELOW - 0.5, element.emax + 1.5)
