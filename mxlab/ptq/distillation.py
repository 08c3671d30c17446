"""Distill the unquantized model into the quantized one, end to end, while its weights stay on the grid.

What learns are the quantized weights, all vectors of the model (the gains of its norms, biases) and the transforms that
were fitted (:mod:`mxlab.ptq.learned`). Scales stay as they are, so that whatever comes out is of the format.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, at temperature 1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mxlab.model.conversion import Conversion
from mxlab.progress import track
from mxlab.ptq.calibration import Windows
from mxlab.ptq.chosen import ChosenWeight
from mxlab.ptq.divergence import divergence, logits_of, mean_divergence
from mxlab.ptq.learned import Learned, everything_learned
from mxlab.ptq.resume import Progress
from mxlab.recipe.algorithms import Distillation

_KEPT = "distillation"  # the name of the state that is kept
_KINDS = ("master", "mean", "square")  # of tensors that all that learns has
_WARM_UP = 5  # steps until the full rate

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
    learned = everything_learned(model, chosen)
    state = _State(learned)
    if (kept := progress.load(_KEPT)) is not None:
        state.load(kept)
    else:
        state.consider(divergence(model, original, windows.held_out_ids))
    with _learning(model, [tensor for one in learned for tensor in one.tensors]):
        for step in track(range(state.step + 1, options.steps + 1), "distilling"):
            loss = _accumulate_gradients(model, original, _turn(windows.rest, step, options.batch))
            if not math.isfinite(loss):
                logger.warning("distillation diverges in step %d: the best state before it is kept", step)
                break
            logger.debug("distillation, step %d: KL divergence %.4f", step, loss)
            state.advance(options, _share_of_rate(step, options.steps))
            if step % options.check == 0 or step == options.steps:
                state.consider(divergence(model, original, windows.held_out_ids))
                progress.keep(_KEPT, state.tensors())
    state.restore_best()


class _State:
    """All that is learned, and the best of it so far on the windows held out."""

    def __init__(self, learned: Sequence[Learned]) -> None:
        self._learned = learned
        self.step = 0
        self._least, self._best = math.inf, {}

    @torch.no_grad()
    def advance(self, options: Distillation, share: float) -> None:
        """Take a step at a share of the rates."""
        self.step += 1
        for one in self._learned:
            one.advance(options, share, self.step)

    @torch.no_grad()
    def consider(self, found: float) -> None:
        """Remember the present state if its divergence is less than all before."""
        logger.info("distillation, step %d: KL divergence %.4f on the windows held out", self.step, found)
        if found < self._least:
            self._least, self._best = found, {one.name: one.state() for one in self._learned}

    @torch.no_grad()
    def restore_best(self) -> None:
        """Give the model the best state."""
        for one in self._learned:
            if one.name in self._best:  # nowhere where no state had a divergence
                one.restore(self._best[one.name])

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as tensors by name."""
        numbers = {"step": torch.tensor(self.step), "least": torch.tensor(self._least, dtype=torch.float64)}
        best = {f"best.{name}": state for name, state in self._best.items()}
        return numbers | best | {f"{kind}.{one.name}": getattr(one, kind) for kind in _KINDS for one in self._learned}

    @torch.no_grad()
    def load(self, kept: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`tensors` returned."""
        self.step, self._least = int(kept["step"]), float(kept["least"])
        for one in self._learned:
            self._best[one.name] = kept[f"best.{one.name}"].to(one.master.device)
            for kind in _KINDS:
                getattr(one, kind).copy_(kept[f"{kind}.{one.name}"])
            one.show_master()


@contextmanager
def _learning(model: nn.Module, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Have gradients for ``tensors`` alone, as long as the context is open."""
    before = {t: t.requires_grad for t in (*model.parameters(), *tensors)}
    for tensor in before:
        tensor.requires_grad_(False)
    for tensor in tensors:
        tensor.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for tensor, required in before.items():
            tensor.requires_grad_(required)
            tensor.grad = None


def _accumulate_gradients(model: Any, original: Any, windows: Tensor) -> float:
    """Add the gradients of the mean divergence over ``windows`` to the parameters; return it.

    The gradient of the divergence by the logits is the difference of the probabilities. It is formed here, window by
    window, as logits are the largest tensors by far.
    """
    total = 0.0
    for window in windows.split(1):
        ids = window.to(model.device)
        logits = logits_of(model, ids)
        with torch.no_grad():
            wanted, found = logits_of(original, ids), logits.detach()
            total += mean_divergence(wanted, found) / len(windows)
            gradient = found.float().softmax(-1)
            # Row by row, so that there are not two more tensors of that size.
            for row, of_row in zip(gradient.flatten(0, -2), wanted.flatten(0, -2), strict=True):
                row.sub_(of_row.float().softmax(-1))
            gradient.div_(ids.numel() * len(windows))
            del wanted, found
        logits.backward(gradient.to(logits.dtype))
    return total


def _share_of_rate(step: int, steps: int) -> float:
    """Return the share of the learning rate in a step: rising at first, then falling to zero."""
    return min(1.0, step / _WARM_UP) * (1 - (step - 1) / steps)


def _turn(windows: Tensor, step: int, count: int) -> Tensor:
    """Return the ``count`` windows of a step, the first being 1; after the last window comes the first."""
    start = (step - 1) * count
    return windows[[(start + i) % len(windows) for i in range(count)]]
