"""``mxlab export``: a quantized model for other tools."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mxlab.cli.console import loading_libraries, print_line, progress, start_logging
from mxlab.cli.options import Dtype, DtypeOption, ModelArgument, SetOption
from mxlab.cli.recipes import chosen_recipe


class Target(StrEnum):
    """What a model can be exported to."""

    compressed_tensors = "compressed-tensors"
    gguf = "gguf"


def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the exported model goes.")],
    to: Annotated[Target, typer.Option("--to", help="The layout: of vLLM, or of llama.cpp.")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="A shipped recipe's name, or a TOML file; else the model's own.")
    ] = None,
    set_: SetOption = None,
    dtype: DtypeOption = Dtype.auto,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Leave out what the recipe has beside weights.")
    ] = False,
) -> None:
    """Write a model with its weights in the bits of their format, as another tool reads them.

    What the other tool cannot express is an error that names it.
    """
    chosen = chosen_recipe(recipe, set_ or [], model)
    start_logging()
    with progress():
        with loading_libraries():
            from mxlab.hf import compressed_tensors, gguf_export

        exporter = {Target.compressed_tensors: compressed_tensors, Target.gguf: gguf_export}[to]
        exporter.export(model, chosen, dtype.value, out, weights_only)
    print_line(f"written: {out} ({to.value})")
