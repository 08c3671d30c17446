"""MASE's TOML files as recipes: what ``quantize_module_transform_pass`` reads, and what it ignores silently.

A file chooses modules (``by`` = ``regex_name``, ``name`` or ``type``; the first selector that matches wins) and gives
each selector a quantizer. What would surprise its author becomes a note; what mxlab cannot do as MASE does is an error.
docs/mase.md shows the mapping. Nothing here needs torch.

Sources: MASE (github.com/DeepWok/mase) and its tutorial 7; PLENA's TOML reference (AICrossSim/PLENA_Software).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxlab.checks import suggestion
from mxlab.compat.mase.formats import FAMILIES, ROTATIONS, by_operand, spelled, unread
from mxlab.compat.mase.selectors import Selector, Table
from mxlab.errors import SpecError
from mxlab.recipe import Recipe, Rule
from mxlab.recipe.recipe import MASE
from mxlab.shipped import parse_toml, read_toml

# MASE's ways of selecting, and the key of a rule that does the same.
_BY = {"regex_name": "modules", "name": "name", "type": "type"}
_TYPES = {"linear": "Linear"}
# The keys of the algorithms' tables. All are kept; one that is not here is noted.
_KNOWN = {
    "gptq": (
        *("model_name", "device", "dataset", "nsamples", "seqlen", "format", "weight_config", "quantile_search"),
        *("clip_search_y", "cali_batch_size", "checkpoint_dir", "hf_token", "max_layers", "phase", "percdamp"),
    ),
    "rotation_search": (
        *("calib_data", "calib_nsamples", "calib_seqlen", "improvement_eps", "matmul_types", "cache_path"),
        *("cache_winners", "device", "model_name"),
    ),
}
_MATMUL_TYPES = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"),
    *("qk_matmul", "av_matmul", "kv_cache"),
)
# Tables that are no selectors, either.
_IGNORED = {
    "default": "MASE's pass over modules has no default: what no selector names stays unchanged",
    "token_collector": "it collects calibration text, and quantizes nothing",
}


@dataclass(frozen=True)
class MaseConfig:
    """A file of MASE's as a recipe; ``notes`` say what of it MASE ignores silently, and what is done otherwise here."""

    recipe: Recipe
    notes: tuple[str, ...]


def load(source: str | Path) -> MaseConfig:
    """Return the recipe in one of MASE's TOML files, or in the text of one: a str with a line break in it is a text.

    The recipe is named like the file; one from a text, ``mase``.

    Raises:
        SpecError: the file cannot be read, is not TOML, or asks for what MASE would stop at or mxlab cannot do; the
            message names the selector, the key and the remedy.
    """
    if isinstance(source, str) and "\n" in source:
        return read(parse_toml(source, "MASE file"), "mase", "MASE file")
    return read(read_toml(Path(source), str(source)), Path(source).stem, str(source))


def recognises(values: Table) -> bool:
    """Return whether a TOML file is one of MASE's: it has a key ``by``, or a table names a quantizer."""
    tables = [value for value in values.values() if isinstance(value, Mapping)]
    return "by" in values or any(table.get("name") in (*FAMILIES, *ROTATIONS) for table in tables)


def read(values: Table, name: str, source: str) -> MaseConfig:
    """Return the recipe called ``name`` from the values of a TOML file; ``source`` names the file in errors.

    Raises:
        SpecError: as :func:`load`.
    """
    by = values.get("by", "regex_name")
    if by not in _BY:
        raise SpecError(f"{source}: by is {by!r}; MASE has {', '.join(_BY)}{suggestion(by, _BY)}")
    tables, notes = _algorithm_tables(values, source)
    weight = _gptq_weight(tables["gptq"], source, notes) if "gptq" in tables else None
    rules: list[Rule] = []
    chosen: dict[str, Selector] = {}
    for key, table in _selectors(values, notes).items():
        where = f"{source}, selector '{key}'"
        selector = Selector(key, table, where, weight)
        rule = Rule.from_dict({_BY[by]: _selected(by, selector), **selector.roles}, where)
        same = _unanchored(key) if by == "regex_name" else key
        if same in chosen:
            notes.append(
                f"selector '{key}' is not read: '{chosen[same].name}' chooses the same modules, and comes first"
            )
            continue
        chosen[same] = selector
        rules.append(rule)
        notes += selector.notes
    algorithms = _algorithms(tables, by, list(chosen.values()), notes)
    label = re.sub(r"[^\w .+=,-]", "_", name).lstrip("_ .+=,-") or "mase"
    if all(rule.skip for rule in rules):
        rules = []  # a file that quantizes nothing
    return MaseConfig(Recipe(label, tuple(rules), algorithms=algorithms), tuple(dict.fromkeys(notes)))


def _selectors(values: Table, notes: list[str]) -> dict[str, Table]:
    selectors: dict[str, Table] = {}
    for key, value in values.items():
        if key in _IGNORED:
            notes.append(f"[{key}] is not read: {_IGNORED[key]}")
        elif isinstance(value, Mapping) and key not in _KNOWN:
            selectors[key] = value
        elif key not in ("by", *_KNOWN):
            notes.append(f"{key} = {value!r} is not read: it is neither a selector's table nor a key of MASE's")
    return selectors


def _selected(by: str, selector: Selector) -> str:
    if by != "type":
        return selector.name
    if selector.name not in _TYPES or selector.is_attention:
        raise SpecError(f"{selector.where}: by type, mxlab has {', '.join(_TYPES)}, without sub-tables")
    return _TYPES[selector.name]


def _unanchored(pattern: str) -> str:
    """Return the pattern without the anchors that mean nothing where all of a name must match."""
    return re.sub(r"(?<!\\)\$$", "", pattern.removeprefix("^"))


# ---- algorithms


def _algorithm_tables(values: Table, source: str) -> tuple[dict[str, Table], list[str]]:
    """Return the tables [gptq] and [rotation_search], and notes on their keys."""
    if "rotation" in values:
        raise SpecError(
            f"{source}: [rotation] asks for Hadamard rotations, which this version of mxlab does not have; to quantize "
            "without them, take the table out"
        )
    tables = {name: values[name] for name in _KNOWN if name in values}
    notes = []
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise SpecError(f"{source}: {name} is {table!r}: it must be a table")
        if name == "gptq" and "modules" in table:
            raise SpecError(f"{source}, [gptq]: modules is what the selectors with gptq = true say: take it out")
        unknown = [key for key in table if key not in _KNOWN[name]]
        notes += [f"[{name}]: {key} is not known, and kept{suggestion(key, _KNOWN[name])}" for key in unknown]
    _check_matmul_types(tables.get("rotation_search", {}).get("matmul_types", []), f"{source}, [rotation_search]")
    return tables, notes


def _check_matmul_types(kinds: object, where: str) -> None:
    unknown = [k for k in kinds if k not in _MATMUL_TYPES] if isinstance(kinds, list) else [kinds]
    if unknown:
        raise SpecError(
            f"{where}: matmul_types has {unknown[0]!r}; MASE knows {', '.join(_MATMUL_TYPES)}"
            f"{suggestion(unknown[0], _MATMUL_TYPES)}"
        )


def _gptq_weight(table: Table, source: str, notes: list[str]) -> str:
    """Return the text of the format of the weights that [gptq] makes."""
    where, config = f"{source}, [gptq]", table.get("weight_config")
    if table.get("format") not in ("mxint", "mxfp") or not isinstance(config, Mapping):
        raise SpecError(f'{where}: write format = "mxint" or "mxfp", and a table [gptq.weight_config]')
    chosen = FAMILIES[table["format"]]
    operands, others = by_operand(config)
    keys = operands.pop("weight", {})
    text = spelled(chosen, "weight", keys, f"{where}, weight_config")
    rest = [*others, *(f"{prefix}_{key}" for prefix, more in operands.items() for key in more)]
    notes += [
        f"[gptq.weight_config]: {n}" for n in [*unread(chosen, "weight", keys), *(f"{k} is not read" for k in rest)]
    ]
    return text


def _algorithms(tables: dict[str, Table], by: str, selectors: list[Selector], notes: list[str]) -> dict[str, Any]:
    """Return the tables unchanged; ``modules`` says which layers [gptq] is for, as patterns. So for clip_search."""
    searched = _patterns(by, [s for s in selectors if s.is_searched])
    algorithms: dict[str, Any] = {"clip_search": {"modules": searched}} if searched else {}
    for name, table in tables.items():
        algorithms[name] = dict(table)
    if "gptq" in tables:
        algorithms["gptq"]["modules"] = _patterns(by, [s for s in selectors if s.is_gptq])
        if not algorithms["gptq"]["modules"]:
            notes.append("[gptq] is for no selector: none says gptq = true")
    return {MASE: algorithms} if algorithms else {}


def _patterns(by: str, selectors: list[Selector]) -> list[str]:
    """Return regular expressions for the names of the layers that the selectors choose."""
    if by == "type":
        return [".*" for _ in selectors]
    return [s.name if by == "regex_name" else re.escape(s.name) for s in selectors]
