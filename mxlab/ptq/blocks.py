"""Run a model one decoder layer at a time, forward or backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mxlab.errors import ConversionError
from mxlab.model.structure import Structure
from mxlab.ptq.streams import forward

_TOLERANCE = 1e-3  # of the size of hidden states, between a layer in its model and by itself
_HIDDEN = "hidden_states"  # an argument of decoder layers, where it is given by name


def decoder_layers(model: Any) -> list[str]:
    """Return the names of a model's decoder layers, in their order."""
    lists = sorted(Structure(model).layer_lists.items(), key=lambda item: item[1])
    return [f"{name}.{i}" for name, _ in lists for i in range(len(model.get_submodule(name)))]


@contextmanager
def recomputed(model: Any) -> Iterator[None]:
    """Keep no more of each decoder layer than its input for the gradients, as long as the context is open.

    The backward pass computes the rest again: a third more time for the activations of one layer instead of all.
    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """
    layers = [model.get_submodule(name) for name in decoder_layers(model)]
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, forward_before in zip(layers, before, strict=True):
            if forward_before is None:
                del layer.forward
            else:
                layer.forward = forward_before


class BlockStream:
    """The hidden states of windows of text before one decoder layer after the other.

    Args:
        model: the model, in evaluation mode.
        names: of its decoder layers.
        ids: [windows, tokens]; one window at a time goes through a layer.

    Raises:
        ConversionError: a layer is told of more than hidden states and positions, so that it cannot run by itself.
    """

    def __init__(self, model: Any, names: Sequence[str], ids: Tensor) -> None:
        self._layers = [model.get_submodule(name) for name in names]
        self._names = names
        first, last = ids[:1], ids[-1:]
        self._calls, _ = self._record(model, first)
        self.hidden = [self._before_layers(model, window) for window in ids.split(1)]
        self._check(self._record(model, last)[1])

    @property
    def count(self) -> int:
        """How many layers there are."""
        return len(self._layers)

    def output(self, layer: int, hidden: Tensor) -> Tensor:
        """Return the hidden states [1, tokens, width] after a layer, the first being 0."""
        args, named = self._calls[layer]
        args, named = ((), {**named, _HIDDEN: hidden}) if _HIDDEN in named else ((hidden, *args), named)
        return _hidden_of(self._layers[layer](*args, **named))

    @torch.no_grad()
    def outputs(self, layer: int) -> list[Tensor]:
        """Return the hidden states of all windows after a layer, those of ``hidden`` being before it."""
        return [self.output(layer, hidden) for hidden in self.hidden]

    def _record(self, model: Any, ids: Tensor) -> tuple[list[tuple[tuple, dict[str, Any]]], Tensor]:
        """Return the arguments of each layer, hidden states aside, and the hidden states after the last layer."""
        calls: list[tuple[tuple, dict[str, Any]]] = []
        after: list[Tensor] = []

        def before(_: Any, args: tuple, named: dict[str, Any]) -> None:
            # By name it keeps its place only.
            calls.append((args, {**named, _HIDDEN: None}) if _HIDDEN in named else (args[1:], named))

        hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self._layers]
        hooks.append(self._layers[-1].register_forward_hook(lambda _, __, output: after.append(_hidden_of(output))))
        try:
            forward(model, ids)
        finally:
            for hook in hooks:
                hook.remove()
        return calls, after[0]

    def _before_layers(self, model: Any, ids: Tensor) -> Tensor:
        """Return the hidden states before the first layer."""
        found: list[Tensor] = []

        def stop(_: Any, args: tuple, named: dict[str, Any]) -> None:
            found.append(named[_HIDDEN] if _HIDDEN in named else args[0])
            raise _StopError

        hook = self._layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            forward(model, ids)
        except _StopError:
            pass
        finally:
            hook.remove()
        return found[0]

    @torch.no_grad()
    def _check(self, expected: Tensor) -> None:
        """Compare the layers by themselves on the last window, with the arguments of the first, with the model."""
        hidden = self.hidden[-1]
        for layer in range(self.count):
            hidden = self.output(layer, hidden)
        if (hidden - expected).abs().max() > _TOLERANCE * expected.abs().max():
            raise ConversionError(
                f"the layers from {self._names[0]} to {self._names[-1]} are told of more than hidden states and "
                "positions: leave [algorithms.reconstruction] out of the recipe"
            )


def _hidden_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class _StopError(Exception):
    """The hidden states before the first layer are known."""
