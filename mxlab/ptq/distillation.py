"""Distill the unquantized model into the quantized one, end to end, while its weights stay on the grid.

What is learned are the quantized weights and all vectors of the model (the gains of its norms, biases). A weight has a
master in full precision, which begins inside the cell that rounds to the value chosen so far, as near as can be to what
was to be rounded; the model computes with the rounded master, whose gradient is taken for that of the master. Scales
and transforms stay as they are, so that whatever comes out is of the format.

Sources: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, at temperature 1; Bengio et al.,
"Estimating or Propagating Gradients Through Stochastic Neurons", 2013, for the gradient that passes straight through;
Kingma and Ba, "Adam", 2015.
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
from mxlab.ptq.resume import Progress
from mxlab.recipe.algorithms import Distillation

_MEAN, _SQUARE = 0.9, 0.95  # of the running moments: a run has some dozens of steps, not thousands
_KEPT = "distillation"  # the name of the state that is kept
_LEARNED = ("master", "mean", "square")  # what each learned parameter has
_LEAST = 1e-12  # size of a gradient below which its direction is noise
_WARM_UP = 5  # steps until the full rate
_HALVINGS = 12  # of the way from what was to be rounded to the value it was given

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
        chosen: the weights on the grid.
        windows: the text.
        options: steps and rates.
        progress: keeps the state at every look at the windows held out.
    """
    model = conversion.model
    state = _State(model, chosen)
    if (kept := progress.load(_KEPT)) is not None:
        state.load(kept)
    else:
        state.consider(divergence(model, original, windows.held_out_ids))
    with _learning(model, state.parameters):
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


class _LearnedWeight:
    """A weight that moves on its grid: the master, and the running moments of its gradient, in units of the scales."""

    def __init__(self, chosen: ChosenWeight) -> None:
        self.name, self.chosen = chosen.name, chosen
        self._cut = chosen.blocks
        self.master = _inside_cells(chosen)
        self.mean, self.square = torch.zeros_like(self.master), torch.zeros_like(self.master)

    @property
    def parameter(self) -> nn.Parameter:
        return self.chosen.layer.weight

    def advance(self, rate: float, step: int) -> None:
        """Take a step of Adam, the first being 1, and round the master."""
        parameter = self.parameter
        if parameter.grad is None:  # no token went through the layer
            return
        gradient = self._in_scales(self.chosen.by_outputs(parameter.grad))
        parameter.grad = None
        direction = _direction(gradient.float(), self.mean, self.square, step)
        self.master.sub_(self._in_scales(direction), alpha=rate)
        self.chosen.layer.freeze_as(self.chosen.rounded(self.master))

    def _in_scales(self, x: Tensor) -> Tensor:
        return self._cut.join(self._cut.split(x) * self.chosen.scales)


def _inside_cells(chosen: ChosenWeight) -> Tensor:
    """Return what rounds to the chosen values, as near to what was to be rounded as halving the way finds."""
    values, master = chosen.values.float(), chosen.target.clone()
    for _ in range(_HALVINGS):
        is_outside = chosen.rounded(master) != values
        master = torch.where(is_outside, (master + values) / 2, master)
    return torch.where(chosen.rounded(master) != values, values, master)


class _LearnedVector:
    """A parameter of one dimension, a norm's gain or a bias, moved by Adam in float32."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name, self.parameter = name, parameter
        self.master = parameter.detach().float().clone()
        self.mean, self.square = torch.zeros_like(self.master), torch.zeros_like(self.master)

    def advance(self, rate: float, step: int) -> None:
        """Take a step of Adam, the first being 1."""
        if (gradient := self.parameter.grad) is not None:  # else it takes no part in the prediction
            self.master.sub_(_direction(gradient.float(), self.mean, self.square, step), alpha=rate)
            self.parameter.copy_(self.master)
            self.parameter.grad = None


def _direction(gradient: Tensor, mean: Tensor, square: Tensor, step: int) -> Tensor:
    """Return the direction in which Adam goes; updates the running moments, and overwrites the gradient."""
    mean.lerp_(gradient, 1 - _MEAN)
    square.lerp_(gradient.square_(), 1 - _SQUARE)
    size = square.div(1 - _SQUARE**step).sqrt_().add_(_LEAST)
    return mean.div(1 - _MEAN**step).div_(size)


class _State:
    """All that is learned, and the best of it so far on the windows held out."""

    def __init__(self, model: nn.Module, chosen: Sequence[ChosenWeight]) -> None:
        self._weights = [_LearnedWeight(weight) for weight in chosen]
        vectors = ((n, p) for n, p in model.named_parameters() if p.ndim == 1 and p.is_floating_point())
        self._vectors = [_LearnedVector(name, parameter) for name, parameter in vectors]
        self.step = 0
        self._least, self._best = math.inf, self._values()

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [learned.parameter for learned in (*self._weights, *self._vectors)]

    @torch.no_grad()
    def advance(self, options: Distillation, share: float) -> None:
        """Take a step at a share of the rates."""
        self.step += 1
        for weight in self._weights:
            weight.advance(options.rate * share, self.step)
        for vector in self._vectors:
            vector.advance(options.vector_rate * share, self.step)

    def consider(self, found: float) -> None:
        """Remember the present state if its divergence is less than all before."""
        logger.info("distillation, step %d: KL divergence %.4f on the windows held out", self.step, found)
        if found < self._least:
            self._least, self._best = found, self._values()

    @torch.no_grad()
    def restore_best(self) -> None:
        """Give the model the best state."""
        self._give(self._best)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as tensors by name."""
        numbers = {"step": torch.tensor(self.step), "least": torch.tensor(self._least, dtype=torch.float64)}
        best = {f"best.{name}": values for name, values in self._best.items()}
        present = {f"present.{name}": values for name, values in self._values().items()}
        learned = {f"{kind}.{x.name}": getattr(x, kind) for kind in _LEARNED for x in (*self._weights, *self._vectors)}
        return numbers | best | present | learned

    @torch.no_grad()
    def load(self, kept: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`tensors` returned."""
        self.step, self._least = int(kept["step"]), float(kept["least"])
        for name in self._best:
            self._best[name] = kept[f"best.{name}"]
        self._give({name: kept[f"present.{name}"] for name in self._best})
        for x in (*self._weights, *self._vectors):
            for kind in _LEARNED:
                getattr(x, kind).copy_(kept[f"{kind}.{x.name}"])

    def _values(self) -> dict[str, Tensor]:
        weights = {w.name: w.chosen.values.clone() for w in self._weights}
        return weights | {v.name: v.parameter.detach().clone() for v in self._vectors}

    def _give(self, values: Mapping[str, Tensor]) -> None:
        for weight in self._weights:
            weight.chosen.layer.freeze_as(values[weight.name].to(weight.parameter))
        for vector in self._vectors:
            vector.parameter.copy_(values[vector.name])


@contextmanager
def _learning(model: nn.Module, learned: Sequence[nn.Parameter]) -> Iterator[None]:
    """Have gradients for ``learned`` alone, as long as the context is open."""
    before = {p: p.requires_grad for p in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)
    for parameter in learned:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
            parameter.grad = None


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
            gradient = found.float().softmax(-1).sub_(wanted.float().softmax(-1)).div_(ids.numel() * len(windows))
        logits.backward(gradient.to(logits.dtype))
    return total


def _share_of_rate(step: int, steps: int) -> float:
    """Return the share of the learning rate in a step: rising at first, then falling to zero."""
    return min(1.0, step / _WARM_UP) * (1 - (step - 1) / steps)


def _turn(windows: Tensor, step: int, count: int) -> Tensor:
    """Return the ``count`` windows of a step, the first being 1; after the last window comes the first."""
    start = (step - 1) * count
    return windows[[(start + i) % len(windows) for i in range(count)]]
