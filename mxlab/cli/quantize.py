"""``mxlab quantize``: a model whose weights were chosen by a calibration text, as a folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mxlab.cli.console import loading_libraries, progress, start_logging
from mxlab.cli.convert import print_inventory
from mxlab.cli.options import DataDirOption, DeviceOption, Dtype, DtypeOption, ModelArgument, SetOption
from mxlab.cli.recipes import chosen_recipe
from mxlab.compat.recipes import is_of_mase
from mxlab.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from mxlab.model.conversion import Conversion
    from mxlab.ptq.calibration import Windows
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
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run of the same command was.")
    ] = False,
) -> None:
    """Quantize a model by the algorithms of a recipe, with a calibration text, and save it.

    The tables [gptq] and [rotation_search] of a MASE file have MASE's meaning; one without them is rounded to nearest.
    What is done is kept in OUT.unfinished until the model is saved.
    """
    chosen = chosen_recipe(recipe, set_ or [], model)
    if not chosen.algorithms and not is_of_mase(recipe):
        raise SpecError(
            f"recipe {chosen.name} asks for no algorithm: mxlab convert rounds to nearest; or add [algorithms.gptq]"
        )
    start_logging()
    with progress():
        with loading_libraries():
            from mxlab.hf.checkpoint import save

        unfinished = out.with_name(f"{out.name}.unfinished")
        job = _Job(model, chosen, dtype.value, device, data_dir, unfinished, resume)
        conversion = save(job.run, out)
        shutil.rmtree(unfinished, ignore_errors=True)
    print_inventory(conversion)


@dataclass(frozen=True)
class _Job:
    """One quantization; the steps that are done are kept in ``unfinished``."""

    model: str
    recipe: Recipe
    dtype: str
    device: str
    data_dir: Path | None
    unfinished: Path
    resume: bool

    def run(self) -> tuple[Conversion, Any]:
        from mxlab.experiments.provenance import code_version
        from mxlab.ptq.pipeline import quantize_model
        from mxlab.ptq.resume import Progress, describe
        from mxlab.sources.models import load_model

        loaded, original = (load_model(self.model, self.dtype, self.device) for _ in range(2))
        windows = self._windows(loaded.tokenizer)
        belongs_to = describe(loaded.model, self.recipe, windows, code_version())
        progress = Progress(self.unfinished, belongs_to, self.resume)
        return quantize_model(loaded.model, original.model, self.recipe, windows, progress), loaded.tokenizer

    def _windows(self, tokenizer: Any) -> Windows:
        """Return the calibration text; a recipe without algorithms needs none."""
        from mxlab.ptq import mase
        from mxlab.ptq.calibration import sample
        from mxlab.recipe.algorithms import Calibration
        from mxlab.recipe.recipe import MASE
        from mxlab.sources.texts import encode, load_text

        def read(name: str) -> Tensor:
            return encode(tokenizer, load_text(name, self.data_dir))

        if MASE in self.recipe.algorithms or not self.recipe.algorithms:
            return mase.windows(self.recipe, read)
        calibration = self.recipe.algorithm("calibration") or Calibration()
        return sample(read(calibration.text), calibration)
