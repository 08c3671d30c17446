"""What the tables of a MASE file ask for, checked: options that cannot be honoured are refused by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mxlab.checks import check_bool, check_int, suggestion
from mxlab.errors import FormatError, SpecError
from mxlab.recipe import Recipe
from mxlab.recipe.recipe import MASE

DATASET = "wikitext2"  # where a file names none
LINEAR_TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")
KV_CACHE = "kv_cache"
MATMUL_TYPES = (*LINEAR_TYPES, KV_CACHE)

# What the command says in place of the file, with the reason.
_SAID_ELSEWHERE = {
    "model_name": "the model is the command's",
    "device": "the device is the command's",
    "hf_token": "the hub's client finds its token itself",
    "checkpoint_dir": "what is done is kept beside the result: --resume",
    "cache_path": "what is done is kept beside the result: --resume",
    "cache_winners": "what is done is kept beside the result: --resume",
}
_REFUSED = {
    "max_layers": "the layers behind would stay unquantized: take it out",
    "phase": "weights of one phase alone are rules of a recipe: take it out",
}
# Keys that compat.mase has made formats and rules of.
_READ = ("format", "weight_config", "modules")

logger = logging.getLogger("mxlab")


@dataclass(frozen=True)
class GptqTable:
    """The table ``[gptq]``, with MASE's defaults.

    Attributes:
        dataset: the calibration text.
        nsamples: windows of it.
        seqlen: tokens of a window.
        quantile_search: choose the scale of each block among those of quantiles of its magnitudes.
        clip_search_y: by the error in what the block contributes to the output, rather than by that of the weight.
        cali_batch_size: windows whose errors are one norm; the norms are added up.
        percdamp: what is added to the diagonal of the second moments, as parts of its mean; MASE's file cannot say it.
    """

    dataset: str = DATASET
    nsamples: int = 128
    seqlen: int = 256
    quantile_search: bool = True
    clip_search_y: bool = False
    cali_batch_size: int = 32
    percdamp: float = 0.01

    def __post_init__(self) -> None:
        _check_text("dataset", self.dataset)
        _check_counts(self, nsamples=1, seqlen=2, cali_batch_size=1)
        check_bool("quantile_search", self.quantile_search)
        check_bool("clip_search_y", self.clip_search_y)
        _check_number("percdamp", self.percdamp)
        if self.percdamp == 0:
            raise FormatError("percdamp is 0: it must be above 0")


@dataclass(frozen=True)
class RotationTable:
    """The table ``[rotation_search]``, with MASE's defaults.

    Attributes:
        calib_data: the calibration text; None for that of ``[gptq]``.
        calib_nsamples: windows of it.
        calib_seqlen: tokens of a window.
        improvement_eps: by how much the perplexity must fall for a type to be rotated.
        matmul_types: what may be rotated, each in all layers; None for all of the eight that the model has.
    """

    calib_data: str | None = None
    calib_nsamples: int = 32
    calib_seqlen: int = 1024
    improvement_eps: float = 0.0
    matmul_types: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.calib_data is not None:
            _check_text("calib_data", self.calib_data)
        _check_counts(self, calib_nsamples=1, calib_seqlen=2)
        _check_number("improvement_eps", self.improvement_eps)
        if self.matmul_types is not None:
            object.__setattr__(self, "matmul_types", tuple(self.matmul_types))
        for kind in self.matmul_types or ():
            if kind not in MATMUL_TYPES:
                raise FormatError(
                    f"matmul_types has {kind!r}, which mxlab does not rotate: it searches {', '.join(MATMUL_TYPES)}; "
                    "take it out"
                )


@dataclass(frozen=True)
class MaseTables:
    """The tables of a file; None for one that it does not have.

    ``gptq_modules`` and ``clip_modules`` are the selectors of the layers that GPTQ, and the search of clipping, are
    for.
    """

    gptq: GptqTable | None
    gptq_modules: tuple[str, ...]
    clip_modules: tuple[str, ...]
    rotation: RotationTable | None

    @classmethod
    def of(cls, recipe: Recipe) -> MaseTables:
        """Return the tables that a recipe carries.

        Raises:
            SpecError: an option that cannot be honoured, or a value that is not what it asks for.
        """
        tables: Mapping[str, Any] = recipe.algorithms.get(MASE, {})
        for name in tables:
            if name not in ("gptq", "clip_search", "rotation_search"):
                raise SpecError(f"recipe {recipe.name}: MASE's table {name} is not known: take it out")
        return cls(
            _read(GptqTable, tables.get("gptq"), f"recipe {recipe.name}, [gptq]"),
            tuple(tables.get("gptq", {}).get("modules", ())),
            tuple(tables.get("clip_search", {}).get("modules", ())),
            _read(RotationTable, tables.get("rotation_search"), f"recipe {recipe.name}, [rotation_search]"),
        )


def _read(kind: type, values: Mapping[str, Any] | None, where: str) -> Any:
    """Return the options of a table as a ``kind``; None without one."""
    if values is None:
        return None
    known = [f.name for f in fields(kind)]
    options = {}
    for key, value in values.items():
        if key in _REFUSED:
            raise SpecError(f"{where}: {key} = {value!r} cannot be done: {_REFUSED[key]}")
        if key in _SAID_ELSEWHERE:
            logger.info("%s: %s is not read: %s", where, key, _SAID_ELSEWHERE[key])
        elif key in known:
            options[key] = value
        elif key not in _READ:
            raise SpecError(f"{where}: {key} is not known{suggestion(key, known)}: take it out")
    try:
        return kind(**options)
    except FormatError as e:
        raise SpecError(f"{where}: {e}") from None


def _check_counts(table: Any, **least: int) -> None:
    for name, low in least.items():
        check_int(name, getattr(table, name), low, 2**31, f"a whole number from {low}")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise FormatError(f"{name} is {value!r}: it must be the name of a text, or its file")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise FormatError(f"{name} is {value!r}: it must be a number from 0")
