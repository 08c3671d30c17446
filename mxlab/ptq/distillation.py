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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mxlab.model.conversion import Conversion
from mxlab.progress import track
from mxlab.ptq.calibration import Windows
from mxlab.ptq.chosen import ChosenWeight
from mxlab.recipe.algorithms import Distillation

_MEAN, _SQUARE = 0.9, 0.95  # of the running moments: a run has some dozens of steps, not thousands
_WARM_UP = 5  # steps until the full rate
_HALVINGS = 12  # of the way from what was to be rounded to the value it was given

logger = logging.getLogger("mxlab")


def distill(
    conversion: Conversion, original: Any, chosen: Sequence[ChosenWeight], windows: Windows, options: Distillation
) -> None:
    """Learn from ``original`` on the text, and keep what is best on the windows held out.

    Where nothing is better there than what was chosen before, that stays.

    Args:
        conversion: of the quantized model, in evaluation mode.
        original: the unquantized model.
        chosen: the weights on the grid.
        windows: the text.
        options: steps and rates.
    """
    model = conversion.model
    weights = [_LearnedWeight(weight) for weight in chosen]
    vectors = _Vectors(model)
    best = _Best(chosen, vectors.parameters)
    best.consider(divergence(model, original, windows.held_out_ids), 0)
    turns = _in_turn(windows.rest, options.batch)
    with _learning(model, [*(w.parameter for w in weights), *vectors.parameters]):
        for step in track(range(1, options.steps + 1), "distilling"):
            loss = _accumulate_gradients(model, original, next(turns))
            if not math.isfinite(loss):
                logger.warning("distillation diverges in step %d: the best state before it is kept", step)
                break
            logger.debug("distillation, step %d: KL divergence %.4f", step, loss)
            share = _share_of_rate(step, options.steps)
            with torch.no_grad():
                for weight in weights:
                    weight.advance(options.rate * share, step)
                vectors.advance(options.vector_rate * share)
            if step % options.check == 0 or step == options.steps:
                best.consider(divergence(model, original, windows.held_out_ids), step)
    best.restore()


class _LearnedWeight:
    """A weight that moves on its grid: the master, and the running moments of its gradient, in units of the scales."""

    def __init__(self, chosen: ChosenWeight) -> None:
        self._chosen = chosen
        self._cut = chosen.blocks
        self._master = _inside_cells(chosen)
        self._mean, self._square = torch.zeros_like(self._master), torch.zeros_like(self._master)

    @property
    def parameter(self) -> nn.Parameter:
        return self._chosen.layer.weight

    def advance(self, rate: float, step: int) -> None:
        """Take a step of Adam, the first being 1, and round the master."""
        parameter = self.parameter
        assert parameter.grad is not None
        gradient = self._in_scales(parameter.grad.t() if self._chosen.is_transposed else parameter.grad)
        parameter.grad = None
        self._mean.lerp_(gradient, 1 - _MEAN)
        self._square.lerp_(gradient.square_(), 1 - _SQUARE)
        size = self._square.div(1 - _SQUARE**step).sqrt_().add_(torch.finfo(torch.float32).tiny)
        direction = self._in_scales(self._mean.div(1 - _MEAN**step).div_(size))
        self._master.sub_(direction, alpha=rate)
        self._chosen.freeze_as(self._chosen.rounded(self._master))

    def _in_scales(self, x: Tensor) -> Tensor:
        return self._cut.join(self._cut.split(x) * self._chosen.scales)


def _inside_cells(chosen: ChosenWeight) -> Tensor:
    """Return what rounds to the chosen values, as near to what was to be rounded as halving the way finds."""
    values, master = chosen.values.float(), chosen.target.clone()
    for _ in range(_HALVINGS):
        is_outside = chosen.rounded(master) != values
        master = torch.where(is_outside, (master + values) / 2, master)
    return torch.where(chosen.rounded(master) != values, values, master)


class _Vectors:
    """All parameters of one dimension, the gains of norms and biases, moved by Adam."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.ndim == 1 and p.is_floating_point()]
        self._optimizer = torch.optim.Adam(self.parameters, betas=(_MEAN, _SQUARE)) if self.parameters else None

    def advance(self, rate: float) -> None:
        """Take a step."""
        if self._optimizer is not None:
            self._optimizer.param_groups[0]["lr"] = rate
            self._optimizer.step()
            self._optimizer.zero_grad()


class _Best:
    """Keeps the state that diverges least on the windows held out."""

    def __init__(self, chosen: Sequence[ChosenWeight], vectors: Sequence[nn.Parameter]) -> None:
        self._chosen, self._vectors = chosen, vectors
        self._least, self._step = math.inf, 0
        self._state: tuple[list[Tensor], list[Tensor]] = [], []

    def consider(self, divergence: float, step: int) -> None:
        """Remember the present state if it is better than all before."""
        logger.info("after %d steps of distillation: KL divergence %.4f on the windows held out", step, divergence)
        if divergence < self._least:
            self._least, self._step = divergence, step
            self._state = [c.values.clone() for c in self._chosen], [v.detach().clone() for v in self._vectors]

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model the best state."""
        for chosen, values in zip(self._chosen, self._state[0], strict=True):
            chosen.freeze_as(values.contiguous())
        for vector, values in zip(self._vectors, self._state[1], strict=True):
            vector.copy_(values)


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
        logits = model(input_ids=ids, use_cache=False).logits
        with torch.no_grad():
            wanted = _log_probabilities(original, ids)
            found = logits.detach().float().log_softmax(-1)
            total += _mean_divergence(wanted, found) / len(windows)
            gradient = found.exp_().sub_(wanted.exp_()).div_(ids.numel() * len(windows))
        logits.backward(gradient.to(logits.dtype))
    return total


@torch.no_grad()
def divergence(model: Any, original: Any, windows: Tensor) -> float:
    """Return the mean KL divergence of a model's next tokens from the unquantized model's, in nats."""
    total = 0.0
    for window in windows.split(1):
        ids = window.to(model.device)
        found = _log_probabilities(model, ids)
        total += _mean_divergence(_log_probabilities(original, ids), found)
    return total / len(windows)


def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)


def _mean_divergence(wanted: Tensor, found: Tensor) -> float:
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def _share_of_rate(step: int, steps: int) -> float:
    """Return the share of the learning rate in a step: rising at first, then falling to zero."""
    return min(1.0, step / _WARM_UP) * (1 - (step - 1) / steps)


def _in_turn(windows: Tensor, count: int) -> Iterator[Tensor]:
    """Yield ``count`` windows at a time, over and over."""
    start = 0
    while True:
        places = [(start + i) % len(windows) for i in range(count)]
        yield windows[places]
        start += count
