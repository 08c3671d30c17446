"""``mxlab inspect``: where the loss comes from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from mxlab.cli.console import loading_libraries, print_line, print_table, progress
from mxlab.cli.help import shipped_names
from mxlab.cli.options import (
    DataDirOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelArgument,
    ReferenceOption,
    refuse_mx_specs,
)
from mxlab.compat.recipes import load_any_recipe
from mxlab.recipe.carried import recipe_of_model

if TYPE_CHECKING:
    from mxlab.report import document


def inspect(
    model: ModelArgument = "smollm2",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A shipped recipe's name, or a TOML file; ex1, or that of a quantized model, where none is given.",
            autocompletion=shipped_names("recipe"),
        ),
    ] = None,
    reference: ReferenceOption = None,
    text: Annotated[
        str, typer.Option(help="Calibration text: passages (embedded), wikitext2_valid, wikitext2, pile, or a file.")
    ] = "passages",
    data_dir: DataDirOption = None,
    windows: Annotated[int, typer.Option(help="Windows, from the beginning of the text.")] = 4,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the folder of this inspection goes.")] = Path(
        "results/inspect"
    ),
) -> None:
    """What a recipe does to every operand of a model, and which role, layer and projection is to blame for the loss.

    Of a model that was saved quantized, beside the one it was made from (--reference): what it still loses, and where.
    """
    refuse_mx_specs("mxlab inspect", "takes a recipe (--recipe)")
    chosen = load_any_recipe(recipe or recipe_of_model(model) or "ex1")
    with progress():
        with loading_libraries():
            from mxlab.eval.text import TextRequest
            from mxlab.inspect import tables
            from mxlab.inspect.parts import GROUPS
            from mxlab.inspect.run import run, run_remaining
            from mxlab.inspect.write import WORST

        request = TextRequest(
            recipe=chosen,
            model=model,
            text=text,
            window=window,
            windows=windows,
            dtype=dtype.value,
            device=device,
            data_dir=data_dir,
            reference=reference,
        )
        if reference is None:
            folder, inspection = run(request, out)
            shown = [
                tables.costs(inspection, "role"),
                tables.costliest(inspection, "layer", WORST),
                tables.costliest(inspection, "projection", WORST),
                tables.worst_operands(inspection, WORST),
            ]
        else:
            folder, found = run_remaining(request, out)
            shown = [*(tables.remainders(found, group) for group in GROUPS), tables.positions(found)]
    for table in shown:
        _show(table)
    print_line(f"written: {folder}")


def _show(table: document.Table) -> None:
    from mxlab.report.document import cell_text

    shown = Table(title=table.title, box=SIMPLE)
    for column in table.columns:
        shown.add_column(column.head, justify="left" if column.align == "left" else "right")
    for row in table.rows:
        shown.add_row(*(escape(cell_text(cell)) for cell in row))
    print_table(shown)
