"""Take steps along gradients, keep what is best on windows held out, and go on after an interruption."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mxlab.ptq.learned import Learned
from mxlab.recipe.algorithms import Learning

_KINDS = ("master", "mean", "square")  # of tensors that all that learns has
_WARM_UP = 5  # steps until the full rate

logger = logging.getLogger("mxlab")


class LearningState:
    """All that is learned, and the best of it so far on the windows held out."""

    def __init__(self, learned: Sequence[Learned]) -> None:
        self._learned = learned
        self.step = 0
        self.least = math.inf
        self.best: dict[str, Tensor] = {}  # by name

    @torch.no_grad()
    def advance(self, options: Learning) -> None:
        """Take a step: rates rise at first, then fall to zero."""
        share = min(1.0, (self.step + 1) / _WARM_UP) * (1 - self.step / options.steps)
        self.step += 1
        for one in self._learned:
            one.advance(options, share, self.step)

    @torch.no_grad()
    def consider(self, found: float) -> None:
        """Remember the present state if it loses less than all before; the first one in any case."""
        if found < self.least or not self.best:
            self.least = found if math.isfinite(found) else math.inf
            self.best = {one.name: one.state() for one in self._learned}

    def restore_best(self) -> None:
        """Give the model the best state."""
        restore(self._learned, self.best)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as tensors by name."""
        numbers = {"step": torch.tensor(self.step), "least": torch.tensor(self.least, dtype=torch.float64)}
        best = {f"best.{name}": state for name, state in self.best.items()}
        return numbers | best | {f"{kind}.{one.name}": getattr(one, kind) for kind in _KINDS for one in self._learned}

    @torch.no_grad()
    def load(self, kept: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`tensors` returned."""
        self.step, self.least = int(kept["step"]), float(kept["least"])
        self.leave_best_in(kept)
        for one in self._learned:
            for kind in _KINDS:
                getattr(one, kind).copy_(kept[f"{kind}.{one.name}"])
            one.show_master()

    def leave_best_in(self, kept: Mapping[str, Tensor]) -> None:
        """Have the best state where it is kept, instead of in memory; ``kept`` is what :meth:`tensors` returned."""
        self.best = {one.name: kept[f"best.{one.name}"] for one in self._learned}


def learn(
    state: LearningState,
    options: Learning,
    accumulate: Callable[[int], float],
    judge: Callable[[], float],
    steps: Iterable[int],
    name: str,
) -> Iterator[float]:
    """Learn, and yield the loss at every look at the windows held out, the state being one to go on with.

    Args:
        state: what is learned; at the beginning it is judged as well, so that nothing worse is kept.
        options: rates, and how often the windows held out are looked at.
        accumulate: adds the gradients of a step, the first being 1, to what learns, and returns its loss.
        judge: returns the loss on the windows held out.
        steps: the numbers of the steps to take.
        name: of the algorithm, for the log.
    """
    if not state.step:
        state.consider(judge())
        logger.debug("%s, step 0: %.4g on the windows held out", name, state.least)
    for step in steps:
        loss = accumulate(step)
        if not math.isfinite(loss):
            logger.warning("%s diverges in step %d: the best state before it is kept", name, step)
            return
        logger.debug("%s, step %d: %.4g", name, step, loss)
        state.advance(options)
        if step % options.check == 0 or step == options.steps:
            found = judge()
            logger.debug("%s, step %d: %.4g on the windows held out", name, step, found)
            state.consider(found)
            yield found


@torch.no_grad()
def restore(learned: Sequence[Learned], states: Mapping[str, Tensor]) -> None:
    """Give the model those of the states that there are, by name."""
    for one in learned:
        if one.name in states:
            one.restore(states[one.name].to(one.master.device))


@contextmanager
def gradients_for(model: nn.Module, learned: Sequence[Learned]) -> Iterator[None]:
    """Have gradients for what learns alone, as long as the context is open."""
    tensors = [tensor for one in learned for tensor in one.tensors]
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


def windows_of_step(count: int, step: int, batch: int) -> list[int]:
    """Return which of ``count`` windows a step reads, the first being 1; after the last window comes the first."""
    return [((step - 1) * batch + i) % count for i in range(batch)]
