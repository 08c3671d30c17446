"""``mxlab memory``: what a model takes in memory, as its formats say and as the system does."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mxlab.cli.console import loading_libraries, print_line, print_table, progress, start_logging
from mxlab.cli.options import Dtype, DtypeOption, JsonOption, ModelArgument, RecipesOption, SetOption, refuse_mx_specs
from mxlab.cli.recipes import chosen_recipes
from mxlab.cli.records import print_json

if TYPE_CHECKING:
    from mxlab.experiments.memory import Memory


def memory(
    model: ModelArgument,
    recipe: RecipesOption = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of the text that is kept in the cache.")] = 2048,
    set_: SetOption = None,
    dtype: DtypeOption = Dtype.auto,
    as_json: JsonOption = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A JSON file for the same.")] = None,
) -> None:
    """Measure weights, keys and values and activations of a packed model, from outside of its process."""
    refuse_mx_specs("memory")
    chosen = chosen_recipes(recipe, set_, model)
    start_logging()
    with progress():
        with loading_libraries():
            from mxlab.experiments.memory import measure

        found = [measure(model, one, tokens, dtype.value) for one in chosen]
    told = {"model": model, "dtype": dtype.value, "recipes": [asdict(one) for one in found]}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print_json(told)
        return
    for one in found:
        print_line(f"{one.recipe}, {one.tokens} tokens; megabytes")
        print_table(_table(one))


def _table(found: Memory) -> Table:
    table = Table(box=None)
    for head in ("", "theory", "stored", "resident", "peak"):
        table.add_column(head, justify="right" if head else "left")
    table.add_column("why they differ", overflow="fold")
    for line in found.lines:
        figures = (line.theory, line.stored, line.resident, line.peak)
        table.add_row(line.part, *("-" if n is None else f"{n / 1e6:.2f}" for n in figures), line.reason)
    return table
