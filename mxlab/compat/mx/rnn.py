"""The LSTM in rounded steps, under microxcaling's name and signature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from mxlab.compat.mx._operator import Layer
from mxlab.compat.mx.activations import sigmoid, tanh
from mxlab.compat.mx.linear import linear
from mxlab.compat.mx.simd_ops import simd_add, simd_mul
from mxlab.errors import SpecError

State = tuple[Tensor, Tensor]  # hidden and cell, each (1, N, H)
Step = int | slice


class LSTM(Layer, torch.nn.LSTM):
    """A ``torch.nn.LSTM`` of :func:`linear`, ``sigmoid``, ``tanh``, ``simd_add`` and ``simd_mul``.

    Raises:
        SpecError: ``batch_first`` or ``proj_size``, which microxcaling does not have.
    """

    def __init__(self, *args: Any, mx_specs: Mapping[str, Any] | None = None, name: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.batch_first or self.proj_size:
            raise SpecError("LSTM has neither batch_first nor proj_size: transpose the input, project the output")
        self.configure(mx_specs, name)

    def forward(self, input: Any, hx: State | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the outputs (L, N, D · H) and the last states (D · layers, N, H) of (L, N, I).

        Args:
            input: (L, N, I), or a packed sequence; the outputs are then packed, too.
            hx: the first states (D · layers, N, H) of hidden units and cells; zeros where None.
        """
        if self.mx_none:
            return super().forward(input, hx)
        packed = input if isinstance(input, PackedSequence) else None
        x: Any = input if packed is None else packed.data
        sizes = None if packed is None else packed.batch_sizes
        steps = _steps(x, sizes)
        batch = x.shape[1] if sizes is None else int(sizes[0])
        states = self._first_states(x, batch, hx, packed)
        self.check_forward_args(x, states, sizes)
        last = []
        for layer in range(self.num_layers):
            outputs = []
            for reverse in (False, True)[: self._directions]:
                k = layer * self._directions + reverse
                y, state = self._run(x, steps, (states[0][k : k + 1], states[1][k : k + 1]), layer, reverse)
                outputs.append(y)
                last.append(state)
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
            if self.dropout and layer < self.num_layers - 1:
                x = torch.nn.functional.dropout(x, self.dropout, self.training)
        hidden = tuple(torch.cat(found) for found in zip(*last, strict=True))
        if packed is None:
            return x, hidden
        output = PackedSequence(x, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        return output, self.permute_hidden(hidden, packed.unsorted_indices)  # pyright: ignore[reportArgumentType]

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _first_states(self, x: Tensor, batch: int, hx: State | None, packed: PackedSequence | None) -> State:
        if hx is None:
            zeros = x.new_zeros(self.num_layers * self._directions, batch, self.hidden_size)
            return zeros, zeros
        return self.permute_hidden(hx, packed.sorted_indices if packed else None)

    def _run(self, x: Tensor, steps: list[Step], first: State, layer: int, reverse: bool) -> tuple[Tensor, State]:
        """Run one direction of a layer over all steps.

        Args:
            x: (L, N, I), or of a packed sequence (sum of N, I).
            steps: where in ``x`` each step is.
            first: the first states, of all sequences.
            layer: the layer's index.
            reverse: whether the steps are taken from the last to the first.

        Returns:
            The outputs, like ``x``, and the last states of all sequences.
        """
        projected = self._linear(x, "ih", layer, reverse)
        inputs = [projected[step] for step in steps]
        state, ended, outputs = _part(first, 0, len(inputs[-1]) if reverse else len(inputs[0])), [], []
        for xw in reversed(inputs) if reverse else inputs:
            going, n = state[0].shape[1], len(xw)
            if n < going:
                ended.insert(0, _part(state, n, going))
                state = _part(state, 0, n)
            elif n > going:
                state = _joined([state, _part(first, going, n)])
            state = self._cell(xw, state, layer, reverse)
            outputs.append(state[0])
        axis = 0 if x.ndim == 3 else 1
        return torch.cat(outputs[::-1] if reverse else outputs, axis).view(*x.shape[:-1], -1), _joined([state, *ended])

    def _cell(self, projected: Tensor, state: State, layer: int, reverse: bool) -> State:
        """Return the next states of N sequences from their projected inputs (N, 4 · H)."""
        specs = self.mx_specs
        h, c = state
        gates = simd_add(projected, self._linear(h, "hh", layer, reverse), mx_specs=specs)
        i, f, g, o = gates.chunk(4, dim=-1)
        forgotten = simd_mul(sigmoid(f, mx_specs=specs), c, mx_specs=specs)
        added = simd_mul(sigmoid(i, mx_specs=specs), tanh(g, mx_specs=specs), mx_specs=specs)
        c = simd_add(forgotten, added, mx_specs=specs)
        return simd_mul(sigmoid(o, mx_specs=specs), tanh(c, mx_specs=specs), mx_specs=specs), c

    def _linear(self, x: Tensor, what: str, layer: int, reverse: bool) -> Tensor:
        suffix = f"{what}_l{layer}{'_reverse' if reverse else ''}"
        weight, bias = getattr(self, f"weight_{suffix}"), getattr(self, f"bias_{suffix}", None)
        return linear(x, weight, bias, mx_specs=self.mx_specs)


def _steps(x: Tensor, sizes: Tensor | None) -> list[Step]:
    """Return where each step is along the first axis of ``x``; ``sizes`` are those of a packed sequence's steps."""
    if sizes is None:
        return list(range(len(x)))
    ends = sizes.cumsum(0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _part(state: State, start: int, end: int) -> State:
    """Return the states of some of the sequences; the same tensors where that is all of them."""
    h, c = state
    return state if (start, end) == (0, h.shape[1]) else (h[:, start:end], c[:, start:end])


def _joined(states: list[State]) -> State:
    """Return the states of several groups of sequences as one."""
    if len(states) == 1:
        return states[0]
    h, c = (torch.cat(found, 1) for found in zip(*states, strict=True))
    return h, c
