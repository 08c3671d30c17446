"""A rule of a recipe: which modules, and the format of each of their roles. Nothing here needs torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from mxlab.checks import check_choice, check_keys
from mxlab.errors import FormatError, SpecError
from mxlab.formats import NumberFormat, parse_format
from mxlab.recipe.transform import Derotated, Transform, Wush, parse_transform

Part = Literal["mlp", "attention", "mixer", "router", "head", "vision", "all"]
Phase = Literal["prefill", "decode"]
PARTS: tuple[Part, ...] = get_args(Part)
PHASES: tuple[Phase, ...] = get_args(Phase)

LINEAR_ROLES = ("weight", "activation", "bias", "output")
KV_ROLES = ("k", "v")
ATTENTION_ROLES = (*KV_ROLES, "q", "p", "softmax", "rope")
ROLES = LINEAR_ROLES + ATTENTION_ROLES
TRANSFORMED_LINEAR_ROLES = ("weight", "activation")
TRANSFORMED_ATTENTION_ROLES = (*KV_ROLES, "q")
TRANSFORMED_ROLES = (*TRANSFORMED_LINEAR_ROLES, *TRANSFORMED_ATTENTION_ROLES)
DEROTATED_ROLES = ("activation", *KV_ROLES)
SELECTORS = ("modules", "type", "name", "part")
_FLAGS = ("skip", "bias_optional", "k_offset")

_LAYERS = re.compile(r"(?P<first>[0-9]+)(-(?P<last>[0-9]+))?|(?P<from_end>-[0-9]+)")


@dataclass(frozen=True)
class Rule:
    """Formats for the modules that one selector, and ``layers`` where given, choose. None leaves a role unchanged.

    The selector is one of four:

    - ``modules``: a regular expression that the qualified name matches as a whole;
    - ``type``: the name of the module's class (``Linear``, ``LlamaAttention``);
    - ``name``: one qualified name;
    - ``part``: what a module is for, whatever it is called (:mod:`mxlab.model.sites`): ``mlp`` and ``attention`` of the
      decoder layers, ``router`` of a mixture of experts, ``head`` (all outside the layers), or ``all``.

    Roles of a linear layer, quantized along the dimension it sums over: ``weight``, ``activation`` (its input); along
    their last axis: ``bias``, ``output``. Roles of an attention: ``k`` (after the rotary embedding), ``v`` and ``q``
    (the query into QKᵀ) along head_dim; ``softmax`` (its input) and ``p`` (the probabilities into PV) along the keys;
    ``rope`` (the cosines and sines) along head_dim. With ``skip`` the modules stay in high precision.

    A ``transform`` is applied to both operands of the product, before they are quantized: to the weight and the
    activation of a linear layer along the dimension it sums over, to ``k``, ``q`` and ``v`` along head_dim. The
    transform ``derotated_hadamard`` is applied to ``activation``, ``k`` and ``v`` alone, and undone after quantizing.

    With ``k_offset`` the mean of ``k`` over a calibration text, one number for each element of each head, is taken off
    before it is quantized and added again afterwards (:mod:`mxlab.ptq.offsets`).

    Attributes:
        layers: decoder layers, such as ``0-3, 8, -1``; ranges include both ends, -1 is the last layer.
        phase: ``decode``, the passes that add one token to a cache that holds others, or ``prefill``, all others. A
            rule without a phase is for both.
        bias_optional: that none of the layers has a bias is no error where the rule gives ``bias``.

    Raises:
        SpecError: no selector or several, a pattern or layers that cannot be read, roles that contradict each other.
    """

    modules: str | None = None
    type: str | None = None
    name: str | None = None
    part: Part | None = None
    layers: str | None = None
    phase: Phase | None = None
    skip: bool = False
    weight: NumberFormat | None = None
    activation: NumberFormat | None = None
    bias: NumberFormat | None = None
    output: NumberFormat | None = None
    k: NumberFormat | None = None
    v: NumberFormat | None = None
    q: NumberFormat | None = None
    p: NumberFormat | None = None
    softmax: NumberFormat | None = None
    rope: NumberFormat | None = None
    transform: Transform | None = None
    bias_optional: bool = False
    k_offset: bool = False

    def __post_init__(self) -> None:
        self._check_selector()
        if self.layers is not None:
            object.__setattr__(self, "layers", ", ".join(_items(self.layers, self)))
        for flag in _FLAGS:
            if not isinstance(getattr(self, flag), bool):
                raise SpecError(f"{self}: {flag} is {getattr(self, flag)!r}: it must be true or false")
        if self.bias_optional and not self.bias:
            raise SpecError(f"{self} says bias_optional but gives no format for bias: take it out, or give one")
        if self.k_offset and not self.k:
            raise SpecError(f"{self} says k_offset but gives no format for k: take it out, or give one")
        if self.skip and self.formats:
            raise SpecError(f"{self} skips its modules and gives formats for {', '.join(self.formats)}: one or other")
        if self.transform is not None:
            self._read_transform(self.transform)
        if self.is_attention and any(role in self.formats for role in LINEAR_ROLES):
            raise SpecError(f"{self} gives formats for a linear layer and for an attention: write two rules")

    def _read_transform(self, given: object) -> None:
        transform = parse_transform(given)
        object.__setattr__(self, "transform", transform)
        if not any(role in self.formats for role in TRANSFORMED_ROLES):
            raise SpecError(f"{self} gives a transform, and no format for what it transforms: give one")
        if isinstance(transform, Wush) and self.is_attention:
            raise SpecError(f"{self}: {transform} is fitted to a linear layer; for k, v and q take 'hadamard'")
        if isinstance(transform, Derotated) and not any(role in self.formats for role in DEROTATED_ROLES):
            raise SpecError(
                f"{self}: {transform} transforms {', '.join(DEROTATED_ROLES)}, and there is no format for any of "
                "them: give one, or take 'hadamard'"
            )

    def _check_selector(self) -> None:
        given = [name for name in SELECTORS if getattr(self, name) is not None]
        if len(given) != 1:
            raise SpecError(
                f"a rule selects by one of {', '.join(SELECTORS)}; this one has {' and '.join(given) or 'none'}"
            )
        try:
            if self.modules is not None:
                re.compile(self.modules)
            if self.part is not None:
                check_choice("part", self.part, PARTS)
            if self.phase is not None:
                check_choice("phase", self.phase, PHASES)
        except (re.error, TypeError) as e:
            raise SpecError(f"modules = {self.modules!r} is not a regular expression: {e}") from None
        except FormatError as e:
            raise SpecError(str(e)) from None

    @property
    def is_attention(self) -> bool:
        """Whether the rule speaks of attentions (k, v, ...) rather than of linear layers."""
        return any(role in self.formats for role in ATTENTION_ROLES)

    @property
    def formats(self) -> dict[str, NumberFormat]:
        """The roles that are quantized, and their formats."""
        return {role: fmt for role in ROLES if (fmt := getattr(self, role)) is not None}

    @property
    def is_fitted(self) -> bool:
        """Whether it takes a calibration text to fit what the rule asks for, whatever chooses the weights."""
        return self.k_offset or isinstance(self.transform, Wush)

    def matches(self, name: str, type: str = "", part: str = "") -> bool:
        """Return whether the selector chooses a module of that qualified name, class name and part; layers aside."""
        if self.modules is not None:
            return re.fullmatch(self.modules, name) is not None
        if self.part is not None:
            return bool(part) and self.part in (part, "all")
        return self.name == name if self.name is not None else self.type == type

    def layer_numbers(self, count: int) -> frozenset[int] | None:
        """Return the decoder layers, of ``count``, that the rule is for; None: all, and what is outside them.

        Raises:
            SpecError: a layer that the model lacks.
        """
        if self.layers is None:
            return None
        numbers = [n for item in _items(self.layers, self) for n in _numbers(item, count)]
        if wrong := [n for n in numbers if not 0 <= n < count]:
            raise SpecError(f"{self} names layer {wrong[0]}: the model has {count}, numbered from 0")
        return frozenset(numbers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as in the TOML file; what is None or false is left out."""
        keys = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ROLES}
        if self.transform is not None:
            keys["transform"] = str(self.transform)
        return {k: v for k, v in keys.items() if v not in (None, False)} | {r: str(f) for r, f in self.formats.items()}

    @classmethod
    def from_dict(cls, values: object, source: str) -> Rule:
        """Return the rule these plain values describe; ``source`` names it in errors.

        Raises:
            SpecError: not a table, an unknown key, or a value that is not what the key asks for.
        """
        if not isinstance(values, Mapping):
            raise SpecError(f"{source}: a rule is a table with modules = '<regular expression>' and formats")
        check_keys(values, [f.name for f in fields(cls)], source)
        try:
            plain: dict[str, Any] = {k: _text(k, v) for k, v in values.items() if k not in (*ROLES, *_FLAGS)}
            formats: dict[str, Any] = {role: parse_format(values[role]) for role in ROLES if role in values}
            return cls(**plain, **formats, **{flag: values[flag] for flag in _FLAGS if flag in values})
        except (FormatError, SpecError) as e:
            raise SpecError(f"{source}: {e}") from None

    def __str__(self) -> str:
        key = next(name for name in SELECTORS if getattr(self, name) is not None)
        more = [f"{k} = {v!r}" for k in ("layers", "phase") if (v := getattr(self, k)) is not None]
        return "the rule for " + ", ".join([f"{key} = {getattr(self, key)!r}", *more])


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise SpecError(f"{key} is {value!r}: it must be a text")
    return value


def _items(layers: str, rule: Rule) -> list[str]:
    items = [item.strip() for item in str(layers).split(",")]
    for item in items:
        match = _LAYERS.fullmatch(item)
        if not match or (match["last"] and int(match["last"]) < int(match["first"])):
            raise SpecError(f"{rule}: cannot read {item!r}: layers are written like '0-3, 8, -1'")
    return items


def _numbers(item: str, count: int) -> range:
    """Return the layer numbers one item stands for; those outside the model are left in, for the caller to find."""
    match = _LAYERS.fullmatch(item)
    assert match is not None  # _items looked
    if match["from_end"]:
        number = count + int(item)
        return range(number, number + 1)
    return range(int(match["first"]), int(match["last"] or match["first"]) + 1)
