"""Find the sites of a model: the places in it where something can be quantized.

No list of architectures is needed. A linear layer is a ``torch.nn.Linear``, or GPT-2's ``Conv1D``, which keeps its
weight transposed; experts are the 3-D parameters of a module that transformers marks as such; an attention is a module
whose forward takes a cache. The part of the model that a layer belongs to follows from the modules that contain it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from mxlab.recipe.rule import Part

Kind = Literal["linear", "experts", "attention"]

# What transformers calls the cache in an attention's forward.
CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")
# The projections of a mixture of experts, each a parameter (experts, out, in), or (experts, in, out), in their order.
EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")

_ATTENTION = re.compile(r"Attention|Attn")
_EXPERTS = re.compile(r"Expert")
_ROUTER = re.compile(r"Router|MoEGate")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Site:
    """A linear layer, a weight of experts or of a router, or an attention: a place that a rule can choose.

    Attributes:
        name: qualified name of the module; for experts, of the parameter.
        module: the module that is converted, or whose forward is replaced.
        kind: ``linear``, ``experts`` (routers too) or ``attention``.
        part: what the module is for.
        layer: number of the decoder layer that contains it; None outside the layers.
        parameter: name of the weight among the module's parameters; empty for an attention.
        input_axis: axis of the weight that the product sums over, along which its blocks lie: -1 for [out, in], 0 for
            Conv1D's [in, out], -1 or -2 for experts [experts, out, in] or [experts, in, out].
        shape: of the weight; for an attention (K/V heads, head_dim), or () where that is not known.
        obstacle: why mxlab cannot convert it; empty where it can.
    """

    name: str
    module: nn.Module
    kind: Kind
    part: Part
    layer: int | None
    parameter: str = ""
    input_axis: int = -1
    shape: tuple[int, ...] = ()
    obstacle: str = ""

    @property
    def module_name(self) -> str:
        """Qualified name of the module."""
        return self.name.removesuffix(f".{self.parameter}") if self.kind == "experts" else self.name


def find_sites(model: nn.Module) -> Iterator[Site]:
    """Yield every site of ``model``, in the order of its modules; nothing is changed."""
    attentions = {name for name, module in model.named_modules() if _ATTENTION.search(type(module).__name__)}
    for name, module in model.named_modules():
        if name in attentions and cache_argument(module) and not _inner(model, name, attentions):
            yield attention_site(name, module)
        elif isinstance(module, nn.Linear | Conv1D):
            yield _linear(name, module, _part(model, name, attentions))
        else:
            yield from _own_weights(name, module, _part(model, name, attentions))


def attention_site(name: str, module: nn.Module) -> Site:
    """Return the site of an attention."""
    return Site(name, module, "attention", "attention", layer_of(name), shape=_kv_shape(module))


def layer_of(name: str) -> int | None:
    """Return the decoder layer that a qualified name belongs to: its first number; None where it has none."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def layer_count(model: nn.Module) -> int:
    """Count the decoder layers of the model."""
    return 1 + max((n for name, _ in model.named_modules() if (n := layer_of(name)) is not None), default=-1)


def multiplied_parameters(module: nn.Module) -> tuple[str, ...]:
    """Return the parameters that the forward of experts or of a router multiplies by, in order; else ()."""
    own = {name: p.ndim for name, p in module.named_parameters(recurse=False)}
    if _ROUTER.search(type(module).__name__):
        return ("weight",) if own.get("weight") == 2 else ()
    if hasattr(type(module), "_apply_gate"):  # transformers computes them, in one of several ways
        return tuple(name for name in EXPERT_WEIGHTS if own.get(name) == 3)
    return ()


def cache_argument(attention: nn.Module) -> str | None:
    """Return the name of the forward's argument that is the cache; None where it takes none."""
    return next((name for name in CACHE_ARGUMENTS if takes_argument(attention, name)), None)


def takes_argument(module: nn.Module, argument: str) -> bool:
    """Return whether the module's forward has that argument."""
    return argument in inspect.signature(type(module).forward).parameters


def _linear(name: str, module: nn.Linear | Conv1D, part: Part) -> Site:
    axis, shape = 0 if isinstance(module, Conv1D) else -1, tuple(module.weight.shape)
    obstacle = "" if type(module) in (nn.Linear, Conv1D) else "a class derived from a linear layer's"
    return Site(name, module, "linear", part, layer_of(name), "weight", axis, shape, obstacle)


def _own_weights(name: str, module: nn.Module, part: Part) -> Iterator[Site]:
    """Yield the weights of experts and routers, and with an obstacle those of modules that mxlab cannot follow."""
    names, obstacle = multiplied_parameters(module), ""
    axis = -2 if getattr(module, "is_transposed", False) else -1
    if not names and (isinstance(module, nn.MultiheadAttention) or _is_like_experts(module)):
        names = [n for n, p in module.named_parameters(recurse=False) if p.ndim > 1 and "bias" not in n]
        obstacle = "mxlab does not know its products"
    for weight in names:
        shape = tuple(getattr(module, weight).shape)
        site = name if weight == "weight" else f"{name}.{weight}"
        yield Site(site, module, "experts", part, layer_of(name), weight, axis, shape, obstacle)


def _is_like_experts(module: nn.Module) -> bool:
    return any(pattern.search(type(module).__name__) for pattern in (_EXPERTS, _ROUTER))


def _part(model: nn.Module, name: str, attentions: set[str]) -> Part:
    if layer_of(name) is None:
        return "head"
    if name in attentions or any(_within(name, attention) for attention in attentions):
        return "attention"
    module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    is_gate = name.endswith("gate") and hasattr(parent, "experts")
    is_router = is_gate or any(_ROUTER.search(type(m).__name__) for m in (module, parent))
    return "router" if is_router else "mlp"


def _within(name: str, ancestor: str) -> bool:
    return name.startswith(f"{ancestor}.")


def _inner(model: nn.Module, name: str, attentions: set[str]) -> list[str]:
    """Return the attentions inside an attention: BERT's and GPT-Neo's wrap the one that computes."""
    return [other for other in attentions if _within(other, name) and cache_argument(model.get_submodule(other))]


def _kv_shape(attention: nn.Module) -> tuple[int, ...]:
    names = ("head_dim", "head_size", "attention_head_size")
    head_dim = next((n for name in names if isinstance(n := getattr(attention, name, None), int)), 0)
    if not head_dim:
        return ()
    k_proj, heads = getattr(attention, "k_proj", None), getattr(attention, "num_key_value_heads", None)
    if isinstance(k_proj, nn.Linear):
        heads = k_proj.out_features // head_dim
    heads = heads or _heads(attention)
    return (heads, head_dim) if heads else ()


def _heads(attention: nn.Module) -> int:
    config = getattr(attention, "config", None)
    names = ("num_key_value_heads", "num_heads", "n_heads", "num_attention_heads")
    found = (getattr(owner, name, None) for name in names for owner in (attention, config))
    return next((n for n in found if isinstance(n, int)), 0)
