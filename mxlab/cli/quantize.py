"""``mxlab quantize``: a model whose weights were chosen by a calibration text, as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mxlab.cli.console import loading_libraries, progress, start_logging
from mxlab.cli.convert import print_inventory
from mxlab.cli.options import DataDirOption, DeviceOption, Dtype, DtypeOption, ModelArgument, SetOption
from mxlab.cli.recipes import chosen_recipe
from mxlab.errors import SpecError

if TYPE_CHECKING:
    from mxlab.model.conversion import Conversion
    from mxlab.recipe import Recipe


def quantize(
    model: ModelArgument,
    recipe: Annotated[
        str, typer.Option("--recipe", help="A shipped recipe's name, or a TOML file, with [algorithms].")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the quantized model goes.")],
    set_: SetOption = None,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "auto",
    data_dir: DataDirOption = None,
) -> None:
    """Quantize a model by the algorithms of a recipe, with a calibration text, and save it."""
    chosen = chosen_recipe(recipe, set_ or [], model)
    if not chosen.algorithms:
        raise SpecError(
            f"recipe {chosen.name} asks for no algorithm: mxlab convert rounds to nearest; or add [algorithms.gptq]"
        )
    start_logging()
    with progress():
        with loading_libraries():
            from mxlab.hf.checkpoint import save

        conversion = save(lambda: _quantized(model, chosen, dtype.value, device, data_dir), out)
    print_inventory(conversion)


def _quantized(model: str, recipe: Recipe, dtype: str, device: str, data_dir: Path | None) -> tuple[Conversion, Any]:
    from mxlab.ptq.calibration import sample
    from mxlab.ptq.pipeline import quantize_model
    from mxlab.recipe.algorithms import Calibration
    from mxlab.sources.models import load_model
    from mxlab.sources.texts import encode, load_text

    calibration = recipe.algorithm("calibration") or Calibration()
    text = load_text(calibration.text, data_dir)
    loaded, original = (load_model(model, dtype, device) for _ in range(2))
    windows = sample(encode(loaded.tokenizer, text), calibration)
    return quantize_model(loaded.model, original.model, recipe, windows), loaded.tokenizer
