"""The pictures of docs/formats.md: the values of each format, and what each quantizer makes of its input."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mxlab.formats import FormatFamily
from mxlab.numerics import quantize
from mxlab.report.style import DPI, SHAPES, STYLE

BLUE, ORANGE = SHAPES[0][0], SHAPES[1][0]
DRAWS = 2000  # of stochastic signs
WIDTH = 4000  # positions across a panel: more than it has dots


def save(figure: Figure, file: Path) -> None:
    """Write a figure, as small a file as PNG allows."""
    figure.savefig(file, pil_kwargs={"optimize": True})


def grids(formats: Mapping[str, Sequence[float]]) -> Figure:
    """A row for each format, a stroke for each value: as parts of the largest, and by the logarithm."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 0.9 + 0.24 * len(formats)), dpi=DPI, layout="constrained")
        linear, powers = figure.subplots(1, 2, sharey=True)
        parts = [np.array(values) / max(values) for values in formats.values()]
        _rows(linear, parts, "value / largest value")
        _rows(powers, [np.log2([v for v in values if v > 0]) for values in formats.values()], "log2 of the value")
        linear.set_yticks(range(len(formats)), list(formats))
        linear.set_ylim(len(formats) - 0.4, -0.6)
    return figure


def _rows(axes: Axes, rows: Sequence[np.ndarray], label: str) -> None:
    low, high = min(map(np.min, rows)), max(map(np.max, rows))
    for row, values in enumerate(rows):
        at = np.unique(np.round((values - low) / (high - low) * WIDTH))
        apart = np.median(np.diff(at)) / WIDTH * 240 if len(at) > 1 else 240  # points, of about 240 across a panel
        look = {"color": (BLUE, ORANGE)[row % 2], "linewidth": np.clip(apart / 3, 0.4, 1)}
        axes.vlines(low + at / WIDTH * (high - low), row - 0.33, row + 0.33, **look)
    axes.set_xlabel(label)
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def staircases(formats: Sequence[FormatFamily]) -> Figure:
    """A panel for each format: what goes in, and what comes out."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.9 * len(formats), 2.9), dpi=DPI, layout="constrained")
        for axes, fmt in zip(figure.subplots(1, len(formats), squeeze=False)[0], formats, strict=True):
            _staircase(axes, fmt)
    return figure


def _staircase(axes: Axes, fmt: FormatFamily) -> None:
    if "block_size" in {f.name for f in fields(fmt)}:
        fmt = replace(fmt, block_size=0)
    reach = 1.0 if fmt.shared_bits else 1.25 * quantize(torch.tensor([3e38]), fmt).item()
    x = torch.linspace(-reach, reach, 101 if fmt.is_random else 4001)
    y = quantize(x, fmt, seed=0)
    axes.plot(x, x, color="#999999", linewidth=0.8, dashes=(4, 3))
    if fmt.is_random:
        axes.plot(x, y, ".", color=BLUE, markersize=2)
        axes.plot(x, _mean(x, fmt), color=ORANGE)
    else:
        axes.step(x, y, where="mid", color=BLUE)
    axes.hlines(y.unique(), 1.06 * reach, 1.16 * reach, color=ORANGE, linewidth=0.8)
    axes.set_xlim(-1.05 * reach, 1.18 * reach)
    axes.set_title(str(fmt).replace("@0", "").replace(",", "\n", 1), fontsize=8)
    axes.set_xlabel("in")
    axes.set_ylabel("out")


def _mean(x: Tensor, fmt: FormatFamily) -> Tensor:
    """Of many draws."""
    return quantize(x.expand(DRAWS, -1), fmt, seed=0).mean(0)
