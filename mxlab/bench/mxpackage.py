"""Microsoft's microxcaling (the package ``mx``) as a further contender, where it is installed; on its PyTorch path.

Whatever goes wrong in it becomes a note in the results.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import mxlab
from mxlab.bench.timing import Contender
from mxlab.formats import MXFormat, NumberFormat
from mxlab.recipe import Recipe, Rule

NAME = "mx package"
# It is some ten times slower than what it stands beside: seconds of samples in one case.
_TIME_LIMIT = 3.0
_NO_COLUMNS: Mapping[str, Any] = {}


def is_there() -> bool:
    """Return whether a package ``mx`` that is not ours can be found; nothing is imported."""
    try:
        spec = importlib.util.find_spec("mx")
    except (ImportError, ValueError):
        return False
    return spec is not None and Path(mxlab.__file__).parent not in Path(spec.origin or "/").parents


def quantizing(x: Tensor, fmt: MXFormat) -> Contender:
    """Return ``quantize_mx_op`` on ``x`` along the last axis."""

    def call(specs: dict[str, Any]) -> Tensor:
        quantize = importlib.import_module("mx.mx_ops").quantize_mx_op
        return quantize(x, specs, elem_format=fmt.element, axes=[-1], round=fmt.rounding)

    return _optional(lambda: functools.partial(call, _finalized(_specs(fmt, fmt))))


def computing(
    module: nn.Module, recipe: Recipe, call: Callable[[nn.Module], object], columns: Mapping[str, Any] = _NO_COLUMNS
) -> Contender | None:
    """Return ``call`` with a copy of ``module`` whose linear layers are mx's; None if it lacks what the recipe says."""
    if any(rule.is_attention for rule in recipe.rules):
        return None
    return _optional(lambda: functools.partial(call, _converted(module, recipe)), columns)


def _optional(prepare: Callable[[], Callable[[], object]], columns: Mapping[str, Any] = _NO_COLUMNS) -> Contender:
    """Return a contender that imports and prepares at its first call, where a failure is tolerated."""
    prepared = functools.cache(prepare)
    return Contender(NAME, lambda: prepared()(), columns, optional=True, time_limit=_TIME_LIMIT)


def _converted(module: nn.Module, recipe: Recipe) -> nn.Module:
    module = copy.deepcopy(module)
    for name, layer in list(module.named_modules()):
        rule = next((rule for rule in recipe.rules if rule.matches(name)), None)
        if rule is not None and isinstance(layer, nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, _linear(layer, rule, recipe))
    return module.eval()


def _linear(layer: nn.Linear, rule: Rule, recipe: Recipe) -> nn.Module:
    specs = {
        **_specs(rule.weight, rule.activation),
        "bfloat": recipe.elementwise.bfloat,
        "fp": recipe.elementwise.fp,
        "round_weight": recipe.elementwise.weight_rounding,
        "round_output": recipe.elementwise.output_rounding,
    }
    linear: Any = importlib.import_module("mx").Linear
    made = linear(layer.in_features, layer.out_features, bias=layer.bias is not None, mx_specs=_finalized(specs))
    made.weight, made.bias = layer.weight, layer.bias
    return made


def _specs(weight: NumberFormat | None, activation: NumberFormat | None) -> dict[str, Any]:
    fmt = weight or activation
    assert isinstance(fmt, MXFormat)
    assert weight is None or isinstance(weight, MXFormat)
    assert activation is None or isinstance(activation, MXFormat)
    return {
        "w_elem_format": weight and weight.element,
        "a_elem_format": activation and activation.element,
        "block_size": fmt.block_size,
        "scale_bits": fmt.scale_bits,
        "round": fmt.rounding,
        "custom_cuda": False,
    }


def _finalized(specs: dict[str, Any]) -> dict[str, Any]:
    return importlib.import_module("mx.specs").finalize_mx_specs(specs)
