"""The model, the texts and the score that trials of what is left out of mxlab have in common."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor, nn

from mxlab.compat.recipes import load_any_recipe
from mxlab.eval.metrics import kl_divergence
from mxlab.ptq.calibration import Windows, sample
from mxlab.ptq.divergence import logits_of
from mxlab.recipe.algorithms import Calibration
from mxlab.sources.models import load_model
from mxlab.sources.texts import encode, load_text

WINDOW, WINDOWS = 512, 8
CALIBRATED = 16  # windows of the calibration text from which a trial takes its own statistics


class Setting:
    """The quantized model beside the unquantized one, and the texts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.recipe = options, load_any_recipe(options.recipe)
        loaded = load_model("smollm2", "float32", "cpu")
        self.original = loaded.model

        def ids(name: str) -> Tensor:
            return encode(loaded.tokenizer, load_text(name, options.data_dir))

        calibration = self.recipe.algorithm("calibration") or Calibration()
        self.windows: Windows = sample(ids(calibration.text), calibration)
        self.test = ids("wikitext2")[: WINDOW * WINDOWS].view(WINDOWS, WINDOW)

    @property
    def rules(self) -> list[dict[str, Any]]:
        """The rules of the recipe, as plain values."""
        return self.recipe.to_dict()["rules"]

    def quantized(self) -> nn.Module:
        """Return the model in the folder, anew."""
        return load_model(str(self.options.folder), "float32", "cpu").model

    def original_again(self) -> Any:
        """Return one more copy of the unquantized model."""
        return load_model("smollm2", "float32", "cpu").model

    @torch.no_grad()
    def calibrate(self, model: Any) -> None:
        """Pass the windows through a model from which a trial takes its own statistics."""
        for window in self.windows.ids[:CALIBRATED].split(1):
            model(window, use_cache=False)

    @torch.no_grad()
    def score(self, model: Any) -> dict[str, float]:
        """Return the metrics of a model on the test text."""
        divergence = cross_entropy = 0.0
        for window in self.test.split(1):
            wanted, found = (logits_of(m, window)[0, :-1].float() for m in (self.original, model))
            divergence += kl_divergence(wanted, found).double().mean().item()
            cross_entropy += nn.functional.cross_entropy(found, window[0, 1:]).item()
        return {"kl_divergence": divergence / WINDOWS, "perplexity": math.exp(cross_entropy / WINDOWS)}
