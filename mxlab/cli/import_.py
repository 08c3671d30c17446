"""``mxlab import``: a model that another tool has quantized, as a packed model of mxlab."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mxlab.cli.console import loading_libraries, print_line, progress, start_logging
from mxlab.cli.convert import print_inventory


def import_(
    source: Annotated[Path, typer.Argument(help="A folder of compressed-tensors, or a GGUF file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the model goes.")],
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Leave out what else is quantized there.")
    ] = False,
) -> None:
    """Take over weights that another tool has quantized to MXFP4, MXFP6, MXFP8 or NVFP4, code by code."""
    start_logging()
    with progress():
        with loading_libraries():
            from mxlab.hf.imports import import_model

        conversion = import_model(source, out, weights_only)
    print_inventory(conversion)
    print_line(f"written: {out}")
