"""Sites: where in a model something can be quantized, and which site each rule of a recipe chooses.

Most architectures need no code here. A linear layer is a ``torch.nn.Linear``, or GPT-2's ``Conv1D``, which keeps its
weight transposed; experts are the 3-D parameters of a module that transformers marks as such; an attention is a module
whose forward takes a cache. Which part of the model a layer belongs to follows from what it lies in.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from mxlab.rules import Part

Kind = Literal["linear", "experts", "attention"]

# What transformers calls the cache in an attention's forward.
CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")
# The projections of a mixture of experts, each a parameter (experts, out, in), or (experts, in, out).
EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")

_ATTENTION = re.compile(r"Attention|Attn")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Site:
    """A linear layer, one weight of the experts, or an attention: a place that a rule can choose.

    Attributes:
        name: qualified name of the module; of experts, of the parameter.
        module: what is replaced or hooked.
        kind: ``linear``, ``experts`` or ``attention``.
        part: what it is for.
        layer: the decoder layer it lies in; None outside of them.
        weight: name of the weight among the module's parameters; none of an attention.
        input_axis: the axis of the weight that the product sums over.
        shape: of the weight; of an attention, (K/V heads, head_dim) where known.
    """

    name: str
    module: nn.Module
    kind: Kind
    part: Part
    layer: int | None
    weight: str = ""
    input_axis: int = -1
    shape: tuple[int, ...] = ()


def find(model: nn.Module) -> Iterator[Site]:
    """Every site of ``model``, in the order of its modules; nothing is changed."""
    attentions = {name for name, module in model.named_modules() if _ATTENTION.search(type(module).__name__)}
    for name, module in model.named_modules():
        layer = layer_of(name)
        if is_linear(module):
            yield _linear(name, module, layer, _part(model, name, layer, attentions))
        elif is_experts(module):
            yield from _experts(name, module, layer)
        elif name in attentions and cache_argument(module) and not _inner(model, name, attentions):
            yield attention(name, module)


def attention(name: str, module: nn.Module) -> Site:
    """The site that an attention is."""
    return Site(name, module, "attention", "attention", layer_of(name), shape=_kv_shape(module))


def layer_of(name: str) -> int | None:
    """The number of the decoder layer that a qualified name lies in: its first number."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def layer_count(model: nn.Module) -> int:
    """How many decoder layers the model has."""
    return 1 + max((n for name, _ in model.named_modules() if (n := layer_of(name)) is not None), default=-1)


def is_linear(module: nn.Module) -> bool:
    """Whether mxlab can convert it: a torch.nn.Linear or a Conv1D, but not a class derived from them."""
    return type(module) in (nn.Linear, Conv1D)


def is_experts(module: nn.Module) -> bool:
    """Whether transformers marks it as experts with 3-D weights, whose products can be told apart."""
    weights = _expert_weights(module) if hasattr(type(module), "_apply_gate") else []
    return bool(weights) and all(w.ndim == 3 for _, w in weights)


def cache_argument(attention: nn.Module) -> str | None:
    """The name under which the module's forward takes a cache; None where it takes none."""
    return next((name for name in CACHE_ARGUMENTS if takes(attention, name)), None)


def takes(module: nn.Module, argument: str) -> bool:
    """Whether the module's forward has that argument."""
    return argument in inspect.signature(module.forward).parameters


def _linear(name: str, module: nn.Module, layer: int | None, part: Part) -> Site:
    assert isinstance(module, nn.Linear | Conv1D)
    axis = 0 if isinstance(module, Conv1D) else -1
    return Site(name, module, "linear", part, layer, "weight", axis, tuple(module.weight.shape))


def _experts(name: str, module: nn.Module, layer: int | None) -> Iterator[Site]:
    axis = -2 if getattr(module, "is_transposed", False) else -1
    for weight, parameter in _expert_weights(module):
        yield Site(f"{name}.{weight}", module, "experts", "mlp", layer, weight, axis, tuple(parameter.shape))


def _expert_weights(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters(recurse=False) if name in EXPERT_WEIGHTS]


def _part(model: nn.Module, name: str, layer: int | None, attentions: set[str]) -> Part:
    if layer is None:
        return "head"
    if any(_within(name, attention) for attention in attentions):
        return "attention"
    parent = model.get_submodule(name.rpartition(".")[0])
    is_router = name.endswith("gate") and hasattr(parent, "experts")
    return "router" if is_router or "Router" in type(parent).__name__ else "mlp"


def _within(name: str, ancestor: str) -> bool:
    return name.startswith(f"{ancestor}.")


def _inner(model: nn.Module, name: str, attentions: set[str]) -> list[str]:
    """The attentions inside an attention: BERT's and GPT-Neo's wrap the one that computes."""
    return [other for other in attentions if _within(other, name) and cache_argument(model.get_submodule(other))]


def _kv_shape(attention: nn.Module) -> tuple[int, ...]:
    head_dim, k_proj = getattr(attention, "head_dim", None), getattr(attention, "k_proj", None)
    return (k_proj.out_features // head_dim, head_dim) if head_dim and isinstance(k_proj, nn.Linear) else ()
