"""The figures: accuracy and throughput against the block size, a line for each other option."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mxlab.report.comparability import by_evaluation, compare_with_nearest
from mxlab.report.document import Image, Measured
from mxlab.report.options import Option, option_rank, option_text
from mxlab.report.read import Tree
from mxlab.report.run import BASELINE, Result
from mxlab.report.style import DPI, SHAPES, STYLE
from mxlab.report.tables import by_model, several_models, stage_title

EXERCISES = ("ex1", "ex2")
DODGE = 0.07  # of the distance of two block sizes: identical series stand side by side, not on each other
MAX_DODGE = 0.7  # what all the series of a block size may take together

# scale_bits chooses the stroke and the fill, the other options the colour and the marker: grey prints keep them apart.
STROKES = (("-", True), ("--", False), (":", True), ("-.", False))

Series = tuple[tuple[str, Option], ...]


@dataclass(frozen=True)
class Quantity:
    """What is drawn upwards: its name in titles and file names, its axis, and where it is read."""

    name: str
    slug: str
    axis: str
    read: Callable[[Result], Measured | None]

    def point(self, result: Result) -> Measured | None:
        """Return what is drawn of a result: nothing where the quantity is missing or not a number."""
        measure = self.read(result)
        return None if measure is None or measure.is_nan else measure


ACCURACY = Quantity("accuracy", "acc", "Accuracy (fraction correct)", lambda result: result.acc)
PERPLEXITY = Quantity("perplexity", "ppl", "Perplexity", lambda result: result.ppl)
SPEED = Quantity(
    "examples/sec",
    "speed",
    "Throughput (examples/s)",
    lambda result: None if result.examples_per_s is None else Measured(result.examples_per_s, None),
)


@dataclass(frozen=True)
class Panel:
    """What one figure shows: results of one stage and one evaluation setting, and the baseline's value.

    ``obstacle`` says why there is a baseline which is not drawn, ``model`` is said where the tree holds several.
    """

    quantity: Quantity
    results: Sequence[Result]
    left_out: int
    baseline: Measured | None
    obstacle: str
    model: tuple[str, ...] = ()

    @property
    def sizes(self) -> list[Option]:
        """The block sizes of the sweep."""
        return sorted({_block_size(result) for result in self.results}, key=option_rank)

    @property
    def series(self) -> dict[Series, list[Result]]:
        """The results by their options besides the block size, each list in the order of the block size."""
        groups: defaultdict[Series, list[Result]] = defaultdict(list)
        for result in sorted(self.results, key=lambda result: option_rank(_block_size(result))):
            if self.quantity.point(result):
                groups[_other_options(result)].append(result)
        return dict(sorted(groups.items(), key=lambda item: _series_order(item[0])))


def draw_figures(tree: Tree, folder: Path) -> dict[str, list[Image]]:
    """Draw the figures of each sweep over block sizes, and return them by stage."""
    images: defaultdict[str, list[Image]] = defaultdict(list)
    every = (panel for stage in tree.stages for panel in panels(stage, tree))
    for number, panel in enumerate(every, start=1):
        first = panel.results[0]
        task = [first.task] if len(tree.tasks) > 1 and panel.quantity is not SPEED else []
        parts = [first.run.stage, panel.quantity.slug, "vs_blocksize", *task, *panel.model]
        path = folder / f"{'_'.join(parts).replace('/', '_')}.png"
        with mpl.rc_context(STYLE):
            plot(panel).savefig(path, bbox_inches="tight")  # a legend of long option names is wider than the figure
        images[first.run.stage].append(Image(path, *_words(panel, number)))
    return images


def panels(stage: str, tree: Tree) -> Iterator[Panel]:
    """Yield a stage's figures, if it sweeps block sizes: for each model the quality on each task, and the speed."""
    for results in by_model(tree.swept(stage)):
        yield from _panels_of_model([result for result in results if _block_size(result) is not None], tree)


def _panels_of_model(swept: Sequence[Result], tree: Tree) -> Iterator[Panel]:
    for task in dict.fromkeys(result.task for result in swept):
        results = [result for result in swept if result.task == task]
        groups = by_evaluation(results)
        quality = ACCURACY if any(map(ACCURACY.point, max(groups, key=len))) else PERPLEXITY
        yield from _panel(quality, groups, tree)
    runs = [result for result in swept if result.task == result.run.tasks[0]]
    tasks = dict.fromkeys(result.run.tasks for result in runs)
    alike = ([result for result in runs if result.run.tasks == names] for names in tasks)
    yield from _panel(SPEED, [group for results in alike for group in by_evaluation(results)], tree)


def _panel(quantity: Quantity, groups: Sequence[Sequence[Result]], tree: Tree) -> Iterator[Panel]:
    """Yield the largest of the groups, if there is something to draw."""
    chosen = max(groups, key=len, default=[])
    if not any(map(quantity.point, chosen)):
        return
    swept = len(set(map(_block_size, chosen))) > 1
    if swept or chosen[0].run.stage.rpartition("/")[2] in EXERCISES:
        baseline, obstacle = _baseline(quantity, chosen[0], tree.baselines)
        left_out = sum(map(len, groups)) - len(chosen)
        yield Panel(quantity, chosen, left_out, baseline, obstacle, several_models(tree, chosen[0]))


def _baseline(quantity: Quantity, result: Result, baselines: Sequence[Result]) -> tuple[Measured | None, str]:
    """Return the baseline's value, or why it is not drawn."""
    comparison = compare_with_nearest(result, baselines)
    if comparison is None:
        return None, ""
    if not (comparison.speed if quantity is SPEED else comparison.accuracy):
        return None, comparison.verdict
    measure = quantity.read(comparison.baseline)
    return (None, f"its {quantity.name} is not a number") if measure and measure.is_nan else (measure, "")


def plot(panel: Panel) -> Figure:
    """Draw a panel: a line for each series, the baseline across, the legend below."""
    figure = Figure(figsize=(6.4, 4.4), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for index in range(len(panel.series)):
        _draw_series(axes, panel, index)
    if panel.baseline:
        axes.axhline(panel.baseline.value, label=BASELINE, color="black", dashes=(6, 3), linewidth=1.1, zorder=1)
    _draw_axes(axes, panel)
    _draw_legend(figure, axes)
    return figure


def _draw_series(axes: Axes, panel: Panel, index: int) -> None:
    options, results = list(panel.series.items())[index]
    dodge = (index - (len(panel.series) - 1) / 2) * min(DODGE, MAX_DODGE / len(panel.series))
    measures = [measure for result in results if (measure := panel.quantity.point(result))]
    axes.errorbar(
        [panel.sizes.index(_block_size(result)) + dodge for result in results],
        [measure.value for measure in measures],
        yerr=None if panel.quantity is SPEED else [measure.stderr or 0 for measure in measures],
        label=", ".join(f"{name}={option_text(value)}" for name, value in options if value is not None) or "runs",
        capsize=3,
        elinewidth=0.9,
        **_look(options, panel.series),
    )


def _look(options: Series, every: Iterable[Series]) -> dict[str, Any]:
    """Return the line of a series, by its place among the scale_bits and among the other options of all series."""
    scales = list(dict.fromkeys(_split(series)[0] for series in every))
    others = list(dict.fromkeys(_split(series)[1] for series in every))
    scale, other = _split(options)
    line, filled = STROKES[scales.index(scale) % len(STROKES)]
    color, marker = SHAPES[others.index(other) % len(SHAPES)]
    fill = color if filled else "white"
    return {"linestyle": line, "color": color, "marker": marker, "markersize": 6.5, "markerfacecolor": fill}


def _draw_axes(axes: Axes, panel: Panel) -> None:
    # At equal distances, as the logarithms of 16, 32, 64 are, with room for the dodged series.
    axes.set_xticks(range(len(panel.sizes)), [option_text(size) for size in panel.sizes])
    axes.set_xlim(-0.4, len(panel.sizes) - 0.6)
    axes.grid(visible=False, axis="x")
    title = ", ".join([stage_title(panel.results[0].run.stage), _evaluated(panel), *panel.model])
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("Block size (elements per shared scale)")
    axes.set_ylabel(panel.quantity.axis)
    if panel.quantity is SPEED:
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])


def _draw_legend(figure: Figure, axes: Axes) -> None:
    entries = zip(*axes.get_legend_handles_labels(), strict=True)
    sweep_first = sorted(entries, key=lambda entry: entry[1] == BASELINE)
    handles, labels = zip(*sweep_first, strict=True)
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, handlelength=3.6)


def _words(panel: Panel, number: int) -> tuple[str, str]:
    """Return the title of a figure and its caption."""
    first = panel.results[0]
    title = f"Figure {number}: {stage_title(first.run.stage)} {panel.quantity.name} against block size"
    nan = sum(measure.is_nan for result in panel.results if (measure := panel.quantity.read(result)))
    sentences = [
        f"{', '.join([_evaluated(panel), *panel.model])}.",
        "" if panel.quantity is SPEED else "Error bars: ± one standard error.",
        "Series are drawn side by side, so that identical ones stay visible.",
        "The dashed line is the baseline." if panel.baseline else "",
        f"No baseline is drawn: {panel.obstacle}." if panel.obstacle else "",
        f"Not drawn, because not a number: {_count(nan)}." if nan else "",
        f"Not drawn, because evaluated in another setting: {_count(panel.left_out)}." if panel.left_out else "",
    ]
    return title, " ".join(filter(None, sentences))


def _evaluated(panel: Panel) -> str:
    """Return what was evaluated: a task, or all of a run where the speed is that of several."""
    first = panel.results[0]
    if panel.quantity is SPEED and len(first.run.tasks) > 1:
        return f"{len(first.run.tasks)} tasks"
    return first.task if first.n is None else f"{first.task}, n = {first.n}"


def _count(number: int) -> str:
    return f"{number} result" if number == 1 else f"{number} results"


def _block_size(result: Result) -> Option:
    return (result.run.options or {}).get("block_size")


def _other_options(result: Result) -> Series:
    options = result.run.options or {}
    return tuple((name, value) for name, value in options.items() if name != "block_size")


def _series_order(options: Series) -> tuple[object, ...]:
    """Side by side the series which differ in scale_bits alone: those are the ones that coincide."""
    scale, others = _split(options)
    return *(option_rank(value) for _, value in others), option_rank(scale)


def _split(options: Series) -> tuple[Option, Series]:
    return dict(options).get("scale_bits"), tuple(item for item in options if item[0] != "scale_bits")
