"""One selector of a MASE file: the roles of the rule that it becomes. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxlab.checks import suggestion
from mxlab.compat.mase.formats import (
    ATTENTION_ROLES,
    FAMILIES,
    LINEAR_ROLES,
    Family,
    Keys,
    by_operand,
    family,
    spelled,
    unread,
)
from mxlab.errors import SpecError

Table = Mapping[str, Any]

_FLAGS = ("name", "bypass")


class Selector:
    """A selector's table, read.

    Attributes:
        roles: formats by role, or ``skip``, as a rule has them.
        notes: what MASE ignores silently, and what the recipe does otherwise.
        is_gptq: whether its weights are those that the table [gptq] makes.
        is_searched: whether MASE searches the largest magnitude of each block of its weights.

    Raises:
        SpecError: what MASE would stop at, or mxlab cannot do; the message names the selector and the key.
    """

    def __init__(self, name: str, table: Table, where: str, gptq_weight: str | None) -> None:
        self.name, self.table, self.where = name, table, where
        self.notes: list[str] = []
        self.is_gptq = self.is_searched = False
        if "name" not in table:
            raise SpecError(
                f'{where}: it has no name, such as name = "mxint". Quote a selector with dots in it: '
                '["model.layers.0.mlp.up_proj"]'
            )
        self._family = family(table["name"], where)
        self._gptq_weight = gptq_weight
        self._stages = {key: value for key, value in table.items() if isinstance(value, Mapping)}
        self.roles = (self._attention() if self._stages else self._linear()) or {"skip": True}

    @property
    def is_attention(self) -> bool:
        """Whether it has sub-tables, which only an attention has."""
        return bool(self._stages)

    def _note(self, text: str) -> None:
        self.notes.append(f"selector '{self.name}': {text}")

    # ---- linear layers

    def _linear(self) -> dict[str, Any]:
        if _flag(self.table, "bypass", self.where):
            return {}
        operands, others = by_operand(self.table)
        texts = {prefix: self._operand(prefix, operands.pop(prefix, {})) for prefix in self._family.operands}
        self._note_rest(operands, others, (*_FLAGS, *(("gptq", "clip_search") if self._family.decides else ())))
        formats: dict[str, Any] = {LINEAR_ROLES[prefix]: text for prefix, text in texts.items() if text}
        if "bias" in formats:
            self._note("bias_... is for the layers that have a bias; the others are left alone, as in MASE")
            formats["bias_optional"] = True
        return formats

    def _operand(self, prefix: str, keys: Keys) -> str | None:
        """Return the text of the format of an operand; None where MASE leaves it unchanged."""
        if prefix == "weight" and self._family.decides:
            return self._weight(keys)
        if prefix in self._family.optional:
            absent = [key for key in self._family.decides if key not in keys]
            if keys and absent:
                self._note(f"{prefix}_{absent[0]} is missing, without which {prefix} is not quantized, as in MASE")
            if absent or not keys:
                return None
        return self._spelled(self._family, prefix, keys)

    def _weight(self, keys: Keys) -> str | None:
        """Return the text of the format of the weight, in which [gptq] has a say."""
        searches = _flag(self.table, "clip_search", self.where)
        if not _flag(self.table, "gptq", self.where):
            self.is_searched = searches and self.table["name"] == "mxint"
            if searches and not self.is_searched:
                self._note("clip_search is not read: MASE searches for mxint only")
            if self._gptq_weight:
                self._note(
                    "it does not say gptq = true. MASE would round the weights that [gptq] makes a second time; the "
                    "recipe rounds the model's own"
                )
            return self._spelled(self._family, "weight", keys)
        if searches:
            self._note("clip_search is not read where gptq = true")
        if not self._gptq_weight:
            # MASE goes on with the weights as they are: a result that looks better than the file's formats are.
            raise SpecError(
                f"{self.where}: gptq = true leaves the weights to the table [gptq], which is not there, so that they "
                "would stay unquantized: take gptq = true out to round them to nearest, to weight_..., or put the "
                "table back"
            )
        self.is_gptq = True
        if keys and (own := self._spelled(self._family, "weight", keys)) != self._gptq_weight:
            self._note(f"its weights are {own}, those of [gptq] {self._gptq_weight}: MASE goes by [gptq]")
        return self._gptq_weight

    # ---- attentions

    def _attention(self) -> dict[str, Any]:
        own = {key: value for key, value in self.table.items() if key not in self._stages}
        operands, others = by_operand(own)
        if "weight" in operands or self.table["name"] not in ("mxint", "mxfp"):
            raise SpecError(
                f"{self.where}: the sub-table {next(iter(self._stages))!r} is for an attention, mxint or mxfp; a "
                "linear layer has none: give the attention a selector of its own"
            )
        self._note_rest(operands, others, _FLAGS)
        roles = {}
        for stage, keys in self._stages.items():
            if text := self._stage(stage, keys):
                roles |= dict.fromkeys(ATTENTION_ROLES[stage], text)
        if not roles:
            self._note("no sub-table gives a format: it quantizes nothing")
        elif _flag(self.table, "bypass", self.where):
            self._note("bypass = true does not hold for the sub-tables that give a format")
        return roles

    def _stage(self, stage: str, keys: Table) -> str | None:
        """Return the text of the format of a sub-table; None where it is bypassed, or MASE does not read it."""
        where = f"{self.where}, {stage}"
        if _flag(keys, "bypass", where):
            return None
        if stage in ("prefill", "decode", "qk_norm"):
            raise SpecError(f"{where}: mxlab does not read this sub-table; write it as rules of a recipe")
        if stage not in ATTENTION_ROLES:
            self._note(f"the sub-table {stage} is not read{suggestion(stage, ATTENTION_ROLES)}")
            return None
        operands, others = by_operand(keys)
        given = operands.pop("data_in", {})
        self._note_rest(operands, others, ("bypass",), f"{stage}.")
        return self._spelled(self._stage_family(stage, given), "data_in", given, f"{stage}.")

    def _stage_family(self, stage: str, keys: Keys) -> Family:
        """MASE's attention rounds the softmax's input and the rotary tables to minifloats, whatever its own name."""
        if stage not in ("softmax", "rope"):
            return self._family
        if self.table["name"] == "mxint" and "exponent_width" not in keys and "block_size" in keys:
            self._note(f"{stage} is read as mxint; MASE wants a minifloat there, and stops")
            return self._family
        return FAMILIES["minifloat"]

    # ---- both

    def _spelled(self, chosen: Family, prefix: str, keys: Keys, stage: str = "") -> str:
        text = spelled(chosen, prefix, keys, f"{self.where}, {stage[:-1]}" if stage else self.where)
        for note in unread(chosen, prefix, keys):
            self._note(stage + note)
        if chosen.note:
            self.notes.append(chosen.note)
        return text

    def _note_rest(self, operands: Mapping[str, Keys], others: Table, known: tuple[str, ...], stage: str = "") -> None:
        """Note the keys of operands that MASE does not quantize here, and those that it does not know."""
        keys = [f"{prefix}_{key}" for prefix, keys in operands.items() for key in keys]
        for key in [*keys, *(key for key in others if key not in known)]:
            self._note(f"{stage}{key} is not read{suggestion(key, known) if key in others else ''}")


def _flag(table: Table, key: str, where: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise SpecError(f"{where}: {key} is {value!r}: it must be true or false")
    return value
