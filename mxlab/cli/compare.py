"""``mxlab compare``: every format in every role on one text."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from mxlab.cli.console import console, loading_libraries, print_error, progress, start_logging
from mxlab.cli.help import shipped_names
from mxlab.cli.options import DataDirOption, DeviceOption, Dtype, given, refuse_mx_specs


def compare(
    file: Annotated[
        str, typer.Argument(help="A study's TOML file, or a shipped one.", autocompletion=shipped_names("study"))
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where its rows go; finished ones are kept.")],
    data_dir: DataDirOption = None,
    windows: Annotated[int | None, typer.Option(help="The first so many windows, instead of the file's.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Instead of the file's dtype; auto where it has none.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Score every format in every role on one text: a row each, with perplexity and KL divergence."""
    refuse_mx_specs("mxlab compare")
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    with progress():
        with loading_libraries():
            from mxlab.experiments import format_study
            from mxlab.report.format_study import write_study

        study = replace(format_study.load_study(file), **given(windows=windows, dtype=dtype and dtype.value))
        start_logging()
        rows = format_study.run(study, out, command, data_dir, device)
        write_study(out)
    table = Table("format", "role", "bits", "perplexity", "KL", "top-1", box=None)
    for row in rows:
        measured = (row.bits_per_parameter, row.perplexity, row.kl_divergence, row.top1_agreement)
        table.add_row(row.format, row.role, *("" if value is None else f"{value:.4g}" for value in measured))
    console.print(table)
    if failed := [row for row in rows if row.error]:
        print_error("failed:", f"{failed[0].error} ({len(failed)} rows)")
        raise typer.Exit(1)
