"""``mxlab generate``: what a model writes under a recipe, or under several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mxlab.cli.console import loading_libraries, print_line, print_table, progress, start_logging
from mxlab.cli.options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    RecipesOption,
    SetOption,
    Storage,
    StorageOption,
    refuse_mx_specs,
)
from mxlab.cli.recipes import chosen_recipes
from mxlab.cli.records import print_json

if TYPE_CHECKING:
    from mxlab.experiments.generation import Generation


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.", show_default=False)],
    recipe: RecipesOption = None,
    tokens: Annotated[int, typer.Option("--tokens", help="New tokens at most.")] = 64,
    set_: SetOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    storage: StorageOption = Storage.packed,
    as_json: JsonOption = False,
) -> None:
    """Generate text, greedily, and say how fast that was and what it took in memory."""
    refuse_mx_specs("generate")
    chosen = chosen_recipes(recipe, set_, model)
    start_logging()
    with progress(), loading_libraries():
        from mxlab.experiments.generation import Generator

    generator = Generator(model, prompt, tokens, dtype.value, device, storage.value)
    found = []
    for one in chosen:
        if not as_json:
            print_line(f"[{one.name}] {prompt}" if len(chosen) > 1 else prompt)
        found.append(generator.generate(one, _drop if as_json else _show))
        if not as_json:
            typer.echo("\n")
    if as_json:
        print_json([one.to_dict() for one in found])
        return
    print_table(_table(found))
    if len(found) > 1:
        from mxlab.experiments.generation import agreement

        print_line(f"the same tokens up to number {agreement(found)}")


def _show(text: str) -> None:
    typer.echo(text, nl=False)


def _drop(text: str) -> None:
    pass


def _table(found: list[Generation]) -> Table:
    """Return what generating took, a column for each recipe."""
    table = Table(box=None)
    table.add_column("")
    for one in found:
        table.add_column(one.recipe, justify="right")
    rows = {
        "tokens of the prompt": [str(one.prompt_tokens) for one in found],
        "new tokens": [str(len(one.tokens)) for one in found],
        "first token": [f"{one.first_token_s:.2f} s" for one in found],
        "tokens/s after it": [f"{one.tokens_per_second:.1f}" if one.tokens_per_second else "-" for one in found],
        "parameters": [_megabytes(one.weight_bytes) for one in found],
        "keys and values": [_megabytes(one.cache_bytes) for one in found],
        "memory at the end": [_megabytes(one.resident_bytes) for one in found],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e8 else f"{count / 1e6:.0f} MB"
