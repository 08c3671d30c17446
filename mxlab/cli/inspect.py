"""``mxlab inspect``: the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mxlab.cli.options import Dtype
from mxlab.compat.recipes import load_any_recipe
from mxlab.errors import SpecError
from mxlab.recipe.mx_specs import ENVIRONMENT_VARIABLE

if TYPE_CHECKING:
    from mxlab.report import document

console = Console()
stderr = Console(stderr=True)


def inspect(
    model: Annotated[str, typer.Argument(help="A hub name, a folder, or smollm2 (embedded).")] = "smollm2",
    recipe: Annotated[str, typer.Option(help="A shipped recipe's name, or a TOML file.")] = "ex1",
    text: Annotated[
        str, typer.Option(help="Calibration text: passages (embedded), wikitext2_valid, wikitext2, pile, or a file.")
    ] = "passages",
    data_dir: Annotated[
        Path | None, typer.Option(help="A folder with wikitext2_valid.txt, wikitext2_test.raw.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows, from the beginning of the text.")] = 4,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    dtype: Annotated[Dtype, typer.Option(help="What the model computes in.")] = Dtype.bfloat16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0, ...")] = "auto",
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the folder of this inspection goes.")] = Path(
        "results/inspect"
    ),
) -> None:
    """What a recipe does to every operand of a model, and which role, layer and projection is to blame for the loss."""
    if ENVIRONMENT_VARIABLE in os.environ:
        raise SpecError(f"{ENVIRONMENT_VARIABLE} is set, and mxlab inspect takes a recipe (--recipe): unset it first")
    chosen = load_any_recipe(recipe)
    from mxlab.eval.text import TextRequest
    from mxlab.inspect import files, run, tables

    request = TextRequest(
        recipe=chosen,
        model=model,
        text=text,
        window=window,
        windows=windows,
        dtype=dtype.value,
        device=device,
        data_dir=data_dir,
    )
    with _progress() as progress:
        folder, inspection = run.run(request, out, progress.track)
    _show(tables.costs(inspection, "role"))
    _show(tables.costliest(inspection, "layer", files.WORST))
    _show(tables.costliest(inspection, "projection", files.WORST))
    _show(tables.worst_operands(inspection, files.WORST))
    console.print(f"written: {folder}", soft_wrap=True)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=stderr)


def _show(table: document.Table) -> None:
    from mxlab.report.document import cell_text

    shown = Table(title=table.title, box=SIMPLE)
    for column in table.columns:
        shown.add_column(column.head, justify="left" if column.align == "left" else "right")
    for row in table.rows:
        shown.add_row(*(escape(cell_text(cell)) for cell in row))
    # A file or a pipe has no width: the table takes what it needs.
    (console if console.is_terminal else Console(width=240)).print(shown)
