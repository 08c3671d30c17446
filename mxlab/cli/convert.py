"""``mxlab convert``: a converted model as a folder, or what a recipe would do to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mxlab.cli.console import loading_libraries, print_table, print_text, progress, start_logging
from mxlab.cli.options import Dtype, DtypeOption, ModelArgument, RecipeArgument, SetOption, Storage, StorageOption
from mxlab.cli.recipes import chosen_recipe
from mxlab.errors import SpecError

if TYPE_CHECKING:
    from mxlab.model.conversion import Conversion


def convert(
    model: ModelArgument,
    recipe: RecipeArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be quantized.")] = False,
    set_: SetOption = None,
    dtype: DtypeOption = Dtype.auto,
    storage: StorageOption = Storage.grid,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the converted model goes.")] = None,
) -> None:
    """Quantize a model's weights as a recipe says and save it, with recipe.toml and inventory.json."""
    if dry_run == (out is not None):
        raise SpecError("give --out FOLDER for the converted model, or --dry-run to see what a recipe does")
    chosen = chosen_recipe(recipe, set_ or [], model)
    if out is not None:
        start_logging()
    with progress():
        with loading_libraries():
            from mxlab.hf.checkpoint import save_converted
            from mxlab.model.apply import prepare
            from mxlab.sources.models import skeleton

        if out is None:
            conversion = prepare(skeleton(model, dtype.value), chosen)
        else:
            conversion = save_converted(model, chosen, dtype.value, out, storage.value)
    print_inventory(conversion)


def print_inventory(conversion: Conversion) -> None:
    """Print what is quantized and what is not, layers that are alike in one row, and what it comes to."""
    from mxlab.model.conversion import high_precision_rows, left_names, quantized_rows, totals

    table = Table(box=None)
    for head in ("module", "layers", "shape", "role", "format", "bits"):
        table.add_column(head, overflow="fold")  # names are for copying into a recipe: folded rather than cut
    for row in [*quantized_rows(conversion), *high_precision_rows(conversion)]:
        shape = " x ".join(map(str, row.shape)) or "-"
        table.add_row(*map(escape, (row.name, row.layers, shape, row.role, row.format, f"{row.bits:g}")))
    print_table(table)
    print_text(f"linear layers in high precision: {', '.join(left_names(conversion)) or 'none'}")
    for line in [*(f"note: {note}" for note in conversion.notes), *totals(conversion)]:
        print_text(line)
