"""microxcaling's options: parsed once, at the edge, into a frozen :class:`MxSpecs`, and from there into a Recipe.

They come as a mapping, as JSON in the environment variable ``MX_SPECS_JSON``, or from a command line. Two options are
ours: ``kv_elem_format`` and ``quantize_linear``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from mxlab import environment
from mxlab.checks import check_choice, check_int, suggestion
from mxlab.errors import FormatError, SpecError
from mxlab.formats import MICROXCALING_ROUNDINGS, MXFormat, element, elementwise_format
from mxlab.recipe import Elementwise, Recipe
from mxlab.recipe.rule import KV_ROLES, Rule

ENVIRONMENT_VARIABLE = environment.MX_SPECS

# Where Llama and its kin keep what Ex1 and Ex2 quantize.
LINEARS = r"(.*\.)?(q|k|v|o|gate|up|down)_proj"
ATTENTIONS = r"(.*\.)?self_attn"

# microxcaling's names of the scale rules, and ours.
SHARED_EXP_METHODS: dict[str, Any] = {"max": "floor", "none": "none"}


def _option(kind: str, default: Any, doc: str, **more: Any) -> Any:
    """``there`` is microxcaling's own default, where it differs; ``ours`` marks an option that it does not have."""
    return field(default=default, metadata={"kind": kind, "doc": doc, **more})


def _inert(kind: str, default: Any, doc: str) -> Any:
    """Return an option that microxcaling's specs hold but that the linear layers' forward pass does not read."""
    return _option(kind, default, doc, inert=True)


@dataclass(frozen=True)
class MxSpecs:
    """microxcaling's options and ours, each with its default: ``MxSpecs()`` is Ex1.

    A format of None (in JSON ``null`` or ``"none"``) switches its role off; a rounding of None follows ``round``.

    Raises:
        SpecError: a value that the option does not take.
    """

    w_elem_format: str | None = _option("format", "fp4_e2m1", "element format of linear weights", there=None)
    a_elem_format: str | None = _option("format", "fp6_e2m3", "element format of linear inputs", there=None)
    kv_elem_format: str | None = _option("format", None, "element format of keys and values", ours=True)
    quantize_linear: bool = _option("flag", True, "quantize linear layers at all", ours=True)
    block_size: int = _option("int", 32, "elements that share a scale; 0 for the whole axis", high=None, there=0)
    scale_bits: int = _option("int", 8, "bits of the shared exponent, 1 to 8; 0 means 8", high=8, there=0)
    shared_exp_method: str = _option("choice", "max", "the shared exponent", choices=tuple(SHARED_EXP_METHODS))
    mx_flush_fp32_subnorms: bool = _option("flag", False, "flush blocks of float32 subnormals to zero")
    bfloat: int = _option("int", 16, "bits of element-wise bfloat rounding, 10 to 32; 0 for none", high=32, there=0)
    fp: int = _option("int", 0, "bits of element-wise fp rounding, 7 to 29; 0 for none", high=29)
    bfloat_subnorms: bool = _option("flag", True, "keep subnormals in element-wise rounding")
    round: str = _option(
        "choice", "nearest", "rounding of all that is not set on its own", choices=MICROXCALING_ROUNDINGS
    )
    round_weight: str | None = _option("rounding", None, "element-wise rounding of weights and biases")
    round_output: str | None = _option("rounding", None, "element-wise rounding of activations")
    round_mx_output: str | None = _option("rounding", None, "MX rounding of weights, activations, keys and values")
    custom_cuda: bool = _option("flag", True, "exact numerics, on any device, not microxcaling's", there=False)

    quantize_backprop: bool = _inert("flag", True, "quantize in the backward pass")
    w_elem_format_bp: str | None = _inert("format", None, "element format of weights in the backward pass")
    a_elem_format_bp: str | None = _inert("format", None, "element format of saved activations in the backward pass")
    a_elem_format_bp_ex: str | None = _inert("format", None, "element format of output gradients, for the weight's")
    a_elem_format_bp_os: str | None = _inert("format", None, "element format of output gradients, for the input's")
    round_m: str | None = _inert("rounding", None, "rounding of the optimizer's moments")
    round_grad_weight: str | None = _inert("rounding", None, "element-wise rounding of weight and bias gradients")
    round_grad_input: str | None = _inert("rounding", None, "element-wise rounding of activation gradients")
    round_mx_input_grad_input: str | None = _inert("rounding", None, "MX rounding of matmul operands, backward")
    round_mx_weight_grad_input: str | None = _inert("rounding", None, "MX rounding of weights, backward")
    round_mx_grad_output_grad_input: str | None = _inert("rounding", None, "MX rounding with a_elem_format_bp_os")
    round_mx_input_grad_weight: str | None = _inert("rounding", None, "MX rounding of linear inputs, backward")
    round_mx_grad_output_grad_weight: str | None = _inert("rounding", None, "MX rounding with a_elem_format_bp_ex")
    softmax_exp2: bool = _inert("flag", False, "base-2 softmax")
    vec_use_exp2: bool = _inert("flag", False, "base-2 exponentials in vector operations")
    vec_use_recip: bool = _inert("flag", False, "reciprocals in vector operations")

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _checked(f.name, getattr(self, f.name)))
        try:
            elementwise_format(self.bfloat, self.fp)
        except FormatError as e:
            raise SpecError(str(e)) from None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str = "MX specs") -> MxSpecs:
        """Return the specs in a mapping, absent keys at their defaults; ``source`` names the mapping in errors.

        Raises:
            SpecError: an unknown key (the nearest known one is named), or a value that the option does not take.
        """
        for name in values:
            if name not in OPTIONS:
                raise SpecError(
                    f"{source}: unknown key {name!r}{suggestion(name, OPTIONS)}; known: {', '.join(OPTIONS)}"
                )
        try:
            return cls(**values)
        except SpecError as e:
            raise SpecError(f"{source}: {e}") from None

    @classmethod
    def from_json(cls, text: str, source: str = ENVIRONMENT_VARIABLE) -> MxSpecs:
        """Return the specs in a JSON text.

        Raises:
            SpecError: not JSON (line and column are given), not an object, or as :meth:`from_mapping`.
        """
        try:
            values = json.loads(text, object_pairs_hook=_unique_keys)
        except json.JSONDecodeError as e:
            raise SpecError(
                f"{source} is not valid JSON: {e.msg} at line {e.lineno}, column {e.colno} (character {e.pos}) "
                f"of {text!r}; unset it, or give an object such as {{}} (Ex1)"
            ) from None
        except SpecError as e:
            raise SpecError(f"{source}: {e}") from None
        if not isinstance(values, dict):
            raise SpecError(f"{source} holds {text!r}: it must be a JSON object, such as {{}} (Ex1)")
        return cls.from_mapping(values, source)

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] | None = None) -> MxSpecs | None:
        """Return the specs in ``MX_SPECS_JSON``; None where it is not set. Raises SpecError as :meth:`from_json`."""
        text = (environment.variables() if variables is None else variables).get(ENVIRONMENT_VARIABLE)
        return None if text is None else cls.from_json(text)

    def to_json(self) -> str:
        """Return the specs as JSON, every option spelled out."""
        return json.dumps(asdict(self))

    def to_recipe(self, name: str = "mx_specs") -> Recipe:
        """Return what these specs do to a Llama: linear projections and, with ``kv_elem_format``, K and V."""
        return override(Recipe(name), {k: v for k, v in asdict(self).items() if not _is_inert(k)})

    @property
    def without_effect(self) -> list[str]:
        """The options that are set to something but change nothing in the forward pass of the layers replaced."""
        return [f.name for f in fields(self) if _is_inert(f.name) and getattr(self, f.name) != f.default]


OPTIONS = {f.name: f for f in fields(MxSpecs)}


def override(recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    """Return ``recipe`` with microxcaling's ``options`` in place of its own; what is not named stays unchanged.

    Raises:
        SpecError: an unknown option, a value that it does not take, or an option that changes nothing here.
    """
    if recipe.inject:
        return _with_injected(recipe, options)
    for name in filter(_is_inert, options):
        raise SpecError(f"{name} has no effect on the layers that mxlab replaces: leave it out")
    given = {name: _checked(name, value) for name, value in options.items()}
    elementwise = _elementwise(recipe.elementwise, given)
    rules = _with_linear_formats(recipe, given)
    if "kv_elem_format" in given:
        rules = _with_kv_format(recipe, rules, given["kv_elem_format"])
    rules = tuple(r for r in rules if r.skip or r.formats or elementwise.is_used)
    if all(r.skip for r in rules):
        rules = ()
    recipe = replace(recipe, rules=rules, elementwise=elementwise).map_formats(**_format_changes(given))
    if "custom_cuda" in given:
        recipe = replace(recipe, numerics="exact" if given["custom_cuda"] else "microxcaling")
    return recipe


def injected_options(recipe: Recipe) -> dict[str, Any]:
    """Return the options that a recipe hands to ``inject_pyt_ops``, ``custom_cuda`` among them.

    Raises:
        SpecError: an option that microxcaling does not have, a value that it does not take, or no format at all.
    """
    for name in (name for name in recipe.inject if name in OPTIONS and OPTIONS[name].metadata.get("ours")):
        raise SpecError(f"recipe {recipe.name}, inject: {name} is not an option of microxcaling's")
    try:
        given = {name: _checked(name, value) for name, value in recipe.inject.items()}
        elementwise_format(given.get("bfloat", 0), given.get("fp", 0))
    except (FormatError, SpecError) as e:
        raise SpecError(f"recipe {recipe.name}, inject: {e}") from None
    if not any(value for name, value in given.items() if "elem_format" in name or name in ("bfloat", "fp")):
        raise SpecError(f"recipe {recipe.name}, inject: no format, bfloat or fp is given, so nothing is quantized")
    return {**given, "custom_cuda": recipe.numerics == "exact"}


def _with_injected(recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    """Return a recipe that injects with these options over its own."""
    given = {**recipe.inject, **options}
    custom_cuda = _checked("custom_cuda", given.pop("custom_cuda", recipe.numerics == "exact"))
    recipe = replace(recipe, inject=given, numerics="exact" if custom_cuda else "microxcaling")
    injected_options(recipe)  # raises
    return recipe


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return ``block_size=16`` as a name and a value, read as JSON where it is JSON, else as text.

    Raises:
        SpecError: no ``=``.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise SpecError(f"cannot read {text!r}: write name=value, such as block_size=16")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), value.strip()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` microxcaling's command-line options; those not on the command line are left out of its result."""
    for name, f in OPTIONS.items():
        dashed, about = name.replace("_", "-"), f.metadata
        doc = f"{about['doc']}; no effect here" if _is_inert(name) else about["doc"]
        spellings = dict.fromkeys((f"--{name}", f"--{dashed}"))
        common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        if about["kind"] == "flag":
            parser.add_argument(*spellings, **common, action="store_true", help=doc)
            off = dict.fromkeys((f"--no-{name}", f"--no-{dashed}", f"--no_{name}"))
            parser.add_argument(*off, **common, action="store_false", help=f"not --{name}")
        else:
            kind = int if about["kind"] == "int" else str
            help = f"{doc} (default: {f.default})"
            parser.add_argument(*spellings, **common, type=kind, metavar=kind.__name__.upper(), help=help)


def _is_inert(name: str) -> bool:
    return name in OPTIONS and OPTIONS[name].metadata.get("inert", False)


def _checked(name: str, value: Any) -> Any:
    """Return the value of an option, a format in its canonical spelling; raise SpecError if it does not take it."""
    if name not in OPTIONS:
        raise SpecError(f"unknown option {name!r}{suggestion(name, OPTIONS)}; known: {', '.join(OPTIONS)}")
    about = OPTIONS[name].metadata
    try:
        match about["kind"]:
            case "format" if value is not None and not isinstance(value, str):
                raise FormatError(f"{value!r} is not the name of a format: write it like 'fp4_e2m1'")
            case "format":
                return None if value is None or value == "none" else element(value).name
            case "int":
                check_int(name, value, 0, about["high"], f"a whole number: {about['doc']}")
            case "flag" if not isinstance(value, bool):
                raise FormatError(f"{name} is {value!r}: it must be true or false")
            case "rounding" if value is not None:
                check_choice(name, value, MICROXCALING_ROUNDINGS)
            case "choice":
                check_choice(name, value, about["choices"])
    except FormatError as e:
        raise SpecError(f"{name}: {e}" if about["kind"] == "format" else str(e)) from None
    return value


def _with_linear_formats(recipe: Recipe, given: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Set the element formats of weights and activations, in a rule of their own where the recipe has none."""
    if given.get("quantize_linear") is False:
        return tuple(r for r in recipe.rules if r.skip or r.is_attention)
    chosen = {role: given[key] for role, key in _LINEAR_OPTIONS.items() if key in given}
    rules = recipe.rules
    if all(r.skip or r.is_attention for r in rules) and (given.get("quantize_linear") or any(chosen.values())):
        rules = (*(r for r in rules if r.skip), Rule(LINEARS), *(r for r in rules if not r.skip))
    return tuple(
        r
        if r.skip or r.is_attention
        else replace(r, **{role: _reformat(recipe, r, role, name) for role, name in chosen.items()})
        for r in rules
    )


_LINEAR_OPTIONS = {"weight": "w_elem_format", "activation": "a_elem_format"}


def _with_kv_format(recipe: Recipe, rules: tuple[Rule, ...], name: str | None) -> tuple[Rule, ...]:
    """Set the element format of K and V in all rules of attentions, or in a new one; other roles stay."""
    if name is not None and not any(r.is_attention for r in rules):
        rules = (*rules, Rule(part="attention") if any(r.part for r in rules) else Rule(ATTENTIONS))
        changed = rules[-1:]
    else:
        changed = tuple(r for r in rules if r.is_attention)
    return tuple(
        replace(r, **{role: _reformat(recipe, r, role, name) for role in KV_ROLES}) if r in changed else r
        for r in rules
        if name is not None or set(r.formats) - set(KV_ROLES) or not r.is_attention
    )


def _reformat(recipe: Recipe, rule: Rule, role: str, name: str | None) -> MXFormat | None:
    """Return the format of ``role`` with the element ``name``; the rest as it was, or as in the other formats."""
    if name is None:
        return None
    was = getattr(rule, role) or next(iter(recipe.formats), None)
    return replace(was, element=name) if isinstance(was, MXFormat) else MXFormat(name)


def _format_changes(given: Mapping[str, Any]) -> dict[str, Any]:
    names = {"block_size": "block_size", "scale_bits": "scale_bits", "flush_fp32_subnorms": "mx_flush_fp32_subnorms"}
    changes = {ours: given[theirs] for ours, theirs in names.items() if theirs in given}
    if "shared_exp_method" in given:
        changes["scale_rule"] = SHARED_EXP_METHODS[given["shared_exp_method"]]
    return changes | _rounding("rounding", "round_mx_output", given)


def _elementwise(was: Elementwise, given: Mapping[str, Any]) -> Elementwise:
    names = {"bfloat": "bfloat", "fp": "fp", "subnormals": "bfloat_subnorms"}
    changes = {ours: given[theirs] for ours, theirs in names.items() if theirs in given}
    changes |= _rounding("weight_rounding", "round_weight", given)
    changes |= _rounding("output_rounding", "round_output", given)
    try:
        return replace(was, **changes)
    except FormatError as e:
        raise SpecError(str(e)) from None


def _rounding(ours: str, theirs: str, given: Mapping[str, Any]) -> dict[str, Any]:
    rounding = given.get(theirs) or given.get("round")
    return {ours: rounding} if rounding else {}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise SpecError(f"the key {next(n for n in names if names.count(n) > 1)!r} is given twice")
    return values
