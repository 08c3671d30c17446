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

_TOLERANCE = 1e-2  # of the size of a token's hidden states, between the layers in their model and by themselves
_REMEDY = "leave [algorithms.reconstruction] out of the recipe"
_HIDDEN = "hidden_states"  # an argument of decoder layers, where it is given by name


def decoder_layers(model: Any) -> list[str]:
    """Return the names of a model's decoder layers, in their order."""
    lists = sorted(Structure(model).layer_lists.items(), key=lambda item: item[1])
    return [f"{name}.{i}" for name, _ in lists for i in range(len(model.get_submodule(name)))]


def check_layers_run_alone(model: Any, ids: Tensor) -> None:
    """Raise ConversionError where a decoder layer cannot be run by itself, as :class:`BlockStream` does.

    The first and the last of the windows ``ids`` [windows, tokens] tell.
    """
    BlockStream(model, decoder_layers(model), ids[[0, -1]])


@contextmanager
def recomputing_activations(model: Any) -> Iterator[None]:
    """Keep no more of each decoder layer than its input for the gradients, as long as the context is open.

    The backward pass computes the rest again: a third more time for the activations of one layer instead of all.
    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """
    layers = list(dict.fromkeys(model.get_submodule(name) for name in decoder_layers(model)))
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
        ConversionError: the layers take more than hidden states and positions, so that they cannot run by themselves.
    """

    def __init__(self, model: Any, names: Sequence[str], ids: Tensor) -> None:
        if not names:
            raise ConversionError(f"the model has no decoder layers that mxlab finds: {_REMEDY}")
        self._names, self._layers = names, [model.get_submodule(name) for name in names]
        self._calls, first = self._record(model, ids[:1])
        self.hidden = [self._before_layers(model, window) for window in ids.split(1)]
        self._check(first, self._record(model, ids[-1:])[1])

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
            self._hidden_in(args, named)
            # By name it keeps its place only.
            calls.append((args, {**named, _HIDDEN: None}) if _HIDDEN in named else (args[1:], named))

        hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self._layers]
        hooks.append(self._layers[-1].register_forward_hook(lambda _, __, output: after.append(_hidden_of(output))))
        try:
            forward(model, ids)
        finally:
            for hook in hooks:
                hook.remove()
        if len(calls) != self.count:
            raise ConversionError(f"a pass runs {len(calls)} times through {self.count} decoder layers: {_REMEDY}")
        return calls, after[-1]

    def _before_layers(self, model: Any, ids: Tensor) -> Tensor:
        """Return the hidden states before the first layer."""
        found: list[Tensor] = []

        def stop(_: Any, args: tuple, named: dict[str, Any]) -> None:
            found.append(self._hidden_in(args, named))
            raise _StopError

        hook = self._layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            forward(model, ids)
        except _StopError:
            pass
        finally:
            hook.remove()
        return found[0]

    def _hidden_in(self, args: tuple, named: dict[str, Any]) -> Tensor:
        """Return the hidden states among the arguments of a layer."""
        found = named.get(_HIDDEN, args[0] if args else None)
        if not isinstance(found, Tensor):
            raise ConversionError(f"the layers from {self._names[0]} on take no hidden states first: {_REMEDY}")
        return found

    @torch.no_grad()
    def _check(self, first: Tensor, last: Tensor) -> None:
        """Compare the layers by themselves with the model, on the first window and the last in turn.

        In turn, so that what a layer leaves behind for a later one, such as its K and V, is seen to be mistaken.
        """
        hidden = [self.hidden[0], self.hidden[-1]]
        for layer in range(self.count):
            hidden = [self.output(layer, one) for one in hidden]
        for found, expected in zip(hidden, (first, last), strict=True):
            lost, size = ((x.float()).norm(dim=-1) for x in (found - expected, expected))
            if not bool((lost <= _TOLERANCE * size).all()):
                raise ConversionError(
                    f"the layers from {self._names[0]} to {self._names[-1]} take more than hidden states and "
                    f"positions: {_REMEDY}"
                )


def _hidden_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class _StopError(Exception):
    """The hidden states before the first layer are known."""
