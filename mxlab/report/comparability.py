"""Which results may be compared, and which are the same numbers."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mxlab.report.document import cell_text
from mxlab.report.options import Option, option_rank, option_text
from mxlab.report.run import Result, Run

Settings = dict[str, Callable[[Result], str | int | None]]

# What a result rests on besides its quantization. Where the evaluation settings differ, nothing can be compared; where
# only the measurement settings do, everything but speed can. A value that was not recorded differs from none.
EVALUATION: Settings = {
    "model": lambda result: result.run.model,
    "dtype": lambda result: result.run.dtype,
    "task": lambda result: result.task,
    "data": lambda result: result.data,
    "n": lambda result: result.n,
}
MEASUREMENT: Settings = {
    "tasks of the run": lambda result: ", ".join(result.run.tasks),
    "batch size": lambda result: result.run.batch_size,
    "device": lambda result: result.run.device,
}


@dataclass(frozen=True)
class Difference:
    """A setting in which a result differs from the baseline."""

    name: str
    value: str | int
    baseline: str | int

    @property
    def text(self) -> str:
        """The difference with both values."""
        return f"{self.name} {self.value} instead of {self.baseline}"


@dataclass(frozen=True)
class BaselineComparison:
    """A baseline, and in what a result differs from it."""

    baseline: Result
    differences: tuple[Difference, ...]

    @property
    def accuracy(self) -> bool:
        """Whether accuracy and perplexity may be compared."""
        return all(difference.name in MEASUREMENT for difference in self.differences)

    @property
    def speed(self) -> bool:
        """Whether times and examples/sec may be compared."""
        return not self.differences

    @property
    def verdict(self) -> str:
        """What may not be compared and why, in a few words; empty where all may."""
        if self.speed:
            return ""
        what = "speed" if self.accuracy else "speed and accuracy"
        return f"{what} not comparable with the baseline ({', '.join(d.name for d in self.differences)})"


def by_evaluation(results: Iterable[Result]) -> list[list[Result]]:
    """Results in groups without a difference in their evaluation settings: accuracies in a group can be compared.

    A result which did not record a setting fits into several groups, and goes to the largest.
    """
    groups: list[list[Result]] = []
    for result in sorted(results, key=_unrecorded):
        fitting = [group for group in groups if not any(_differences(result, other, EVALUATION) for other in group)]
        if fitting:
            max(fitting, key=len).append(result)
        else:
            groups.append([result])
    return groups


def _unrecorded(result: Result) -> int:
    return sum(read(result) is None for read in EVALUATION.values())


def compare_with_nearest(result: Result, baselines: Sequence[Result]) -> BaselineComparison | None:
    """Compare a result with the baseline nearest to it; None where there is none."""
    comparisons = [
        BaselineComparison(baseline, _differences(result, baseline, EVALUATION | MEASUREMENT)) for baseline in baselines
    ]
    return min(comparisons, key=lambda comparison: len(comparison.differences), default=None)


def _differences(result: Result, baseline: Result, settings: Settings) -> tuple[Difference, ...]:
    pairs = [(name, read(result), read(baseline)) for name, read in settings.items()]
    return tuple(
        Difference(name, ours, theirs)
        for name, ours, theirs in pairs
        if ours is not None and theirs is not None and ours != theirs
    )


def identical_groups(results: Iterable[Result]) -> list[list[Result]]:
    """Return the results of a stage, of one evaluation setting, with the same accuracy and perplexity to the last bit.

    Two or more each. NaN agrees with nothing, not even with NaN.
    """
    equal: defaultdict[tuple[object, ...], list[Result]] = defaultdict(list)
    for result in results:
        if (result.acc or result.ppl) and not result.nan_metrics:
            metrics = (result.acc and result.acc.value, result.ppl and result.ppl.value)
            equal[result.run.stage, *metrics].append(result)
    return [group for results in equal.values() for group in by_evaluation(results) if len(group) > 1]


def identity_sentence(group: Sequence[Result]) -> str:
    """Say which options make no difference in a group of identical results."""
    known = [result.run.options for result in group if result.run.options is not None]
    unknown = [result.run for result in group if result.run.options is None]
    if len(known) < 2:
        return f"{_names(result.run for result in group)} give identical numbers"
    names = dict.fromkeys(name for options in known for name in options)
    values = {name: sorted({options.get(name) for options in known}, key=option_rank) for name in names}
    differing = [f"{name} {_join(map(option_text, values[name]))}" for name in names if len(values[name]) > 1]
    shared = ", ".join(_shared(name, values[name][0]) for name in names if len(values[name]) == 1)
    subject = ", ".join(differing) or f"{len(known)} runs of the same options"
    also = f"; {_names(unknown)}, of unknown configuration, gives the same" if unknown else ""
    return f"{subject} give identical numbers{' for ' + shared if shared else ''}{also}"


def metrics_text(result: Result) -> str:
    """Return accuracy and perplexity in a sentence."""
    return f"acc {cell_text(result.acc)}, ppl {cell_text(result.ppl)}"


def _shared(name: str, value: Option) -> str:
    return f"{name}={option_text(value)}" if isinstance(value, bool) else f"{name} {option_text(value)}"


def _names(runs: Iterable[Run]) -> str:
    return _join(f"`{run.run_id}`" for run in runs)


def _join(words: Iterable[str]) -> str:
    *head, last = words
    return f"{', '.join(head)} and {last}" if head else last
