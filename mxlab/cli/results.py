"""``mxlab results``: what run directories hold, as a table or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from mxlab import rundir
from mxlab.cli.console import print_error, print_table
from mxlab.cli.options import JsonOption
from mxlab.cli.records import print_json, record
from mxlab.report.options import brief
from mxlab.report.read import read_tree
from mxlab.report.run import Run

_HEADS = ("stage", "recipe", "model", "dtype", "options", "task", "rows", "metric", "value", "stderr")


def results(
    folder: Annotated[
        Path, typer.Argument(help="A results folder, a stage's or one run's: ours, or one of the published layout.")
    ] = Path("results"),
    as_json: JsonOption = False,
) -> None:
    """Print the metrics of all runs below a folder."""
    tree = read_tree(folder)
    incomplete = [f"{found.folder}: {found.why}" for found in tree.incomplete]
    failed = [f"{failure.folder}, {failure.label}: {failure.error}" for failure in tree.failures]
    if as_json:
        print_json({"runs": [record(run) for run in tree.runs], "incomplete": incomplete, "failed": failed})
        return
    print_table(_table(tree.runs))
    for line in incomplete:
        print_error("incomplete:", line)
    for line in failed:
        print_error("failed:", line)


def _table(runs: list[Run]) -> Table:
    table = Table(box=SIMPLE)
    for head in _HEADS:
        table.add_column(head, overflow="fold")
    for run in runs:
        found = record(run)
        named = [str(found[head] or "") for head in ("stage", "recipe", "model", "dtype")]
        for metric in rundir.metrics(run.folder):
            rows = str(found["rows"].get(metric.task, ""))
            measured = [metric.task, rows, metric.name, metric.value_text, metric.stderr_text]
            table.add_row(*map(escape, [*named, brief(run.options), *measured]))
    return table
