"""microxcaling's options as its scripts hand them around: a dictionary with defaults, and what fills it in.

The options are those of :data:`mxlab.recipe.mx_specs.OPTIONS`, with microxcaling's own defaults: nothing is quantized.
"""

from __future__ import annotations

import argparse
import json
import logging
import traceback
from collections import UserDict
from collections.abc import Mapping, MutableMapping
from dataclasses import Field
from typing import Any, ClassVar

from mxlab import environment
from mxlab.checks import suggestion
from mxlab.errors import SpecError
from mxlab.recipe.mx_specs import OPTIONS

logger = logging.getLogger("mxlab")


def _default(option: Field) -> Any:
    fallback = "nearest" if option.metadata["kind"] == "rounding" else option.default
    return option.metadata.get("there", fallback)


DEFAULTS = {name: _default(option) for name, option in OPTIONS.items() if "ours" not in option.metadata}


def _base(name: str) -> str | None:
    """Return the option that ``name`` follows where it is not given."""
    if "_elem_format_bp" in name:
        return name.partition("_bp")[0]
    if name.startswith("round_mx_") and "grad" in name:
        return "round_grad_input"
    return "round" if name.startswith("round_") else None


_BASES = {name: base for name in DEFAULTS if (base := _base(name))}
_FORMATS = [name for name in DEFAULTS if "elem_format" in name]


class UnknownOptionError(SpecError, KeyError, AssertionError):
    """An option that microxcaling does not have; of the types it raises there, too."""

    __str__ = Exception.__str__  # a KeyError would show its message in quotes


class MxSpecs(UserDict):
    """microxcaling's options, those not given at their defaults.

    Raises:
        UnknownOptionError: an option that microxcaling does not have is given, or read. One that is set later is
            logged as a warning: microxcaling's own scripts do that.
    """

    help_strings: ClassVar[dict[str, str]] = {name: OPTIONS[name].metadata["doc"] for name in DEFAULTS}

    def __init__(self, given: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        given = {**(given or {}), **more}
        for name in given:
            if name not in DEFAULTS:
                raise _unknown(name)
        super().__init__({**DEFAULTS, **given})

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in DEFAULTS:
            logger.warning("%s; it has no effect", _unknown(name))
        super().__setitem__(name, value)

    def __missing__(self, name: str) -> Any:
        raise _unknown(name)

    def safe_json(self, indent: int | None = None) -> str:
        """Return the options as JSON; a value that JSON does not know is named by its type."""
        return json.dumps(self.data, indent=indent, default=lambda o: f"<<non-serializable: {type(o).__qualname__}>>")

    def __str__(self) -> str:
        return self.safe_json(indent=4)


def get_default_mx_specs() -> MxSpecs:
    """Return the options that quantize nothing."""
    return MxSpecs()


def get_backwards_mx_specs(specs: MxSpecs) -> MxSpecs:
    """Return the options of the backward pass: a copy, which quantizes nothing where ``quantize_backprop`` is off."""
    specs = specs.copy()
    if not specs["quantize_backprop"]:
        specs.update({**dict.fromkeys(_FORMATS), "block_size": 0, "bfloat": 0, "fp": 0})
    return specs


def apply_mx_specs(mx_specs: Mapping[str, Any] | None, default_mx_specs: MxSpecs | None = None) -> MxSpecs:
    """``default_mx_specs`` (itself; by default those that quantize nothing) with all of ``mx_specs`` that is not None.

    Raises:
        UnknownOptionError: a key that the defaults do not have.
    """
    specs = default_mx_specs or MxSpecs()
    for name, value in (mx_specs or {}).items():
        if value is not None:
            if name not in specs:
                raise _unknown(name)
            specs[name] = value
    return specs


def resolved(mx_specs: Mapping[str, Any] | None) -> MxSpecs:
    """Return the options an operation reads: an MxSpecs as it is, another mapping over the defaults.

    Raises:
        SpecError: None, or as :func:`apply_mx_specs`.
    """
    if mx_specs is None:
        raise SpecError("mx_specs is None: give the options, such as MxSpecs()")
    return mx_specs if isinstance(mx_specs, MxSpecs) else apply_mx_specs(mx_specs)


def add_mx_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Give ``parser`` an argument for each option, such as ``--block_size``, and return it.

    A flag that is on by default is switched off, by ``--no_quantize_backprop``. What is not on the command line is None
    (a flag False) until :func:`get_mx_specs`. ``--mx_dir`` is taken, but not read here.
    """
    group = parser.add_argument_group("mx", "MX specs")
    group.add_argument("--mx_dir", help="path of the mx library; not read")
    for name, default in DEFAULTS.items():
        argument = f"--no_{name}" if default is True else f"--{name}"
        kind: dict[str, Any] = {"type": int if isinstance(default, int) else str}
        if isinstance(default, bool):
            kind = {"action": "store_true"}
        group.add_argument(argument, **kind, help=MxSpecs.help_strings[name])
    group.add_argument("--skip_early_exit", action="store_true", help="give specs even if they quantize nothing")
    return parser


def get_mx_specs(parsed_args: argparse.Namespace) -> MxSpecs | None:
    """Return what :func:`add_mx_args`'s parser found, as :func:`finalize_mx_specs` returns it."""
    given, specs = vars(parsed_args), {}
    for name, default in DEFAULTS.items():
        if default is True and f"no_{name}" in given:
            specs[name] = not given[f"no_{name}"]
        elif default is not True and name in given:
            specs[name] = given[name]
    return finalize_mx_specs(specs, early_exit=not given.get("skip_early_exit", False))


def finalize_mx_specs(specs: MutableMapping[str, Any], early_exit: bool = True) -> MxSpecs | None:
    """Return all options, those that follow others filled in, in ``specs`` itself too; None where nothing is quantized.

    Formats ``*_bp*`` follow the forward ones, ``round_mx_*grad*`` follow ``round_grad_input``, and the other
    ``round_*`` follow ``round``: where they are absent or None. An :class:`MxSpecs` has every ``round_*`` already.

    Args:
        specs: the options that are given.
        early_exit: whether to return None where no format, no ``bfloat`` and no ``fp`` is given.

    Raises:
        UnknownOptionError: as :func:`apply_mx_specs`.
    """
    if early_exit and not any(specs.get(name) for name in (*_FORMATS, "bfloat", "fp")):
        return None
    for name, base in _BASES.items():
        if specs.get(name) is None and base in specs:
            specs[name] = specs[base]
    return apply_mx_specs(specs)


def mx_assert_test(mx_specs: Mapping[str, Any] | None) -> None:
    """With ``MX_ASSERT=True`` in the environment, raise SpecError where a function was called without options."""
    if mx_specs is None and environment.asserts_mx_specs():
        call, function, _ = traceback.extract_stack(limit=3)
        where = f"{call.filename}, line {call.lineno}"
        raise SpecError(f"mx_specs is None in {function.name}, called from {where}, and MX_ASSERT is True")


def _unknown(name: object) -> UnknownOptionError:
    return UnknownOptionError(
        f"microxcaling has no option {name!r}{suggestion(name, DEFAULTS)}; known: {', '.join(DEFAULTS)}"
    )
