"""Learn the weights of one decoder layer after the other, so that each computes what it did before it was quantized.

A layer gets the hidden states that the quantized layers before it compute, and learns to return those that the
unquantized model has behind it. Its weights move on their grid, starting from what was chosen before, and the
transforms that were fitted with them; nothing that is worse on the windows held out is kept. Beside the weights it
takes the memory of one layer, where distillation takes that of all.

Sources: Li et al., "BRECQ", 2021, for blocks as the unit; Cheng et al., "Optimize Weight Rounding via Signed Gradient
Descent", 2023 (AutoRound), for the hidden states of the quantized model as inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mxlab.model.conversion import Conversion
from mxlab.progress import Steps
from mxlab.ptq.blocks import BlockStream, decoder_layers
from mxlab.ptq.calibration import Windows
from mxlab.ptq.chosen import ChosenWeight
from mxlab.ptq.learned import Learned, weights_and_transforms
from mxlab.ptq.learning import LearningState, gradients_for, learn, restore, windows_of_step
from mxlab.ptq.resume import Progress
from mxlab.recipe.algorithms import Reconstruction


def reconstruct(
    conversion: Conversion,
    original: Any,
    chosen: Sequence[ChosenWeight],
    windows: Windows,
    options: Reconstruction,
    progress: Progress,
) -> None:
    """Have each decoder layer of the quantized model learn from that of ``original``.

    Args:
        conversion: of the quantized model, in evaluation mode.
        original: the unquantized model.
        chosen: the weights on the grid; their targets become these.
        windows: the text.
        options: steps and rates.
        progress: keeps each layer.

    Raises:
        ConversionError: a decoder layer cannot run by itself.
        RunError: a layer cannot be kept.
    """
    model = conversion.model
    names = decoder_layers(model)
    ours, theirs = (BlockStream(m, names, windows.ids) for m in (model, original))
    with Steps("reconstructing", len(names)) as steps:
        for layer, name in enumerate(names):
            wanted = theirs.outputs(layer)
            weights = [weight for weight in chosen if weight.name.startswith(f"{name}.")]
            for weight in weights:
                weight.hold_in_memory()
            _reconstruct_layer(
                _Layer(model, ours, layer, wanted, windows.held_out),
                weights_and_transforms(weights),
                options,
                progress,
                f"reconstruction.{name}",
            )
            for weight in weights:
                weight.target = None  # so that a run that was interrupted goes on from the same
            ours.hidden, theirs.hidden = ours.outputs(layer), wanted
            steps.advance()


class _Layer:
    """A decoder layer of the quantized model, and what it is to return for each window."""

    def __init__(self, model: Any, stream: BlockStream, layer: int, wanted: Sequence[Tensor], held_out: int) -> None:
        self.model, self._stream, self._layer, self._wanted = model, stream, layer, wanted
        self._learning = len(wanted) - held_out

    def accumulate(self, step: int, batch: int) -> float:
        """Add the gradients of a step's loss to what learns; return it."""
        total = 0.0
        for window in windows_of_step(self._learning, step, batch):
            loss = self._loss(window) / batch
            loss.backward()
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def judge(self) -> float:
        """Return the mean loss on the windows held out."""
        judging = range(self._learning, len(self._wanted))
        return sum(float(self._loss(window)) for window in judging) / len(judging)

    def _loss(self, window: int) -> Tensor:
        """Return the squared error in parts of the size of what is wanted, every token counting alike."""
        wanted = self._wanted[window].float()
        found = self._stream.output(self._layer, self._stream.hidden[window]).float()
        return ((found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-30)).mean()


def _reconstruct_layer(
    layer: _Layer, learned: Sequence[Learned], options: Reconstruction, progress: Progress, name: str
) -> None:
    """Have the weights and transforms of one layer learn, or take over what was kept of them."""
    if not learned:
        return
    kept = progress.load(name)
    if kept is None:
        state = LearningState(learned)
        steps = range(1, options.steps + 1)
        with gradients_for(layer.model, learned):
            for _ in learn(state, options, lambda n: layer.accumulate(n, options.batch), layer.judge, steps, name):
                pass  # a layer is kept as a whole
        kept = state.best
        progress.keep(name, kept)
    restore(learned, kept)
