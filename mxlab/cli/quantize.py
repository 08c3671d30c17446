"""``mxlab quantize``: a model whose weights were chosen by a calibration text, as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mxlab.cli.console import loading_libraries, print_text, progress, start_logging
from mxlab.cli.convert import print_inventory
from mxlab.cli.options import (
    DataDirOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelArgument,
    SetOption,
    Storage,
    StorageOption,
)
from mxlab.cli.recipes import chosen_recipe
from mxlab.compat.recipes import is_of_mase
from mxlab.errors import SpecError


def quantize(
    model: ModelArgument,
    recipe: Annotated[
        str, typer.Option("--recipe", help="A shipped recipe's name, or a TOML file, with [algorithms].")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the quantized model goes.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be quantized, and how.")] = False,
    set_: SetOption = None,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "auto",
    storage: StorageOption = Storage.grid,
    data_dir: DataDirOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run of the same command was.")
    ] = False,
) -> None:
    """Quantize a model by the algorithms of a recipe, with a calibration text, and save it.

    The tables [gptq] and [rotation_search] of a MASE file have MASE's meaning; one without them is rounded to nearest.
    What is done is kept in OUT.unfinished until the model is saved.
    """
    if dry_run == (out is not None):
        raise SpecError("give --out FOLDER for the quantized model, or --dry-run to see what a recipe does")
    chosen = chosen_recipe(recipe, set_ or [], model)
    if not chosen.takes_calibration and not is_of_mase(recipe):
        raise SpecError(
            f"recipe {chosen.name} asks for no algorithm: mxlab convert rounds to nearest; or add [algorithms.gptq]"
        )
    if out is not None:
        start_logging()
    with progress():
        with loading_libraries():
            from mxlab.experiments.provenance import code_version
            from mxlab.ptq.job import QuantizationJob

        job = QuantizationJob(model, chosen, code_version(), dtype.value, device, data_dir, storage.value)
        if out is None:
            plan = job.plan()
            conversion, lines = plan.conversion, plan.lines
        else:
            conversion, lines = job.run(out, resume=resume), []
    print_inventory(conversion)
    for line in lines:
        print_text(line)
