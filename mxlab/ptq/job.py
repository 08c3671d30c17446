"""One quantization from beginning to end: load, calibrate, quantize, save."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxlab.hf.checkpoint import save
from mxlab.model.apply import Storage, apply, prepare
from mxlab.model.conversion import Conversion
from mxlab.ptq import mase
from mxlab.ptq.calibration import Windows, sample
from mxlab.ptq.pipeline import quantize_model
from mxlab.ptq.resume import Progress, describe
from mxlab.recipe import Recipe
from mxlab.recipe.algorithms import Calibration
from mxlab.recipe.recipe import MASE
from mxlab.sources.devices import peak_memory
from mxlab.sources.models import load_model, skeleton
from mxlab.sources.tokens import token_ids

_FLOAT = 4  # bytes
_COPIES = 4  # of a layer's input at a time: both models', transformed, quantized
_LEARNED = 3.5  # times the weights: masters, gradients, and in half of their bits two moments and the best so far

RECORD = "quantization.json"  # in the saved folder: how long it took, and the memory


@dataclass(frozen=True)
class JobPlan:
    """What a job would do: the conversion of the model without its weights, and the recipe."""

    conversion: Conversion
    recipe: Recipe

    @property
    def memory(self) -> int:
        """About how many bytes it takes at its peak: both models, one layer's inputs, and what is learned."""
        parameters = list(self.conversion.model.parameters())
        models = 2 * sum(p.numel() * p.element_size() for p in parameters)
        chosen = [site.weight for site in self.conversion.linears if "weight" in site.roles]
        calibration = self.recipe.algorithm("calibration") or Calibration()
        widest = max((max(weight.shape) for weight in chosen), default=0)
        inputs = (calibration.samples + calibration.held_out) * calibration.length * widest * _FLOAT * _COPIES
        learned = _LEARNED * _FLOAT * sum(weight.numel() for weight in chosen)
        return models + inputs + (int(learned) if self.recipe.algorithm("distillation") else 0)

    @property
    def lines(self) -> list[str]:
        """The plan as lines of text."""
        calibration = self.recipe.algorithm("calibration") or Calibration()
        tokens = f"{calibration.samples} x {calibration.length} tokens of {calibration.text}, seed {calibration.seed}"
        steps = [name for name in self.recipe.algorithms if name != "calibration"]
        return [
            f"calibration: {tokens}; {calibration.held_out} windows more are held out",
            f"algorithms: {', '.join(steps)}",
            f"memory: about {self.memory / 2**30:.1f} GiB",
        ]


@dataclass(frozen=True)
class QuantizationJob:
    """What to quantize, and how.

    Attributes:
        model: a hub name, a folder, or ``smollm2``.
        recipe: without tables of algorithms everything is rounded to nearest.
        code: the version of mxlab; steps that were made with another are not resumed.
        dtype: of the model.
        device: auto, cpu, cuda, ...
        data_dir: a folder with the calibration text; None for the hub.
        storage: how the quantized weights are saved; see :func:`mxlab.apply`.
    """

    model: str
    recipe: Recipe
    code: str
    dtype: str = "float32"
    device: str = "auto"
    data_dir: Path | None = None
    storage: Storage = "grid"

    def run(self, out: Path, *, resume: bool = False) -> Conversion:
        """Save the quantized model into the new folder ``out``.

        Each step is kept in ``OUT.unfinished`` until the model is saved; with ``resume`` what is there is used.

        Raises:
            RunError: ``out`` exists already, or something cannot be written.
            SourceError, ConversionError: the model or the text cannot be had, or the recipe does not fit.
        """
        unfinished = out.with_name(f"{out.name}.unfinished")
        began = time.monotonic()

        def record(folder: Path) -> None:
            seconds = round(time.monotonic() - began, 1)
            values = {"seconds": seconds, "peak_memory_bytes": peak_memory(), "code": self.code}
            (folder / RECORD).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

        conversion = save(lambda: self._quantized(unfinished, resume), out, record)
        shutil.rmtree(unfinished, ignore_errors=True)
        return conversion

    def plan(self) -> JobPlan:
        """Return what :meth:`run` would do, from the shapes of the model alone.

        Raises:
            SourceError, ConversionError: as :meth:`run`.
        """
        return JobPlan(prepare(skeleton(self.model, self.dtype), self.recipe), self.recipe)

    def windows(self, tokenizer: Any) -> Windows:
        """Return the windows of the calibration text.

        Raises:
            SourceError, SpecError: the text cannot be had, or is too short.
        """
        if MASE in self.recipe.algorithms or not self.recipe.takes_calibration:
            return mase.windows(self.recipe, lambda name: token_ids(name, tokenizer, self.data_dir))
        options = self.recipe.algorithm("calibration") or Calibration()
        return sample(token_ids(options.text, tokenizer, self.data_dir), options)

    def _quantized(self, unfinished: Path, resume: bool) -> tuple[Conversion, Any]:
        loaded = load_model(self.model, self.dtype, self.device)
        windows = self.windows(loaded.tokenizer)
        progress = Progress(unfinished, describe(loaded.model, self.recipe, windows, self.code), resume)
        is_spread = getattr(loaded.model, "hf_device_map", None) is not None
        original = load_model(self.model, self.dtype, self.device if is_spread else str(loaded.model.device))
        conversion = quantize_model(loaded.model, original.model, self.recipe, windows, progress)
        return apply(conversion.model, conversion.recipe, self.storage), loaded.tokenizer
