"""A recipe says what is quantized, where and how: ordered rules, the numerics, the rounding around matmuls.

A recipe is frozen, prints as TOML, reads back equal, and has one hash, which names a run. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import tomli_w

from mxlab import shipped
from mxlab.checks import check_bool, check_choice, check_keys
from mxlab.errors import FormatError, SpecError
from mxlab.formats import (
    MICROXCALING_ROUNDINGS,
    NUMERICS,
    ROUNDINGS,
    MXFormat,
    NumberFormat,
    Numerics,
    Rounding,
    elementwise_format,
)
from mxlab.recipe.algorithms import TABLES, read_table
from mxlab.recipe.rule import Rule

# The tables of algorithms: mxlab's own, and those of a file of MASE's as they are in it.
MASE = "mase"
ALGORITHMS = (*TABLES, MASE)


_NAME = re.compile(r"[^\W_][\w .+=,-]*")


@dataclass(frozen=True)
class Elementwise:
    """Element-wise rounding of a linear layer's operands before, and of its result after, the matmul.

    ``bfloat`` and ``fp`` are the widths of :func:`mxlab.round_elementwise`; 0 rounds nothing.
    """

    bfloat: int = 0
    fp: int = 0
    subnormals: bool = True
    weight_rounding: Rounding = "nearest"
    output_rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        elementwise_format(self.bfloat, self.fp)  # raises where a width is out of range
        check_bool("subnormals", self.subnormals)
        check_choice("weight_rounding", self.weight_rounding, ROUNDINGS)
        check_choice("output_rounding", self.output_rounding, ROUNDINGS)

    def check_emulated(self) -> None:
        """Raise SpecError for a rounding that microxcaling's torch path does not have."""
        for name in ("weight_rounding", "output_rounding"):
            if (rounding := getattr(self, name)) not in MICROXCALING_ROUNDINGS:
                raise SpecError(
                    f"elementwise: {name} is {rounding!r}, which the numerics 'microxcaling' do not have: use 'exact', "
                    f"or one of {', '.join(MICROXCALING_ROUNDINGS)}"
                )

    @property
    def is_used(self) -> bool:
        """Whether anything is rounded."""
        return bool(self.bfloat or self.fp)


@dataclass(frozen=True)
class Recipe:
    """Ordered rules (the first that matches a module wins), the numerics and the element-wise rounding.

    ``name`` is a label: it is not part of the hash. ``algorithms`` holds the tables of the algorithms to run before
    quantizing, by name. ``inject`` stands alone: microxcaling's options for its ``inject_pyt_ops``, under which all of
    its operators take the place of torch's; ``custom_cuda`` is not among them, as ``numerics`` says that.

    Raises:
        SpecError: a name that is no folder's, rules without effect, rules beside ``inject``, a format that the numerics
            do not have.
        FormatError: unknown numerics or algorithms.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    numerics: Numerics = "exact"
    elementwise: Elementwise = field(default_factory=Elementwise)
    algorithms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    inject: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise SpecError(
                f"name is {self.name!r}: it names a folder, so write letters, digits, spaces and . _ + - = , "
                "with a letter or digit first"
            )
        check_choice("numerics", self.numerics, NUMERICS)
        if self.numerics == "microxcaling" and (others := [fmt for fmt in self.formats if not _is_emulated(fmt)]):
            raise SpecError(
                f"numerics is 'microxcaling', which does not have the format {others[0]}: use 'exact', or a "
                f"microscaling format with scale e8m0 under the rule floor or none, rounded by one of "
                f"{', '.join(MICROXCALING_ROUNDINGS)}"
            )
        if self.numerics == "microxcaling":
            self.elementwise.check_emulated()
        for algorithm in self.algorithms:
            check_choice("algorithm", algorithm, ALGORITHMS)
        self._check_effect()

    def _check_effect(self) -> None:
        if self.inject and (self.rules or self.algorithms or self.elementwise.is_used):
            raise SpecError("inject replaces every operator: leave out rules, algorithms and elementwise")
        if "custom_cuda" in self.inject:
            raise SpecError("inject has custom_cuda: write numerics instead, 'exact' for true")
        for rule in self.rules:
            if not (rule.skip or rule.formats or self.elementwise.is_used):
                raise SpecError(
                    f"{rule} gives no format, and nothing is rounded element-wise: give one, or skip = true"
                )
        if self.rules and all(rule.skip for rule in self.rules):
            raise SpecError(
                "every rule skips, so nothing is quantized: give formats, or no rules for the model as it is"
            )

    def algorithm(self, name: str) -> Any:
        """Return the options of an algorithm, as :data:`~mxlab.recipe.algorithms.TABLES` has them; None without it."""
        return read_table(name, self.algorithms[name], f"[algorithms.{name}]") if name in self.algorithms else None

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits that two recipes share only if they quantize alike."""
        content = {k: v for k, v in self.to_dict().items() if k != "name"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def quantizes(self) -> bool:
        """Whether there is anything that it quantizes."""
        return bool(self.rules or self.inject)

    @property
    def takes_calibration(self) -> bool:
        """Whether quantizing a model under it takes a calibration text: for an algorithm, or for what a rule fits."""
        return bool(self.algorithms) or any(rule.is_fitted for rule in self.rules)

    @property
    def formats(self) -> tuple[NumberFormat, ...]:
        """Every format the rules give, in order."""
        return tuple(fmt for rule in self.rules for fmt in rule.formats.values())

    @property
    def options(self) -> dict[str, Any]:
        """``block_size`` and ``scale_bits`` where all formats agree on them, and ``custom_cuda``; {} for a baseline."""
        found = {name: self.inject[name] for name in ("block_size", "scale_bits") if name in self.inject}
        for name in ("block_size", "scale_bits"):
            values = {getattr(fmt, name, None) for fmt in self.formats}
            if len(values) == 1:
                found[name] = values.pop()
        return {**found, "custom_cuda": self.numerics == "exact"} if self.quantizes else {}

    def map_formats(self, **changes: Any) -> Recipe:
        """Return the recipe with these fields changed in every format.

        Raises:
            SpecError: a format that is not microscaling, or that the change does not fit.
        """
        if changes and (others := [fmt for fmt in self.formats if not isinstance(fmt, MXFormat)]):
            raise SpecError(f"{', '.join(changes)} cannot be set for {others[0]}: it is not a microscaling format")
        rules = tuple(
            replace(r, **{k: replace(f, **changes) for k, f in r.formats.items() if isinstance(f, MXFormat)})
            for r in self.rules
        )
        return replace(self, rules=rules)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as in the TOML file."""
        values = {
            "name": self.name,
            "numerics": self.numerics,
            "elementwise": asdict(self.elementwise),
            "rules": [rule.to_dict() for rule in self.rules],
        }
        values |= {"algorithms": deepcopy(dict(self.algorithms))} if self.algorithms else {}
        return values | ({"inject": dict(self.inject)} if self.inject else {})

    def to_toml(self) -> str:
        """Return the recipe as TOML, which :meth:`from_toml` reads back equal."""
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """Return the recipe these plain values describe; ``source`` names them in errors.

        Raises:
            SpecError: an unknown key, or a value that is not what the key asks for.
        """
        known = [f.name for f in fields(cls)]
        check_keys(values, known, source)
        if not isinstance(values.get("name"), str):
            raise SpecError(f'{source}: a recipe needs a name, such as name = "ex1"')
        rules = values.get("rules", [])
        if not isinstance(rules, list):
            raise SpecError(f"{source}: rules must be written as [[rules]] tables")
        rules = tuple(Rule.from_dict(r, f"{source}, rule {i}") for i, r in enumerate(rules, 1))
        elementwise = _elementwise(values.get("elementwise", {}), f"{source}, [elementwise]")
        algorithms = _algorithms(values.get("algorithms", {}), f"{source}, [algorithms]")
        inject = values.get("inject", {})
        if not isinstance(inject, Mapping):
            raise SpecError(f"{source}, [inject]: must be a table of microxcaling's options")
        try:
            return cls(values["name"], rules, values.get("numerics", "exact"), elementwise, algorithms, dict(inject))
        except (FormatError, SpecError) as e:
            raise SpecError(f"{source}: {e}") from None

    @classmethod
    def from_toml(cls, text: str, source: str = "recipe") -> Recipe:
        """Return the recipe in a TOML text. Raises SpecError as :meth:`from_dict`, or where the text is not TOML."""
        return cls.from_dict(shipped.parse_toml(text, source), source)


# Reads the values of another tool's TOML file (the values, a name for the recipe, the file's name for errors); None
# where they are not that tool's.
Reader = Callable[[Mapping[str, Any], str, str], "Recipe | None"]


def load_recipe(recipe: Recipe | str | Path, readers: Sequence[Reader] = ()) -> Recipe:
    """Return a recipe from a shipped name (``ex1``), from a TOML file, or as it is.

    Args:
        recipe: the recipe, its name, or its file.
        readers: what else may read a file that has neither a name nor rules (:mod:`mxlab.compat.recipes`).

    Raises:
        SpecError: no such recipe or file; the message lists the names.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str | Path):
        raise SpecError(f"recipe is {recipe!r}: it must be the name of a recipe, or of a TOML file")
    path = shipped.find("recipe", recipe)
    values = shipped.read_toml(path, str(recipe))
    if "name" not in values and "rules" not in values:
        for read in readers:
            if (found := read(values, path.stem, str(recipe))) is not None:
                return found
    return Recipe.from_dict(values, str(recipe))


def _is_emulated(fmt: NumberFormat) -> bool:
    """Return whether microxcaling's torch path, which the numerics of that name reproduce, knows the format."""
    if not isinstance(fmt, MXFormat) or fmt.rounding not in MICROXCALING_ROUNDINGS:
        return False
    return fmt.scale == "e8m0" and fmt.scale_rule in ("floor", "none")


def _elementwise(values: object, source: str) -> Elementwise:
    if not isinstance(values, Mapping):
        raise SpecError(f"{source}: must be a table")
    check_keys(values, [f.name for f in fields(Elementwise)], source)
    try:
        return Elementwise(**values)
    except FormatError as e:
        raise SpecError(f"{source}: {e}") from None


def _algorithms(values: object, source: str) -> dict[str, dict[str, Any]]:
    if not isinstance(values, Mapping):
        raise SpecError(f"{source}: must be a table")
    check_keys(values, list(ALGORITHMS), source)
    for name, options in values.items():
        if not isinstance(options, Mapping):
            raise SpecError(f"{source}: {name} is {options!r}: it must be a table of options")
        if name in TABLES:
            read_table(name, options, f"{source[:-1]}.{name}]")
    return deepcopy({name: dict(options) for name, options in values.items()})
