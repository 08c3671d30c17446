"""Find the sites of a model: the places in it where something can be quantized.

No list of architectures is needed. A linear layer is a ``torch.nn.Linear``, whatever its class calls itself, or GPT-2's
``Conv1D``, which keeps its weight transposed; experts are the 3-D parameters of a module that transformers marks as
such; attentions, and the part of the model that a layer belongs to, follow from :mod:`mxlab.model.structure`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from mxlab.model.nn.linear import is_linear_layer
from mxlab.model.nn.packed import shape_of_weight
from mxlab.model.structure import Structure, own_matrices, stacked_weights
from mxlab.recipe.rule import Part

Kind = Literal["linear", "experts", "attention"]

# The projections of a mixture of experts, each a parameter (experts, out, in), or (experts, in, out), in their order.
EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Site:
    """A linear layer, a weight of experts or of a router, or an attention: a place that a rule can choose.

    Attributes:
        name: qualified name of the module; for experts, of the parameter.
        module: the module that is converted, or whose forward is replaced.
        kind: ``linear``, ``experts`` (routers too) or ``attention``.
        part: what the module is for; empty for an adapter.
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
    part: Part | Literal[""]
    layer: int | None
    parameter: str = ""
    input_axis: int = -1
    shape: tuple[int, ...] = ()
    obstacle: str = ""

    @property
    def module_name(self) -> str:
        """Qualified name of the module."""
        return self.name.removesuffix(f".{self.parameter}") if self.kind == "experts" else self.name


def find_sites(model: nn.Module, structure: Structure | None = None) -> Iterator[Site]:
    """Yield every site of ``model``, in the order of its modules; nothing is changed.

    Adapters that PEFT puts beside a layer are sites without a part: a rule reaches them by name only.
    """
    structure = structure or Structure(model)
    attentions = frozenset(structure.attentions)
    for name, module in model.named_modules():
        part = "" if is_adapter(model, name) else structure.part_of(name)
        if name in attentions:
            yield attention_site(name, module, structure)
        elif isinstance(module, nn.Linear | Conv1D):
            site = _linear(name, module, part, structure.layer_of(name))
            is_read = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
            yield replace(site, obstacle="its weight is read, its forward not called") if is_read else site
        else:
            yield from _own_weights(name, module, part, structure.layer_of(name))


def attention_site(name: str, module: nn.Module, structure: Structure) -> Site:
    """Return the site of an attention."""
    part = structure.part_of(name)
    return Site(name, module, "attention", part, structure.layer_of(name), shape=_kv_shape(module))


def is_adapter(model: nn.Module, name: str) -> bool:
    """Return whether a module belongs to an adapter of PEFT's, not to the layer that was adapted."""
    outer = name
    while outer:
        outer, _, child = outer.rpartition(".")
        if child in adapter_names(model.get_submodule(outer)):
            return True
    return False


def adapter_names(module: nn.Module) -> tuple[str, ...]:
    """Return what PEFT's layers call the children that are adapters; () for any other module."""
    return tuple(getattr(module, "adapter_layer_names", ()))


def multiplied_parameters(module: nn.Module, part: str) -> tuple[str, ...]:
    """Return the parameters that the forward of experts or of a router multiplies by, in order; else ()."""
    own = {name: p.ndim for name, p in module.named_parameters(recurse=False)}
    if part == "router":
        return ("weight",) if own.get("weight") == 2 else ()
    if hasattr(type(module), "_apply_gate"):  # transformers computes them, in one of several ways
        return tuple(name for name in EXPERT_WEIGHTS if own.get(name) == 3)
    return ()


def _linear(name: str, module: nn.Linear | Conv1D, part: Part | Literal[""], layer: int | None) -> Site:
    axis, shape = 0 if isinstance(module, Conv1D) else -1, shape_of_weight(module)
    if is_linear_layer(module):
        return Site(name, module, "linear", part, layer, "weight", axis, shape)
    if part == "router":
        return Site(name, module, "experts", part, layer, "weight", axis, shape)
    return Site(name, module, "linear", part, layer, "weight", axis, shape, "computes more than a linear layer does")


def _own_weights(name: str, module: nn.Module, part: Part | Literal[""], layer: int | None) -> Iterator[Site]:
    """Yield the weights of experts and routers, and with an obstacle those of modules that mxlab cannot follow."""
    names, obstacle = multiplied_parameters(module, part), ""
    axis = -2 if getattr(module, "is_transposed", False) else -1
    if not names and (isinstance(module, nn.MultiheadAttention) or _is_like_experts(module, part)):
        names = [n for n, p in module.named_parameters(recurse=False) if p.ndim > 1 and "bias" not in n]
        obstacle = "mxlab does not know its products"
    for weight in names:
        shape = tuple(getattr(module, weight).shape)
        site = name if weight == "weight" else f"{name}.{weight}"
        yield Site(site, module, "experts", part, layer, weight, axis, shape, obstacle)


def _is_like_experts(module: nn.Module, part: str) -> bool:
    """Return whether a module multiplies by parameters of its own: a matrix for each expert, or a router's."""
    if part not in ("mlp", "router", "attention") or isinstance(module, nn.Embedding):
        return False
    return bool(stacked_weights(module)) or (part != "attention" and own_matrices(module) > (part == "mlp"))


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
