"""Watch the operands of a converted model: the one way to see them, whoever wants to know.

Counting clamped scales is here; the statistics of :mod:`mxlab.inspect` are another function over :func:`observe`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from mxlab.formats import MXFormat
from mxlab.model.conversion import Conversion, computer_of
from mxlab.model.plan import QuantizedSite
from mxlab.numerics import scale_clamps
from mxlab.progress import track

# Told of an operand before it is rounded: its site, its role, the tensor, and the axis along which its blocks lie.
SiteObserver = Callable[[QuantizedSite, str, Tensor, int], None]

_COUNTS = {"blocks": 0, "clamped": 0, "overflowed": 0}


@contextmanager
def observe(conversion: Conversion, observer: SiteObserver) -> Iterator[None]:
    """Show ``observer`` every operand that the model's forward quantizes, as long as the context is open.

    Shown are inputs [..., in] and outputs [..., out] of linear layers, inputs of experts, and what an attention
    multiplies: K, V and the query (batch, heads, tokens, head_dim), scores (masked ones as zeros) and probabilities
    (batch, heads, tokens, keys), cosines and sines. A layer is shown its input also where it shares the quantized one.
    Weights and biases do not depend on the input: :meth:`QuantizedSite.quantized_parameters` has them. A tensor may be
    written to after the call: copy what is to be kept.
    """
    with _observing(conversion.sites, partial(_call, observer)):
        yield


@contextmanager
def observe_inputs(conversion: Conversion, observer: Callable[[QuantizedSite, Tensor], None]) -> Iterator[None]:
    """Show ``observer`` the input [..., in] of every linear layer, whether it is quantized or not.

    It is shown before it is transformed and quantized, and before the layer reads its weight.
    """

    def only_inputs(site: QuantizedSite, role: str, x: Tensor, axis: int) -> None:
        if role == "activation":
            observer(site, x)

    with _observing([site for site in conversion.sites if site.kind == "linear"], only_inputs):
        yield


@contextmanager
def observe_keys(conversion: Conversion, observer: Callable[[QuantizedSite, Tensor], None]) -> Iterator[None]:
    """Show ``observer`` K (batch, heads, tokens, head_dim) of every attention that quantizes it, before it does."""

    def only_keys(site: QuantizedSite, role: str, x: Tensor, axis: int) -> None:
        if role == "k":
            observer(site, x.movedim(axis, -1))

    with _observing([site for site in conversion.sites if "k" in site.roles], only_keys):
        yield


@contextmanager
def _observing(sites: Iterable[QuantizedSite], observer: SiteObserver) -> Iterator[None]:
    """Have each of ``sites`` show its operands to ``observer``, as long as the context is open."""
    for site in sites:
        computer_of(site).set_observer(site.parameter, partial(observer, site))
    try:
        yield
    finally:
        for site in sites:
            computer_of(site).set_observer(site.parameter, None)


def count_scale_clamps(conversion: Conversion) -> dict[str, Counter[str]]:
    """Count clamped and overflowed shared scales by role, in all weights and in the first batch of activations.

    The counts (see :func:`mxlab.numerics.scale_clamps`) are complete after the model's next forward pass.
    """
    formats = [item for site in conversion.sites for by_role in site.by_phase.values() for item in by_role.items()]
    roles = sorted({role for role, fmt in formats if isinstance(fmt, MXFormat)} - {"bias", "output"})
    counts = {role: Counter(_COUNTS) for role in roles}
    if "weight" in counts:
        counts["weight"].update(conversion.weight_clamps)

    def count(site: QuantizedSite, role: str, x: Tensor, axis: int) -> None:
        fmt = site.formats.get(role)
        if role in counts and isinstance(fmt, MXFormat):
            counts[role].update(scale_clamps(x, fmt, axis))

    until_first_pass = ExitStack()
    until_first_pass.enter_context(observe(conversion, count))
    handle = conversion.model.register_forward_hook(lambda *_: until_first_pass.close())
    until_first_pass.callback(handle.remove)
    return counts


def count_weight_clamps(sites: Iterable[QuantizedSite]) -> dict[str, int]:
    """Count clamped and overflowed shared scales over the weights of ``sites``, before they are quantized."""
    total = Counter(_COUNTS)
    for site in track(sites, "counting clamped scales"):
        fmt = site.formats.get("weight")
        if isinstance(fmt, MXFormat) and not site.weight.is_meta:
            for role, matrix, axis in site.quantized_parameters():
                if role == "weight":
                    total.update(scale_clamps(matrix, fmt, axis))
    return dict(total)


def _call(observer: SiteObserver, site: QuantizedSite, role: str, x: Tensor, axis: int) -> Any:
    if role in site.roles:
        observer(site, role, x, axis)
