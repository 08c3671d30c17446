"""Figures of the stages that sweep something else than block sizes: a row for each run, against the baseline."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mxlab.report.comparability import by_evaluation, compare_with_nearest
from mxlab.report.document import Image
from mxlab.report.figures import ACCURACY, PERPLEXITY, Quantity, panels
from mxlab.report.options import option_text, options_rank
from mxlab.report.read import Tree
from mxlab.report.run import BASELINE, Result
from mxlab.report.style import DPI, STYLE
from mxlab.report.tables import by_model, several_models, stage_title


def draw_comparisons(tree: Tree, folder: Path, number: int) -> dict[str, list[Image]]:
    """Draw one figure for each such stage, task and model; the first is Figure ``number``. Return them by stage."""
    images: dict[str, list[Image]] = {}
    for i, results in enumerate(_compared(tree), start=number):
        first = results[0]
        task = [first.task] if len(tree.tasks) > 1 else []
        model = several_models(tree, first)
        path = folder / f"{'_'.join([first.run.stage, 'compared', *task, *model]).replace('/', '_')}.png"
        with mpl.rc_context({**STYLE, "axes.grid.axis": "x"}):
            plot(results, tree.baselines, model).savefig(path, bbox_inches="tight")
        what = " and ".join(quantity.name for quantity in _quantities(results))
        title = f"Figure {i}: {stage_title(first.run.stage)}, {what}"
        evaluated = ", ".join([f"{first.task}, n = {first.n}", *model])
        caption = f"{evaluated}. Error bars: ± one standard error. The dashed line is the baseline."
        images.setdefault(first.run.stage, []).append(Image(path, title, caption))
    return images


def _compared(tree: Tree) -> Iterator[list[Result]]:
    """Yield the results of a stage, a model and a task: the largest group of one setting, if it is two or more."""
    for stage in tree.stages:
        if any(panels(stage, tree)):
            continue
        for swept in by_model(tree.swept(stage)):
            for task in dict.fromkeys(result.task for result in swept):
                results = max(by_evaluation([result for result in swept if result.task == task]), key=len)
                drawn = [result for result in results if _quantities([result])]
                if len(drawn) > 1:
                    yield sorted(drawn, key=lambda result: options_rank(result.run.options))


def _quantities(results: Sequence[Result]) -> list[Quantity]:
    """Return what there is to draw of some results: a text has no accuracy."""
    return [quantity for quantity in (ACCURACY, PERPLEXITY) if any(map(quantity.point, results))]


def plot(results: Sequence[Result], baselines: Sequence[Result], model: Sequence[str] = ()) -> Figure:
    """Plot accuracy and perplexity (logarithmic), as far as there are any, side by side: a row for each result."""
    quantities = _quantities(results)
    figure = Figure(figsize=(8.0, 1.5 + 0.38 * len(results)), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(quantities), sharey=True, squeeze=False)[0]
    for axes, quantity in zip(panels, quantities, strict=True):
        _draw(axes, quantity, results, baselines)
        if quantity is PERPLEXITY:
            axes.set_xscale("log")
    panels[0].set_yticks(range(len(results)), _labels(results))
    panels[0].set_ylim(len(results) - 0.4, -0.6)
    first = results[0]
    title = ", ".join([f"{stage_title(first.run.stage)}: {first.task}", f"n = {first.n}", *model])
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def _draw(axes: Axes, quantity: Quantity, results: Sequence[Result], baselines: Sequence[Result]) -> None:
    points = [(row, measured) for row, result in enumerate(results) if (measured := quantity.point(result))]
    axes.errorbar(
        [measured.value for _, measured in points],
        [row for row, _ in points],
        xerr=[measured.stderr or 0 for _, measured in points],
        linestyle="none",
        marker="o",
        color="#0b3c6f",
        capsize=3,
        elinewidth=0.9,
    )
    axes.set_xlabel(quantity.axis)
    comparison = compare_with_nearest(results[0], baselines)
    measured = quantity.point(comparison.baseline) if comparison and comparison.accuracy else None
    if measured:
        axes.axvline(measured.value, label=BASELINE, color="black", dashes=(6, 3), linewidth=1.1, zorder=1)


def _labels(results: Sequence[Result]) -> list[str]:
    """Return the options in which the results differ."""
    options = [dict(result.run.options or {}) for result in results]
    names = [
        name for name in dict.fromkeys(n for o in options for n in o) if len({str(o.get(name)) for o in options}) > 1
    ]
    return [", ".join(f"{n}={option_text(o[n])}" for n in names if o.get(n) is not None) or "runs" for o in options]
