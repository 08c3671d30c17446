"""``mxlab report``: tables, figures and a page from run directories."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mxlab.cli.console import print_line, progress


def report(
    results_dir: Annotated[Path, typer.Argument(help="A results folder: ours, or one of the published layout.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the report goes.")] = Path("report"),
) -> None:
    """Make tables, figures and one HTML page from run directories."""
    from mxlab.progress import Steps
    from mxlab.report import write_report

    with progress(), Steps("report"):
        paths = write_report(results_dir, out)
    print_line(f"report: {paths.markdown} and {paths.page}")
