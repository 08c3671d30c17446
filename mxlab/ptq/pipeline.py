"""Quantize a model by the algorithms that its recipe asks for, in their order."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from mxlab.errors import ConversionError
from mxlab.formats import MXFormat
from mxlab.model.apply import apply, finish, prepare, prepare_to_observe
from mxlab.model.conversion import Conversion
from mxlab.progress import Steps
from mxlab.ptq import mase
from mxlab.ptq.blocks import check_layers_run_alone
from mxlab.ptq.calibration import Windows
from mxlab.ptq.chosen import ChosenWeight
from mxlab.ptq.distillation import distill
from mxlab.ptq.experts import ExpertQuantizer
from mxlab.ptq.layers import LayerQuantizer
from mxlab.ptq.offsets import fitting_offsets
from mxlab.ptq.reconstruction import reconstruct
from mxlab.ptq.resume import Progress
from mxlab.ptq.search import searched
from mxlab.ptq.streams import layers_by_input, run_alone, run_in_lockstep
from mxlab.recipe import Recipe
from mxlab.recipe.algorithms import Gptq
from mxlab.recipe.recipe import MASE


def quantize_model(
    model: Any, original: Any, recipe: Recipe, windows: Windows, progress: Progress | None = None
) -> Conversion:
    """Convert ``model`` in place as ``recipe`` says, its weights chosen by the algorithms of the recipe.

    Args:
        model: the model, in evaluation mode.
        original: another copy of it, which stays unquantized; it cannot be used for anything else afterwards.
        recipe: without algorithms everything is rounded to nearest; the tables of a MASE file have MASE's meaning
            (:mod:`mxlab.ptq.mase`).
        windows: the calibration text.
        progress: where each step is kept, and found again after an interruption.

    Raises:
        ConversionError: the recipe does not fit the model, or an algorithm cannot treat a layer.
        RunError: a step cannot be kept.
    """
    progress = progress or Progress()
    if not recipe.takes_calibration:
        return apply(model, recipe)
    if MASE in recipe.algorithms:
        return mase.quantize_model(model, original, recipe, windows, progress)
    _check(model, recipe)
    if (reconstruction := recipe.algorithm("reconstruction")) is not None:
        _check_reconstruction(original, recipe, windows)
    recipe = _searched(original, recipe, windows, progress)
    conversion, observed = prepare(model, recipe), prepare_to_observe(original, recipe)
    groups = layers_by_input(observed, windows.ids)
    options = recipe.algorithm("gptq") or Gptq()
    distillation = recipe.algorithm("distillation")
    learns = reconstruction is not None or distillation is not None
    layers = LayerQuantizer(options, windows.held_out / len(windows.ids), conversion, groups, progress, learns)
    experts = ExpertQuantizer(options, conversion, progress, learns)
    run = partial(run_in_lockstep, conversion, observed) if options.corrects else partial(run_alone, conversion)
    with (
        torch.no_grad(),
        fitting_offsets(conversion, windows.held_out),
        Steps("quantizing", layers.count + experts.count) as steps,
        experts.choosing(steps.advance),
    ):
        run(windows.ids, lambda *seen: steps.advance(layers.visit(*seen)))
    layers.round_unseen()
    conversion = finish(conversion)
    chosen: list[ChosenWeight] = [*layers.chosen, *experts.chosen]
    if reconstruction is not None:
        reconstruct(conversion, original, chosen, windows, reconstruction, progress)
    if distillation is not None:
        distill(conversion, original, chosen, windows, distillation, progress)
    return conversion


def _searched(original: Any, recipe: Recipe, windows: Windows, progress: Progress) -> Recipe:
    """Return the recipe with the transforms that were found, in its rules, and without the search that found them."""
    options = recipe.algorithm("search")
    if options is None:
        return recipe
    others = {name: table for name, table in recipe.algorithms.items() if name != "search"}
    return progress.recipe(
        "search", lambda: replace(searched(original, recipe, options, windows.ids), algorithms=others)
    )


def _check(model: Any, recipe: Recipe) -> None:
    if recipe.numerics != "exact":
        raise ConversionError(f"recipe {recipe.name}: gptq computes in exact numerics; take numerics out of the recipe")
    for rule in recipe.rules:
        if rule.weight is not None and not isinstance(rule.weight, MXFormat):
            raise ConversionError(f"recipe {recipe.name}: gptq has no format {rule.weight}; use a microscaling one")
        if rule.weight is not None and rule.weight.is_random:
            raise ConversionError(
                f"recipe {recipe.name}: gptq chooses where a weight goes, and {rule.weight} leaves that to "
                "chance: take rounding=even"
            )
    learning = [name for name in ("reconstruction", "distillation") if name in recipe.algorithms]
    if learning and model.dtype == torch.float16:
        raise ConversionError(
            f"recipe {recipe.name}: gradients of {learning[0]} vanish in float16: quantize in float32 or bfloat16 "
            "(--dtype), and cast what was saved"
        )


def _check_reconstruction(original: Any, recipe: Recipe, windows: Windows) -> None:
    """Raise ConversionError where decoder layers cannot be run by themselves, before anything is quantized."""
    check_layers_run_alone(original, windows.ids)
    for rule in recipe.rules:
        for role, fmt in rule.formats.items():
            if role != "weight" and getattr(fmt, "is_random", False):
                raise ConversionError(
                    f"recipe {recipe.name}: {role} is rounded at random ({fmt}), so that a layer never computes the "
                    "same twice: take another rounding, or leave [algorithms.reconstruction] out"
                )
