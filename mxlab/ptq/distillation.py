"""Distill the unquantized model into the quantized one, end to end, while its weights stay on the grid.

What learns are the quantized weights, all vectors of the model (the gains of its norms, biases) and the transforms that
were fitted (:mod:`mxlab.ptq.learned`). Scales stay as they are, so that whatever comes out is of the format.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, at temperature 1.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mxlab.model.conversion import Conversion
from mxlab.progress import track
from mxlab.ptq.blocks import recomputing_activations
from mxlab.ptq.calibration import Windows
from mxlab.ptq.chosen import ChosenWeight
from mxlab.ptq.divergence import divergence, logits_of, mean_divergence
from mxlab.ptq.learned import everything_learned
from mxlab.ptq.learning import LearningState, gradients_for, learn, windows_of_step
from mxlab.ptq.resume import Progress
from mxlab.recipe.algorithms import Distillation
from mxlab.sources.devices import return_freed_memory

_KEPT = "distillation"  # the name of the state that is kept
_TOKENS = 512  # whose logits are in memory at a time, unless a window is longer
_ROWS = 64  # tokens whose logits are compared at a time

logger = logging.getLogger("mxlab")


def distill(
    conversion: Conversion,
    original: Any,
    chosen: Sequence[ChosenWeight],
    windows: Windows,
    options: Distillation,
    progress: Progress,
) -> None:
    """Learn from ``original`` on the text, and keep what is best on the windows held out.

    Where nothing is better there than what was chosen before, that stays.

    Args:
        conversion: of the quantized model, in evaluation mode.
        original: the unquantized model.
        chosen: the weights on the grid; their targets are overwritten.
        windows: the text.
        options: steps and rates.
        progress: keeps the state at every look at the windows held out.
    """
    model = conversion.model
    _hold_in_memory(model, chosen)
    learned = everything_learned(model, chosen)
    state = LearningState(learned)
    if (kept := progress.load(_KEPT)) is not None:
        state.load(kept)

    def accumulate(step: int) -> float:
        return_freed_memory()
        taken = windows_of_step(len(windows.rest), step, options.batch)
        return _accumulate_gradients(model, original, windows.rest[taken])

    def judge() -> float:
        return divergence(model, original, windows.held_out_ids)

    steps = track(range(state.step + 1, options.steps + 1), "distilling")
    with recomputing_activations(model), gradients_for(model, learned):
        for found in learn(state, options, accumulate, judge, steps, _KEPT):
            logger.info(
                "distillation, step %d: KL divergence %.4f on the windows held out, %.4f at best",
                state.step,
                found,
                state.least,
            )
            state.leave_best_in(progress.keep(_KEPT, state.tensors()))
    state.restore_best()


@torch.no_grad()
def _hold_in_memory(model: Any, chosen: Sequence[ChosenWeight]) -> None:
    """Read what is still in files, as every step reads and writes all of it, and let go of the files."""
    for weight in chosen:
        weight.hold_in_memory()
    settled = {id(weight.weight) for weight in chosen}
    for parameter in model.parameters():
        if id(parameter) not in settled:
            parameter.data = parameter.data.clone()
    return_freed_memory()


def _accumulate_gradients(model: Any, original: Any, windows: Tensor) -> float:
    """Add the gradients of the mean divergence over ``windows`` to the parameters; return it.

    The gradient of the divergence by the logits is the difference of the probabilities. It is formed here, for a few
    windows at a time, as logits are the largest tensors by far.
    """
    total = 0.0
    for part in windows.split(max(1, _TOKENS // windows.shape[1])):
        ids = part.to(model.device)
        logits = logits_of(model, ids)
        with torch.no_grad():
            gradient = logits_of(original, ids)
            # Some rows at a time, in the memory of what was wanted: no other tensor gets as large.
            rows = zip(gradient.flatten(0, -2).split(_ROWS), logits.detach().flatten(0, -2).split(_ROWS), strict=True)
            for wanted, found in rows:
                total += mean_divergence(wanted, found) * len(found) / windows.numel()
                wanted.copy_((found.float().softmax(-1) - wanted.float().softmax(-1)) / windows.numel())
        logits.backward(gradient)
    return total
