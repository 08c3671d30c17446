"""Tell what the modules of a model are for, from how they are put together; names and classes are not looked at.

The decoder layers are the list of modules in which the modules are that take the cache. What mixes tokens takes the
cache, a mask or positions; an attention writes K and V to the cache, any other is a mixer (linear attention, a state
space, a short convolution). Experts are equal modules, or slices of one parameter, under a common parent; its child
with an output for each of them is their router. A model inside the model that is not the one with the decoder layers
reads images or sounds.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from functools import cache, cached_property
from types import CodeType
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mxlab.recipe.rule import Part

# What transformers calls the cache in a forward.
CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")
_STATE_ARGUMENTS = ("cache_params", "use_cache", "state")
# By what a module that mixes tokens is told: it is told of a cache, of other positions or of a mask.
_CERTAIN = (
    *CACHE_ARGUMENTS, "cache_params", "use_cache",
    "attention_mask", "key_padding_mask", "position_ids", "position_embeddings", "cache_position",
)  # fmt: skip
_WEAK = ("state", "mask", "attn_mask_h")  # where no module of the model takes any of these
# How an attention computes: by itself, or by what transformers chooses for it.
_SOFTMAXES = frozenset((
    "softmax", "scaled_dot_product_attention", "multi_head_attention_forward",
    "eager_attention_forward", "ALL_ATTENTION_FUNCTIONS",
))  # fmt: skip
_CACHE_WRITE = "update"  # the method of a cache that takes K and V


class Structure:
    """The structure of one model; everything by the qualified names of its modules."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._expert_counts: dict[str, int] = {}

    @cached_property
    def layer_lists(self) -> dict[str, int]:
        """The lists of decoder layers by name, with the number of their first layer: one, in nearly all models.

        Others count where they hold layers of the same classes as the one with most modules that mix tokens. Where a
        model of one's own tells its modules of nothing but hidden states, it is the list with most parameters.
        """
        takers = [name for name in self._mixers if takes_cache(self._modules[name])]
        found = Counter(filter(None, map(self._outermost_list, takers or self._mixers))) or self._lists_by_size()
        if not found:
            return {}
        kinds = self._kinds(max(found, key=lambda name: found[name]))
        lists, first = {}, 0
        for name in found:
            if self._kinds(name) & kinds:
                lists[name] = first
                first += len(self._list(name))
        return lists

    @property
    def layer_count(self) -> int:
        """How many decoder layers there are."""
        return sum(len(self._list(name)) for name in self.layer_lists)

    def layer_of(self, name: str) -> int | None:
        """Return the number of the decoder layer that a module belongs to; None outside of the layers."""
        for layers, first in self.layer_lists.items():
            if name.startswith(f"{layers}."):
                return first + int(name.removeprefix(f"{layers}.").partition(".")[0])
        return None

    @cached_property
    def attentions(self) -> tuple[str, ...]:
        """The modules in the decoder layers that compute attention over K and V which they write to the cache."""
        return tuple(n for n in self._mixers if self.layer_of(n) is not None and writes_cache(self._modules[n]))

    def part_of(self, name: str) -> Part:
        """Return what a module is for."""
        if self.layer_of(name) is None:
            return "vision" if self._is_of_tower(name) else "head"
        mixer = self._mixer_around(name)
        if mixer is not None:
            return "attention" if computes_attention(self._modules[mixer]) else "mixer"
        return "router" if self._is_router(name) else "mlp"

    @cached_property
    def _mixers(self) -> list[str]:
        """The modules that mix tokens: those that write to the cache, and beside these the innermost ones.

        What is inside of an attention is a part of it, such as an indexer that chooses the keys.
        """
        takers = self._taking(_CERTAIN) or self._taking(_WEAK)
        writers = {name for name, module in takers.items() if writes_cache(module)}
        writers = {name for name in writers if writers.isdisjoint(_ancestors(name))}
        around = {ancestor for name in takers for ancestor in _ancestors(name)}
        innermost = {n for n in takers if n not in around and writers.isdisjoint(_ancestors(n))}
        # A layer without a mixer of its own beside layers that have one is told of masks and positions for nothing.
        holders = {name.rpartition(".")[0] for name in around if isinstance(self._parent(name), nn.ModuleList)}
        return [n for n in takers if n in writers | innermost and n.rpartition(".")[0] not in holders]

    def _taking(self, arguments: tuple[str, ...]) -> dict[str, nn.Module]:
        """Return the modules with weights, models aside, whose forward takes one of these arguments."""
        return {
            name: module
            for name, module in self._modules.items()
            if name and not isinstance(module, PreTrainedModel) and _takes(module, arguments) and _has_weights(module)
        }

    def _lists_by_size(self) -> Counter[str]:
        """Return the outermost lists of modules, with how many parameters they hold."""
        lists = {name: m for name, m in self._modules.items() if isinstance(m, nn.ModuleList)}
        outermost = {name: m for name, m in lists.items() if not any(outer in lists for outer in _ancestors(name))}
        return Counter({name: sum(p.numel() for p in m.parameters()) for name, m in outermost.items()})

    def _parent(self, name: str) -> nn.Module:
        return self._modules[name.rpartition(".")[0]]

    def _list(self, name: str) -> nn.ModuleList:
        return self._modules[name]  # pyright: ignore[reportReturnType]

    def _kinds(self, layers: str) -> set[type]:
        return {type(layer) for layer in self._list(layers)}

    def _outermost_list(self, name: str) -> str | None:
        """Return the outermost list of modules around a module."""
        lists = (n for n in reversed(list(_ancestors(name))) if isinstance(self._modules[n], nn.ModuleList))
        return next(lists, None)

    def _mixer_around(self, name: str) -> str | None:
        """Return the mixer that a module is a part of, or that it wraps with no more than a projection of its own."""
        around = next((n for n in (name, *_ancestors(name)) if n in self._mixer_names), None)
        if around is not None:
            return around
        for outer in (name, *_ancestors(name)):
            if outer.rpartition(".")[0] in self.layer_lists:
                return None
            if inside := self._mixers_inside.get(outer):
                return inside[0] if self._is_wrapper(outer, inside) else None
        return None

    @cached_property
    def _mixer_names(self) -> frozenset[str]:
        return frozenset(self._mixers)

    @cached_property
    def _mixers_inside(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self._mixers:
            for ancestor in _ancestors(name):
                found.setdefault(ancestor, []).append(name)
        return found

    def _is_wrapper(self, name: str, mixers: list[str]) -> bool:
        """Return whether each child beside the mixers is at most one projection: BERT's attention, not a layer."""
        own = [child for child in self._modules[name].children() if not any(child is self._modules[m] for m in mixers)]
        return all(sum(1 for m in child.modules() if _is_projection(m)) <= 1 for child in own)

    def _is_router(self, name: str) -> bool:
        """Return whether a module beside experts has an output for each of them, or is a gate with one output."""
        for inner, outer in _pairs(name):
            experts = self._expert_count(outer)
            if not experts:
                continue
            child = self._modules[inner]
            widths = [width for module in child.modules() if (width := _output_width(module))]
            return len(widths) == 1 and (widths[0] == 1 or experts <= widths[0] <= 2 * experts)
        return False

    def _expert_count(self, name: str) -> int:
        """Return how many experts a child of the module holds; 0 where none does."""
        if name not in self._expert_counts:
            children = self._modules[name].children()
            self._expert_counts[name] = max((expert_count(child) for child in children), default=0)
        return self._expert_counts[name]

    def _is_of_tower(self, name: str) -> bool:
        """Return whether a module outside of the decoder layers serves another modality: no cache, no text."""
        around = [n for n in (name, *_ancestors(name)) if n and not any(_is_within(x, n) for x in self.layer_lists)]
        if any(self._is_tower(inner) for outer in around for inner in self._models if _is_within(inner, outer)):
            return True
        config: Any = getattr(self._model, "config", None)
        if config is None or not hasattr(config, "get_text_config") or config.get_text_config(decoder=True) is config:
            return False
        head = self._model.get_output_embeddings() if isinstance(self._model, PreTrainedModel) else None
        return not self._is_in_text_model(name) and self._modules[name] is not head

    def _is_in_text_model(self, name: str) -> bool:
        layers = next(iter(self.layer_lists), "")
        text = next((n for n in _ancestors(layers) if isinstance(self._modules[n], PreTrainedModel)), "")
        return not text or name == text or name.startswith(f"{text}.")

    @cached_property
    def _models(self) -> list[str]:
        return [name for name, module in self._modules.items() if name and isinstance(module, PreTrainedModel)]

    def _is_tower(self, model: str) -> bool:
        """Return whether a model inside the model takes no cache anywhere."""
        return bool(self.layer_lists) and not any(
            n.startswith(f"{model}.") and takes_cache(self._modules[n]) for n in self._mixers
        )


def expert_count(module: nn.Module) -> int:
    """Return how many experts a module holds: equal modules in a list, or slices of its 3-D parameters; 0: none."""
    if (own := stacked_weights(module)) or (own_matrices(module) > 1 and hasattr(module, "moe_num_experts")):
        return own[0].shape[0] if own else module.moe_num_experts  # pyright: ignore[reportReturnType]
    if isinstance(module, nn.ModuleList):
        # LongCat's have experts among them that do nothing, and so hold nothing.
        shapes = [s for child in module if (s := [(n, tuple(p.shape)) for n, p in child.named_parameters()])]
        is_equal = len(shapes) > 1 and all(s == shapes[0] for s in shapes)
        is_multiplied = is_equal and any(len(shape) > 1 for _, shape in shapes[0])
        return len(module) if is_multiplied and not any(_takes(child, _CERTAIN) for child in module) else 0
    return max((expert_count(child) for child in module.children()), default=0) if _is_shell(module) else 0


def stacked_weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the 3-D parameters of a module's own, a convolution's aside: a matrix for each expert."""
    is_convolution = isinstance(module, nn.modules.conv._ConvNd)
    return [] if is_convolution else [p for p in module.parameters(recurse=False) if p.ndim == 3]


def own_matrices(module: nn.Module) -> int:
    """Count the 2-D parameters of a module's own."""
    return sum(p.ndim == 2 for p in module.parameters(recurse=False))


def cache_argument(module: nn.Module) -> str | None:
    """Return the name of the forward's argument that is the cache; None where it takes none."""
    return next((name for name in CACHE_ARGUMENTS if takes_argument(module, name)), None)


def takes_argument(module: nn.Module, argument: str) -> bool:
    """Return whether the module's forward has that argument."""
    return _takes(module, (argument,))


def takes_cache(module: nn.Module) -> bool:
    """Return whether the module's forward takes a cache, or the state of a recurrence."""
    return _takes(module, (*CACHE_ARGUMENTS, *_STATE_ARGUMENTS))


def writes_cache(module: nn.Module) -> bool:
    """Return whether the module's forward takes a cache and hands it K and V."""
    return cache_argument(module) is not None and _CACHE_WRITE in _names_in(type(module).forward)


def computes_attention(module: nn.Module) -> bool:
    """Return whether a module that mixes tokens is an attention.

    It writes to the cache, or it or a module inside it computes a softmax.
    """
    return writes_cache(module) or any(_calls_softmax(type(inner)) for inner in module.modules())


def _has_weights(module: nn.Module) -> bool:
    return any(_is_projection(m) for m in module.modules())


def _takes(module: nn.Module, arguments: tuple[str, ...]) -> bool:
    return not _parameters(type(module)).isdisjoint(arguments)


@cache
def _parameters(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


@cache
def _calls_softmax(kind: type[nn.Module]) -> bool:
    return any(not _SOFTMAXES.isdisjoint(_names_in(method)) for method in vars(kind).values() if callable(method))


def _names_in(function: Any) -> frozenset[str]:
    """Return the names of attributes and globals in the code of a function."""
    code: CodeType | None = getattr(inspect.unwrap(function), "__code__", None)
    return frozenset(code.co_names) if code else frozenset()


def _is_projection(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D) or any(p.ndim > 1 for p in module.parameters(recurse=False))


def _output_width(module: nn.Module) -> int:
    """Return the outputs of a module with a weight [out, in] of its own; 0 for one without."""
    weights = [p for p in module.parameters(recurse=False) if p.ndim == 2]
    return weights[0].shape[0] if len(weights) == 1 else 0


def _is_shell(module: nn.Module) -> bool:
    """Return whether a module holds nothing but one child."""
    return len(list(module.children())) == 1 and not any(True for _ in module.parameters(recurse=False))


def _is_within(name: str, outer: str) -> bool:
    return f"{name}.".startswith(f"{outer}.")


def _ancestors(name: str) -> Iterator[str]:
    """Yield the names of the modules around a module, from the inside, the model itself last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _pairs(name: str) -> Iterator[tuple[str, str]]:
    """Yield each module from this one outwards with the one around it."""
    for outer in _ancestors(name):
        yield name, outer
        name = outer
