"""Run the quantized model, beside the unquantized one or alone, and stop at each layer that is to be quantized.

It sees the whole calibration text in one forward pass: at a layer that is to be quantized the pass waits, the weight
is chosen, and the pass goes on with it. So no layer runs twice, the layers behind see what the quantized ones compute,
and nothing needs to be known of an architecture. What memory it takes is that of one layer's activations.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mxlab.errors import ConversionError
from mxlab.model.conversion import Conversion
from mxlab.model.observe import observe_inputs
from mxlab.model.plan import QuantizedSite
from mxlab.model.structure import takes_argument

# Told of a site, its input in the quantized model, and the same in the unquantized one: where that does not run beside
# it, in the quantized model before it is rounded.
Visit = Callable[[QuantizedSite, Tensor, Tensor], None]
_SPARING = {"use_cache": False, "logits_to_keep": 1}  # arguments that not every model has
_PROBE = 8  # tokens that tell which layers share an input
_PATIENCE = 0.2  # seconds between looking whether the other stream has failed


def run_in_lockstep(quantized: Conversion, original: Conversion, ids: Tensor, visit: Visit) -> None:
    """Pass ``ids`` [windows, tokens] through both models, and call ``visit`` at each linear layer of the first.

    Raises:
        ConversionError: the models meet their layers in different orders.
    """
    handed = _Handover()
    thread = threading.Thread(target=handed.run, args=(original, ids), daemon=True)
    thread.start()

    def meet(site: QuantizedSite, x: Tensor) -> None:
        name, other = handed.take()
        if name != site.name:
            raise ConversionError(
                f"the quantized model computes {site.name} where the unquantized one does {name}: the two cannot be "
                "compared layer by layer; take correction = 0 in [algorithms.gptq]"
            )
        visit(site, x, other)

    try:
        with observe_inputs(quantized, meet):
            forward(quantized.model, ids)
    finally:
        handed.close()
        thread.join()


def run_alone(quantized: Conversion, ids: Tensor, visit: Visit) -> None:
    """Pass ``ids`` [windows, tokens] through the quantized model, and call ``visit`` at each linear layer."""
    with observe_inputs(quantized, lambda site, x: visit(site, x, x)):
        forward(quantized.model, ids)


def layers_by_input(conversion: Conversion, ids: Tensor) -> list[list[QuantizedSite]]:
    """Return the linear layers of a model, those together that multiply the same tensor: query, key and value.

    A few of the token ids [windows, tokens] tell.
    """
    groups: list[list[QuantizedSite]] = []
    last: list[Tensor] = []

    def meet(site: QuantizedSite, x: Tensor) -> None:
        if last and last[0] is x:
            groups[-1].append(site)
        else:
            groups.append([site])
        last[:] = [x]

    with observe_inputs(conversion, meet):
        forward(conversion.model, ids[:1, :_PROBE])
    return groups


@torch.no_grad()
def forward(model: Any, ids: Tensor) -> None:
    """Pass token ids through a model whose logits nobody reads."""
    known = {name: value for name, value in _SPARING.items() if takes_argument(model, name)}
    model(input_ids=ids.to(model.device), **known)


class _Handover:
    """Hands the inputs of one model over to another, one at a time."""

    def __init__(self) -> None:
        self._inputs: queue.Queue[tuple[str, Tensor]] = queue.Queue(maxsize=1)
        self._failure: BaseException | None = None
        self._is_closed = self._has_ended = False

    def run(self, original: Conversion, ids: Tensor) -> None:
        try:
            with observe_inputs(original, self._give):
                forward(original.model, ids)
        except _ClosedError:
            pass
        except BaseException as e:
            self._failure = e
        self._has_ended = True

    def take(self) -> tuple[str, Tensor]:
        while True:
            try:
                return self._inputs.get(timeout=_PATIENCE)
            except queue.Empty:
                if self._failure is not None:
                    raise self._failure from None
                if self._has_ended and self._inputs.empty():
                    return "no further layer", torch.empty(0)

    def close(self) -> None:
        self._is_closed = True

    def _give(self, site: QuantizedSite, x: Tensor) -> None:
        while not self._is_closed:
            try:
                return self._inputs.put((site.name, x), timeout=_PATIENCE)
            except queue.Full:
                continue
        raise _ClosedError


class _ClosedError(Exception):
    """The other model has no use for more."""
