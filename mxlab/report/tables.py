"""The tables of the report."""

import math
import re
from collections.abc import Callable, Mapping, Sequence

from mxlab.report.comparability import by_evaluation, compare_with_nearest
from mxlab.report.document import Cell, Column, Table
from mxlab.report.options import SWEPT, brief, further_options, option_text
from mxlab.report.read import Tree
from mxlab.report.run import Result, Run

CONFIG = Column("Config", "left")
STAGE = Column("stage", "left")
RUN_ID = Column("run_id", "left")
TASK = Column("task", "left")
N = Column("n")
NOTES = Column("Notes", "left")
NO_N = "n not recorded"
MODEL = Column("model", "left")
# Of each measured quantity: its column, and where it is read. One that no result of a table has is left out.
MEASURED = (
    (Column("acc", measured=True), lambda result: result.acc),
    (Column("ppl", measured=True), lambda result: result.ppl),
    (Column("KL (nats)", measured=True), lambda result: result.kl),
    (Column("top-1 agreement", measured=True), lambda result: result.agreement),
    (Column("eval_time_s"), lambda result: result.eval_time_s),
    (Column("examples/sec"), lambda result: result.examples_per_s),
)
Measures = Sequence[tuple[Column, Callable[[Result], Cell]]]
_ALWAYS = ("eval_time_s", "examples/sec")


def stage_title(stage: str) -> str:
    """Return a stage as a table names it: ``ex1`` is Ex1, ``baseline`` is Baseline, others keep their folder's name."""
    return stage.capitalize() if re.fullmatch(r"ex\d+|baseline", stage) else stage


def by_model(results: Sequence[Result]) -> list[list[Result]]:
    """Return the results of each model together; those that did not record theirs are of a model of their own."""
    groups: dict[str | None, list[Result]] = {}
    for result in results:
        groups.setdefault(result.run.model, []).append(result)
    return list(groups.values())


def several_models(tree: Tree, result: Result) -> tuple[str, ...]:
    """Return the model of a result, where the tree holds several; nothing where it need not be said."""
    several = len({other.run.model for other in tree.results}) > 1
    return ((result.run.model or "unknown model").rpartition("/")[2],) if several else ()


def headline_table(tree: Tree, number: str) -> Table:
    """List the baseline, then the best accuracy and the best speed of each stage; its only run where recipes were
    evaluated one by one.

    Results of different evaluation settings (n, task, model, ...) do not compete: a stage has two rows for each.
    """
    tasks, models, measures = _task_column(tree), _model_column(tree), _measures(tree.results)
    single = single_runs(tree)
    rows = [
        (
            label,
            *(result.run.model for _ in models),
            *(result.task for _ in tasks),
            *_values(result, measures),
            _notes(result, tree),
        )
        for stage in tree.stages
        for label, result in (
            [(stage_title(stage), result) for result in tree.of_stage(stage)]
            if stage in single
            else _best_of_stage(tree.of_stage(stage))
        )
    ]
    title = f"Table {number}: Headline results (baseline, and the best of each stage)"
    columns = (CONFIG, *models, *tasks, *_columns(measures), NOTES)
    return Table(f"table_{number}_headline", title, columns, tuple(rows))


def single_runs(tree: Tree) -> list[str]:
    """Return the stages of one run each, recipes that were evaluated one by one; none where it is only one stage."""
    runs = {stage: {result.run.folder for result in tree.swept(stage)} for stage in tree.stages}
    single = [stage for stage, folders in runs.items() if len(folders) == 1 and not re.fullmatch(r"ex\d+", stage)]
    return single if len(single) > 1 else []


def single_runs_table(tree: Tree, stages: Sequence[str], number: str) -> Table:
    """List the baselines and the runs of these stages, to be compared with each other."""
    results = [*tree.baselines, *(result for stage in stages for result in tree.swept(stage))]
    tasks, models, measures = _task_column(tree), _model_column(tree), _measures(results)
    rows = [
        (
            stage_title(result.run.stage),
            *(result.run.model for _ in models),
            *(result.task for _ in tasks),
            *_values(result, measures),
            result.n,
            result.run.run_id,
        )
        for result in results
    ]
    columns = (Column("recipe", "left"), *models, *tasks, *_columns(measures), N, RUN_ID)
    return Table(f"table_{number.replace('.', '_')}_recipes", f"Table {number}: Recipes compared", columns, tuple(rows))


def sweep_tables(tree: Tree, stage: str, number: str) -> list[Table]:
    """Return a table for each model of a stage: every run whose configuration is known, in the order of the options."""
    known = [result for result in tree.swept(stage) if result.run.options is not None]
    groups = by_model(known)
    letters = [""] if len(groups) == 1 else [chr(ord("a") + i) for i in range(len(groups))]
    return [_sweep_table(tree, stage, f"{number}{x}", results) for x, results in zip(letters, groups, strict=False)]


def _sweep_table(tree: Tree, stage: str, number: str, results: Sequence[Result]) -> Table:
    names = (*SWEPT, *further_options(result.run.options or {} for result in results))
    tasks = _task_column(tree)
    sizes = _n_column(results)
    notes = _notes_column(results)
    measures = _measures(results)
    rows = [
        (
            *_option_cells(result.run, names),
            *(result.task for _ in tasks),
            *_values(result, measures),
            *(result.n for _ in sizes),
            result.run.run_id,
            *(_sweep_remarks(result) for _ in notes),
        )
        for result in results
    ]
    options = (Column(name, "center" if name == "custom_cuda" else "right") for name in names)
    title = f"Table {number}: {', '.join([_sweep_title(stage), *several_models(tree, results[0])])}"
    slug = f"table_{number.replace('.', '_')}_{stage.replace('/', '_')}"
    return Table(slug, title, (*options, *tasks, *_columns(measures), *sizes, RUN_ID, *notes), tuple(rows))


def unknown_table(tree: Tree, number: str) -> Table | None:
    """List the runs whose configuration neither run.json nor the folder's name tells; None where there is none."""
    results = [result for result in tree.results if result.run.options is None and not result.run.is_baseline]
    tasks = _task_column(tree)
    notes = _notes_column(results)
    measures = _measures(results)
    rows = [
        (
            result.run.stage,
            *(result.task for _ in tasks),
            *_values(result, measures),
            result.n,
            result.run.run_id,
            *(_sweep_remarks(result) for _ in notes),
        )
        for result in results
    ]
    columns = (STAGE, *tasks, *_columns(measures), N, RUN_ID, *notes)
    title = f"Table {number}: Runs of unknown configuration"
    return Table(f"table_{number}_unknown_configuration", title, columns, tuple(rows)) if rows else None


def clamps_table(tree: Tree, number: str) -> Table | None:
    """Count how often the shared scale was clamped, for each run and role; None where no run recorded it."""
    rows = [
        (run.stage, run.run_id, role, counts["blocks"], counts["clamped"], _percent(counts), counts["overflowed"])
        for run in tree.runs
        for role, counts in run.clamps.items()
    ]
    counted = (Column("blocks"), Column("clamped"), Column("clamped %"), Column("overflowed"))
    columns = (STAGE, RUN_ID, Column("role", "left"), *counted)
    title = f"Table {number}: Clamped shared scales"
    return Table(f"table_{number}_scale_clamps", title, columns, tuple(rows)) if rows else None


def failures_table(tree: Tree, number: str) -> Table | None:
    """List the runs that a sweep could not finish, from failures.jsonl; None where there is none."""
    rows = tuple((failure.folder, failure.label, failure.error, failure.time) for failure in tree.failures)
    columns = tuple(Column(name, "left") for name in ("folder", "label", "error", "time"))
    title = f"Table {number}: Failures of sweeps"
    return Table(f"table_{number}_failures", title, columns, rows) if rows else None


def _best_of_stage(results: Sequence[Result]) -> list[tuple[str, Result]]:
    """Return the headline rows of a stage with their labels."""
    baselines = [(stage_title(result.run.stage), result) for result in results if result.run.is_baseline]
    groups = by_evaluation(result for result in results if not result.run.is_baseline)
    return [*baselines, *(row for group in sorted(groups, key=_limited) for row in _best(group))]


def _best(group: Sequence[Result]) -> list[tuple[str, Result]]:
    """Return the most accurate result and the fastest; no row where none has such a figure."""
    stage, limited = stage_title(group[0].run.stage), ", limited" if _limited(group) else ""
    rated = [result for result in group if _goodness(result) > -math.inf]
    rows: list[tuple[str, Result]] = []
    if rated:
        best = max(rated, key=lambda result: (_eligibility(result), _goodness(result), -result.eval_time_s))
        rows.append((f"{stage} best ({'accuracy' if best.acc else 'perplexity'}{limited})", best))
    timed = [result for result in group if result.examples_per_s is not None]
    if timed:
        fastest = max(timed, key=lambda result: (_eligibility(result), result.examples_per_s or 0))
        rows.append((f"{stage} best (speed{limited})", fastest))
    return rows


def _eligibility(result: Result) -> tuple[bool, bool]:
    """Return what goes before every measure: a broken run wins only where there is no other.

    So does a run of unknown configuration, as its row could not say what won.
    """
    return not result.nan_metrics, result.run.options is not None


def _goodness(result: Result) -> float:
    """Return accuracy, or else perplexity turned round; a missing one and NaN lose."""
    goodness = result.acc.value if result.acc else -result.ppl.value if result.ppl else -math.inf
    return -math.inf if math.isnan(goodness) else goodness


def _limited(group: Sequence[Result]) -> bool:
    return any(result.limited for result in group)


def _notes(result: Result, tree: Tree) -> str:
    size = f"limited eval (`n={result.n}`)" if result.limited else "Full eval"
    if result.n is None or result.n_original is None:
        size = NO_N
    if result.run.is_baseline:
        several = len({baseline.run.folder for baseline in tree.baselines}) > 1
        notes = [size, f"run `{result.run.run_id}`" if several else ""]
    else:
        comparison = compare_with_nearest(result, tree.baselines)
        notes = [size, brief(result.run.options), comparison.verdict if comparison else ""]
    return "; ".join(filter(None, (*notes, *_remarks(result))))


def _remarks(result: Result) -> list[str]:
    """Return what is wrong with a result."""
    broken = f"{' and '.join(result.nan_metrics)} not a number" if result.nan_metrics else ""
    misplaced = "quantized, so no baseline" if result.run.in_baseline_stage and result.run.quantized else ""
    return list(filter(None, (broken, misplaced)))


def _sweep_remarks(result: Result) -> str:
    """Return the remarks where no other note says that n is missing."""
    return "; ".join([*([NO_N] if result.examples_per_s is None else []), *_remarks(result)])


def _notes_column(results: Sequence[Result]) -> tuple[Column, ...]:
    """Return the column of remarks, where there are any."""
    return (NOTES,) if any(map(_sweep_remarks, results)) else ()


def _measures(results: Sequence[Result]) -> Measures:
    """Return the measured quantities that some result has, and the times."""
    return [
        (column, read)
        for column, read in MEASURED
        if column.head in _ALWAYS or any(read(result) is not None for result in results)
    ]


def _columns(measures: Measures) -> list[Column]:
    return [column for column, _ in measures]


def _values(result: Result, measures: Measures) -> list[Cell]:
    return [read(result) for _, read in measures]


def _model_column(tree: Tree) -> tuple[Column, ...]:
    return (MODEL,) if len({result.run.model for result in tree.results}) > 1 else ()


def _task_column(tree: Tree) -> tuple[Column, ...]:
    return (TASK,) if len(tree.tasks) > 1 else ()


def _n_column(results: Sequence[Result]) -> tuple[Column, ...]:
    """Return the column of n; none where every run recorded it and a task has one n."""
    tasks = {result.task for result in results}
    differ = len({(result.task, result.n) for result in results}) > len(tasks)
    return (N,) if differ or any(result.examples_per_s is None for result in results) else ()


def _option_cells(run: Run, names: Sequence[str]) -> list[str | None]:
    values = [(run.options or {}).get(name) for name in names]
    return [None if value is None else option_text(value) for value in values]


def _sweep_title(stage: str) -> str:
    exercise = re.fullmatch(r"ex(\d+)", stage)
    return f"Exercise {exercise[1]} sweep results" if exercise else f"{stage} results"


def _percent(counts: Mapping[str, int]) -> float | None:
    return 100 * counts["clamped"] / counts["blocks"] if counts["blocks"] else None
