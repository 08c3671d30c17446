"""MASE's quantizers under their names here: from ``name = "mxint"`` and its keys to the text of a format.

Sources: MASE (github.com/DeepWok/mase): ``chop.nn.quantized`` for the keys, ``chop.nn.quantizers`` for what they mean;
the formats are those of :mod:`mxlab.formats` and :mod:`mxlab.formats`. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mxlab.checks import check_int, suggestion
from mxlab.errors import FormatError, SpecError

Keys = Mapping[str, Any]  # those of one operand, without its prefix: {"block_size": 32, "width": 4}

# The operands of a linear layer by the prefix of their keys, and the roles they are here.
LINEAR_ROLES = {"weight": "weight", "data_in": "activation", "bias": "bias", "data_out": "output"}
# The sub-tables of an attention, and the roles that each sets.
ATTENTION_ROLES = {
    "qk_matmul": ("q",),
    "av_matmul": ("p",),
    "kv_cache": ("k", "v"),
    "softmax": ("softmax",),
    "rope": ("rope",),
}
# (exponent_width, frac_width) of the elements that MASE's MXFP takes.
MXFP_ELEMENTS = ((4, 3), (5, 2), (3, 4), (2, 3), (3, 2), (2, 1), (1, 2))


@dataclass(frozen=True)
class Family:
    """One of MASE's quantizers.

    Attributes:
        needs: the keys of an operand without which MASE stops.
        spell: the text of the format from its keys.
        may: keys that it also reads.
        decides: those of ``needs`` without which MASE leaves an optional operand unchanged.
        required: the operands of a linear layer that must have keys.
        optional: those that may have keys; of any other, MASE reads none.
        note: what the format here does otherwise than MASE's published code.
    """

    needs: tuple[str, ...]
    spell: Callable[[Keys], str]
    may: tuple[str, ...] = ()
    decides: tuple[str, ...] = ()
    required: tuple[str, ...] = ("weight", "data_in", "bias")
    optional: tuple[str, ...] = ()
    note: str = ""

    @property
    def operands(self) -> tuple[str, ...]:
        """The operands whose keys MASE reads."""
        return self.required + self.optional


def _mxint(keys: Keys) -> str:
    check_int("width", keys["width"], 2, 8, "2 to 8, as mxlab has int2 to int8")
    return f"int{keys['width']}@{keys['block_size']},scale_rule=mase_int"


def _mxfp(keys: Keys) -> str:
    e, m = keys["exponent_width"], keys["frac_width"]
    if (e, m) not in MXFP_ELEMENTS:
        known = ", ".join(f"{e} and {m}" for e, m in MXFP_ELEMENTS)
        raise FormatError(f"exponent_width and frac_width are {e} and {m}: MASE's MXFP has {known}")
    return f"fp{1 + e + m}_e{e}m{m}@{keys['block_size']},rounding=even"


def _minifloat(keys: Keys) -> str:
    e, m = keys["exponent_width"], keys["frac_width"]
    return f"minifloat_ieee,width={1 + e + m},exponent_bits={e}"


def _integer(keys: Keys) -> str:
    return f"integer,width={keys['width']},frac={keys['frac_width']}"


# MASE's keys for the parameters of the other formats.
_PARAMETERS = {
    "width": "width",
    "exponent_width": "exponent_bits",
    "exponent_bias": "bias",
    "exponent_bias_width": "bias_bits",
}


def _plain(name: str) -> Callable[[Keys], str]:
    def spell(keys: Keys) -> str:
        block = f"@{keys['block_size']}" if "block_size" in keys else ""
        return ",".join([name + block, *(f"{ours}={keys[key]}" for key, ours in _PARAMETERS.items() if key in keys)])

    return spell


_MXFP_NOTE = (
    "mxfp is read as the MX format of the OCP, ties to even; the code that MASE published loses the carry of a "
    "mantissa that rounds up (1.8 becomes 1.0 in E2M1)"
)
_MINIFLOAT_NOTE = (
    "minifloat is read as minifloat_ieee: a mantissa that would round up into the next binade is held at its largest; "
    "the code that MASE published loses it"
)
_BIAS = ("exponent_bias",)
_MX: dict[str, Any] = {"required": ("weight",), "optional": ("data_in", "bias")}
_INTEGER = Family(("width", "frac_width"), _integer, optional=("data_out",))

FAMILIES: dict[str, Family] = {
    "mxint": Family(("block_size", "width"), _mxint, decides=("block_size", "width"), **_MX),
    "mxfp": Family(
        ("block_size", "exponent_width", "frac_width"),
        _mxfp,
        decides=("block_size", "exponent_width"),
        note=_MXFP_NOTE,
        **_MX,
    ),
    "minifloat": Family(
        ("exponent_width", "frac_width"), _minifloat, required=("weight", "data_in"), note=_MINIFLOAT_NOTE
    ),
    "integer": _INTEGER,
    "fixed": _INTEGER,
    "minifloat_ieee": Family(("width", "exponent_width"), _plain("minifloat_ieee"), _BIAS),
    "minifloat_denorm": Family(("width", "exponent_width"), _plain("minifloat_denorm"), _BIAS),
    "log": Family(("width",), _plain("log"), _BIAS),
    "block_fp": Family(("block_size", "width", "exponent_width"), _plain("block_fp"), _BIAS),
    "block_minifloat": Family(
        ("block_size", "width", "exponent_width", "exponent_bias_width"), _plain("block_minifloat")
    ),
    "block_log": Family(("block_size", "width", "exponent_bias_width"), _plain("block_log")),
}
# Those that rotate first, and the same without.
ROTATIONS = {"mxint_rotate": "mxint", "mxfp_rotate": "mxfp"}


def family(name: object, where: str) -> Family:
    """Return the quantizer that MASE calls ``name``; ``where`` names the table in errors.

    Raises:
        SpecError: there is none here; the message lists those there are.
    """
    if isinstance(name, str) and name in ROTATIONS:
        raise SpecError(
            f"{where}: name = {name!r} asks for online Hadamard rotations, which this version of mxlab does not have; "
            f"to quantize without them, write name = {ROTATIONS[name]!r}"
        )
    found = FAMILIES.get(name) if isinstance(name, str) else None
    if found is None:
        raise SpecError(
            f"{where}: name is {name!r}; of MASE's quantizers mxlab reads {', '.join(FAMILIES)}"
            f"{suggestion(name, FAMILIES)}. Those with few levels (binary, ternary) mxlab defines otherwise: write a "
            "recipe for them"
        )
    return found


def spelled(chosen: Family, prefix: str, keys: Keys, where: str) -> str:
    """Return the text of the format of one operand.

    Raises:
        SpecError: a key is missing, or its value is not what it asks for; the message names it.
    """
    if missing := [key for key in chosen.needs if key not in keys]:
        needed = ", ".join(f"{prefix}_{key}" for key in chosen.needs)
        raise SpecError(f"{where}: {prefix}_{missing[0]} is missing; write {needed}")
    try:
        known = {key: _number(key, keys[key]) for key in (*chosen.needs, *chosen.may) if key in keys}
        return chosen.spell(known)
    except FormatError as e:
        raise SpecError(f"{where}: {prefix}_{e}") from None


def _number(key: str, value: object) -> int:
    if key == "block_size" and isinstance(value, list) and value and all(n == 1 for n in value[:-1]):
        value = value[-1]  # [1, 16]: mxlab's blocks lie along one axis, too
    low = -1000 if key in ("frac_width", "exponent_bias") else 1
    kind = "along the inner dimension, 16 or [1, 16]" if key == "block_size" else "a whole number"
    check_int(key, value, low, None, kind if low < 1 or key == "block_size" else f"{kind} from 1")
    assert isinstance(value, int)
    return value


def unread(chosen: Family, prefix: str, keys: Keys) -> list[str]:
    """Return what MASE ignores among the keys of an operand that it reads, and a width that its parts contradict."""
    ignored = [key for key in keys if key not in (*chosen.needs, *chosen.may)]
    notes = []
    if "width" in ignored and "frac_width" in chosen.needs:
        ignored.remove("width")
        if keys["width"] != (total := 1 + keys["exponent_width"] + keys["frac_width"]):
            notes.append(f"{prefix}_width is {keys['width']!r}: exponent, fraction and sign make {total}, which counts")
    return [*(f"{prefix}_{key} is not read" for key in ignored), *notes]


def by_operand(table: Keys) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the keys of a table: those of each operand, without the prefix, and the others."""
    operands: dict[str, dict[str, Any]] = {}
    others: dict[str, Any] = {}
    for key, value in table.items():
        prefix = next((p for p in LINEAR_ROLES if key.startswith(f"{p}_")), None)
        if prefix is None:
            others[key] = value
        else:
            operands.setdefault(prefix, {})[key.removeprefix(f"{prefix}_")] = value
    return operands, others
