"""What learns: weights on their grid, vectors, and fitted transforms, each by Adam.

A weight has a master in full precision, which begins inside the cell that rounds to the value chosen so far, as near as
can be to what was to be rounded; the model computes with the rounded master, whose gradient is taken for that of the
master. Scales stay as they are. The running moments are kept in bfloat16: they steer, and nothing adds up in them for
longer than some dozens of steps.

Sources: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013, for the gradient that
passes straight through; Kingma and Ba, "Adam", 2015.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mxlab.model.nn.linear import QuantizedLayer
from mxlab.ptq.chosen import ChosenLayer, ChosenWeight
from mxlab.recipe.algorithms import Distillation, Learning

_MEAN, _SQUARE = 0.9, 0.95  # of the running moments: a run has some dozens of steps, not thousands
_LEAST = 1e-12  # size of a gradient below which its direction is noise
_HALVINGS = 12  # of the way from what was to be rounded to the value it was given


class Learned(ABC):
    """Something of a model that learns.

    Args:
        name: by which it is kept; unique among what a model learns.
        master: its values in float32, which are moved.
        tensors: of the model, which get the gradients: one, or several that are to stay equal.
    """

    def __init__(self, name: str, master: Tensor, tensors: Sequence[Tensor]) -> None:
        self.name, self.master, self.tensors = name, master, tensors
        self.mean, self.square = (torch.zeros_like(master, dtype=torch.bfloat16) for _ in range(2))

    def advance(self, options: Learning, share: float, step: int) -> None:
        """Take a step, the first being 1, at a share of the rate, and give the model the new values."""
        gradients = [t.grad for t in self.tensors if t.grad is not None]
        for tensor in self.tensors:
            tensor.grad = None
        if gradients:  # else it takes no part in the prediction
            gradient = self._of_master(torch.stack(gradients).sum(0) if len(gradients) > 1 else gradients[0]).float()
            self._move(self._direction(gradient, step), share * self._rate(options))
            self.show_master()

    def show_master(self) -> None:
        """Give the model the values that the master stands for."""
        self.restore(self.master)

    def state(self) -> Tensor:
        """Return a copy of the values that the model has, as :meth:`restore` takes it."""
        return self.tensors[0].detach().clone()

    def restore(self, state: Tensor) -> None:
        """Give the model the values of a state."""
        for tensor in self.tensors:
            tensor.copy_(state)

    @abstractmethod
    def _rate(self, options: Learning) -> float: ...

    def _of_master(self, gradient: Tensor) -> Tensor:
        """Return a new tensor: the gradient of the model's tensor by the master."""
        return gradient.clone()

    def _move(self, direction: Tensor, rate: float) -> None:
        self.master.sub_(direction, alpha=rate)

    def _direction(self, gradient: Tensor, step: int) -> Tensor:
        """Return the direction in which Adam goes; updates the running moments, and overwrites the gradient."""
        mean = self.mean.float().lerp_(gradient, 1 - _MEAN)
        self.mean.copy_(mean)
        square = self.square.float().lerp_(gradient.square_(), 1 - _SQUARE)
        self.square.copy_(square)
        return mean.div_(1 - _MEAN**step).div_(square.div_(1 - _SQUARE**step).sqrt_().add_(_LEAST))


class LearnedWeight(Learned):
    """A weight that moves on its grid, by steps in units of its blocks' scales.

    Its state are elements, without their scales: numbers of few bits, which bfloat16 holds as a rule.

    Args:
        chosen: the weight, held in memory; its target is overwritten.
    """

    def __init__(self, chosen: ChosenWeight) -> None:
        super().__init__(chosen.name, _inside_cells(chosen), [chosen.weight])
        self._chosen, self._cut = chosen, chosen.blocks
        is_short = chosen.fmt.element_bits <= 8  # bfloat16 has eight bits of precision, and float32's exponents
        self._state = torch.bfloat16 if is_short else torch.float32

    def show_master(self) -> None:  # noqa: D102
        self._chosen.freeze_as(self._chosen.rounded(self.master))

    def state(self) -> Tensor:  # noqa: D102
        return self._cut.join(self._cut.split(self._chosen.values.float()) / self._chosen.scales).to(self._state)

    def restore(self, state: Tensor) -> None:  # noqa: D102
        values = self._cut.join(self._cut.split(state.float()) * self._chosen.scales)
        self._chosen.freeze_as(self._chosen.rounded(values))  # rounded, as bfloat16 may have moved the last bits

    def _rate(self, options: Learning) -> float:
        return options.rate

    def _of_master(self, gradient: Tensor) -> Tensor:
        return self._in_scales(self._chosen.by_outputs(gradient))

    def _move(self, direction: Tensor, rate: float) -> None:
        super()._move(self._in_scales(direction), rate)

    def _in_scales(self, x: Tensor) -> Tensor:
        return self._cut.join(self._cut.split(x) * self._chosen.scales)


class LearnedVector(Learned):
    """A parameter of one dimension: the gains of a norm, or a bias."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        super().__init__(name, parameter.detach().float().clone(), [parameter])

    def _rate(self, options: Learning) -> float:
        assert isinstance(options, Distillation)  # nothing else moves vectors
        return options.vector_rate


class LearnedTransform(Learned):
    """The fitted transform of layers that share an input, by steps in parts of each matrix's elements' mean size.

    The model computes with values of bfloat16, in which they are stored.
    """

    def __init__(self, name: str, layers: Sequence[QuantizedLayer]) -> None:
        matrices = [layer.get_buffer("input_transform") for layer in layers]
        super().__init__(name, matrices[0].detach().float().clone(), matrices)
        self._size = self.master.square().mean((-2, -1), keepdim=True).sqrt()

    def show_master(self) -> None:  # noqa: D102
        self.restore(self.master.bfloat16())

    def _rate(self, options: Learning) -> float:
        return options.transform_rate

    def _move(self, direction: Tensor, rate: float) -> None:
        super()._move(direction * self._size, rate)


def everything_learned(model: nn.Module, chosen: Sequence[ChosenWeight]) -> list[Learned]:
    """Return what a model learns: the weights that were chosen, the fitted transforms, and its vectors."""
    vectors = ((name, p) for name, p in model.named_parameters() if p.ndim == 1 and p.is_floating_point())
    return [*weights_and_transforms(chosen), *(LearnedVector(name, parameter) for name, parameter in vectors)]


def weights_and_transforms(chosen: Sequence[ChosenWeight]) -> list[Learned]:
    """Return weights as what learns, and the transforms that were fitted to them."""
    sharing: dict[str, list[QuantizedLayer]] = {}
    for weight in chosen:
        if isinstance(weight, ChosenLayer) and weight.layer.input_transform is not None:
            sharing.setdefault(weight.shares_with, []).append(weight.layer)
    return [
        *(LearnedWeight(weight) for weight in chosen),
        *(LearnedTransform(f"{name}.input_transform", layers) for name, layers in sharing.items()),
    ]


def _inside_cells(chosen: ChosenWeight) -> Tensor:
    """Return what rounds to the chosen values, as near to what was to be rounded as halving the way finds.

    It takes the place of the target, whose memory it needs.
    """
    values, master, dtype = chosen.values.float(), chosen.target, chosen.weight.dtype
    assert master is not None

    def misses(x: Tensor) -> Tensor:
        return chosen.rounded(x).to(dtype).float() != values  # the model holds values in its dtype

    for _ in range(_HALVINGS):
        master.copy_(torch.where(misses(master), (master + values) / 2, master))
    return master.copy_(torch.where(misses(master), values, master))
