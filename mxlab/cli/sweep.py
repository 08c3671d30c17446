"""``mxlab sweep``: a grid of evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from mxlab import rundir
from mxlab.cli.console import loading_libraries, print_error, print_line, print_table, progress, start_logging
from mxlab.cli.help import shipped_names
from mxlab.cli.options import (
    BosOption,
    CompareOption,
    DataDirOption,
    Dtype,
    JsonOption,
    LimitOption,
    OutOption,
    StrideOption,
    WindowOption,
    WindowsOption,
    given,
    refuse_mx_specs,
    row_limit,
    task_names,
    text_settings,
)
from mxlab.cli.records import print_json, read_records, results_alone

if TYPE_CHECKING:
    from mxlab.experiments.engines.local import PointResult, Summary

_sweeps = shipped_names("sweep")


def sweep(
    file: Annotated[
        str,
        typer.Argument(help="A sweep's TOML file (docs/sweeps.md), or a shipped one.", autocompletion=_sweeps),
    ],
    model: Annotated[str | None, typer.Option(help="Instead of the file's model.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Instead of the file's tasks or text.")] = None,
    text: Annotated[str | None, typer.Option(help="Instead of the file's text or tasks.")] = None,
    limit: LimitOption = None,
    window: WindowOption = None,
    stride: StrideOption = None,
    windows: WindowsOption = None,
    compare: CompareOption = False,
    bos: BosOption = False,
    batch_size: Annotated[int | None, typer.Option(help="Instead of the file's batch size.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Instead of the file's dtype; auto where it has none.")] = None,
    device: Annotated[str | None, typer.Option(help="Instead of the file's device.")] = None,
    data_dir: DataDirOption = None,
    workers: Annotated[int, typer.Option(help="Processes, each with a GPU of its own.")] = 1,
    as_json: JsonOption = False,
    out: OutOption = Path("results"),
) -> None:
    """Run a grid of recipes; finished runs are skipped, a failed one is recorded (exit code 1) and the rest goes on."""
    refuse_mx_specs("mxlab sweep")
    settings = given(
        model=model,
        tasks=task_names(tasks),
        limit=row_limit(limit),
        batch_size=batch_size,
        dtype=dtype and dtype.value,
        device=device,
    ) | text_settings(text, window, stride, windows, compare, bos)
    with results_alone(as_json), progress():
        with loading_libraries():
            from mxlab.experiments.sweep import load_sweep, run_sweep, with_settings

        chosen = with_settings(load_sweep(file), settings)
        start_logging()
        summary = run_sweep(chosen, out, data_dir, workers)
    if as_json:
        print_json(_as_record(summary))
        exit_where_failed(summary)
    else:
        finish(summary, out)


def finish(summary: Summary, out: Path) -> None:
    """Print how each run ended and what it measured; exit with 1 where one failed."""
    if summary.results:
        print_table(results_table(summary.results))
    print_line(f"{summary}; results in {out}")
    exit_where_failed(summary)


def exit_where_failed(summary: Summary) -> None:
    """Where a run failed, say on standard error where that is recorded, and exit with 1."""
    if summary.failed:
        folders = dict.fromkeys(result.point.stage_folder for result in _failed(summary))
        print_error("failed runs:", f"see {' and '.join(str(folder / rundir.FAILURES) for folder in folders)}")
        raise typer.Exit(1)


def _failed(summary: Summary) -> list[PointResult]:
    return [result for result in summary.results if result.status == "failed"]


def _as_record(summary: Summary) -> dict[str, Any]:
    failed = [f"{result.point.stage_folder}, {result.point.name}: {result.error}" for result in _failed(summary)]
    return {"runs": read_records(result.folder for result in summary.results if result.folder), "failed": failed}


def results_table(results: tuple[PointResult, ...]) -> Table:
    """Return a table with a row for each run: what was varied, its metrics, its seconds, and how it ended."""
    rows = [(result, _metrics(result)) for result in results]
    options = list(dict.fromkeys(name for result in results for name in result.point.values))
    metrics = list(dict.fromkeys(name for _, found in rows for name in found))
    table = Table(*map(escape, ["stage", *options, *metrics, "status"]), box=SIMPLE)
    for result, found in rows:
        varied = [str(result.point.values.get(name, "")) for name in options]
        measured = [found.get(name, "") for name in metrics]
        ending = {"made": "finished", "found": "skipped", "failed": f"failed: {result.error}"}[result.status]
        table.add_row(*map(escape, [result.point.stage_folder.name, *varied, *measured, ending]))
    return table


def _metrics(result: PointResult) -> dict[str, str]:
    """Return the metrics of a run by name, with standard errors; the task before the name where there are several."""
    if result.folder is None:
        return {}
    found = rundir.metrics(result.folder)
    has_one_task = len({metric.task for metric in found}) == 1
    named = {
        metric.name if has_one_task else f"{metric.task} {metric.name}": metric.value_text
        if metric.stderr is None
        else f"{metric.value_text} ± {metric.stderr_text}"
        for metric in found
    }
    seconds = rundir.seconds(result.folder)
    return named if seconds is None else {**named, "seconds": f"{seconds:.1f}"}
