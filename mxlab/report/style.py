"""The style that all figures share."""

from typing import Any

DPI = 200
# Colours and markers, in the order in which they are used; grey prints keep them apart by the marker.
SHAPES = (("#0b3c6f", "o"), ("#d1660a", "s"), ("#2e7d4f", "^"), ("#8e3b8a", "D"), ("#555555", "v"))

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "legend.fontsize": 9,
}
