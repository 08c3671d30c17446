"""Describe what a benchmark measures: a workload yields cases, a case has contenders that take turns."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from mxlab.bench.results import Measurement, Row, Spread
from mxlab.bench.timing import Clock, Contender, Effort, Series, alternate, clock_for
from mxlab.checks import check_choice, check_int
from mxlab.compat.recipes import load_any_recipe
from mxlab.errors import SpecError
from mxlab.formats import NUMERICS, MXFormat
from mxlab.sources import models
from mxlab.sources import tasks as data
from mxlab.sources.devices import DTYPES, is_native

# The first has Llama-3.2-1B's shape; the other is made in no time, for the tests.
RANDOM: dict[str, dict[str, Any]] = {
    "llama-1b-random": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
    },
    "random-tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
    },
}


LAMBADA = "lambada_openai"
ATTENTIONS = ("eager", "sdpa")


Figures = Callable[[str, Spread, Spread | None], dict[str, float]]


def tokens_per_second(count: int, _: str, seconds: Spread, __: Spread | None) -> dict[str, float]:
    """Return the figures of a call that takes ``count`` tokens, once the count is bound."""
    return {"tokens/s": count / seconds.median}


@dataclass(frozen=True)
class Case:
    """Contenders that take turns; all are compared with the first.

    Attributes:
        name: what it is called while it runs, and where a contender fails.
        columns: what its rows of results have in common.
        contenders: what is timed.
        effort: how often.
        figures: the further figures of a row, of a contender's name, its seconds and its ratio to the first.
        clock: what takes the time; None is the device's own.
    """

    name: str
    columns: Mapping[str, Any]
    contenders: Sequence[Contender]
    effort: Effort
    figures: Figures = lambda name, seconds, ratio: {}
    clock: Clock | None = None

    def measure(self, device: torch.device) -> Measurement:
        """Time the contenders, whose work is on ``device``."""
        found = alternate(self.contenders, self.effort, self.clock or clock_for(device), self.name)
        rows = [
            self._row(contender, series, found[0])
            for contender, series in zip(self.contenders, found, strict=True)
            if series.samples
        ]
        failures = [
            f"{contender.name}, {self.name}: {series.failure}"
            for contender, series in zip(self.contenders, found, strict=True)
            if series.failure
        ]
        return Measurement(rows, failures)

    def _row(self, contender: Contender, series: Series, first: Series) -> Row:
        is_first = series is first
        reference = None if is_first else self.contenders[0].name
        row = Row(
            {**self.columns, **contender.columns},
            contender.name,
            series.samples,
            reference,
            () if is_first else first.samples,
            target=contender.target,
        )
        return replace(row, figures=self.figures(contender.name, row.seconds, row.ratio))


@dataclass(frozen=True, kw_only=True)
class Workload(ABC):
    """What a benchmark measures: its fields are what it can be told, :meth:`cases` what follows from them.

    All can be told how often (``repeats``, ``warmup``), with how many ``threads`` and on which ``device`` (``cpu``,
    ``cuda``, ``cuda:1``). ``BY_DEVICE`` holds defaults that differ from the fields' own on a type of device.
    """

    BY_DEVICE: ClassVar[dict[str, dict[str, Any]]] = {}

    repeats: int = 7
    warmup: int = 1
    threads: int = 2
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_count("repeats", self.repeats)
        check_int("warmup", self.warmup, 0, None, "a whole number, 0 or more")
        check_count("threads", self.threads)

    @classmethod
    def of(cls, device: str = "auto", **given: Any) -> Self:
        """Return the workload for a device; what is None or empty is as the device has it.

        Raises:
            SpecError: a device this machine lacks.
            MxlabError: a value out of range.
        """
        place = models.choose_device(device)
        named = {name: value for name, value in given.items() if value not in (None, [], ())}
        plain = {name: tuple(value) if isinstance(value, list) else value for name, value in named.items()}
        return cls(device=str(place), **{**cls.BY_DEVICE.get(place.type, {}), **plain})

    @abstractmethod
    def cases(self) -> Iterator[Case]:
        """Yield case after case; each is to be measured before the next is asked for."""

    @abstractmethod
    def __len__(self) -> int:
        """Return how many cases there are."""

    @property
    def place(self) -> torch.device:
        """The device."""
        return torch.device(self.device)

    @property
    def effort(self) -> Effort:
        """How often everything is measured."""
        return Effort(self.repeats, self.warmup)

    def in_order(self, dtypes: Sequence[str]) -> list[str]:
        """Return ``dtypes``, those last that the device does not multiply natively."""
        return sorted(dtypes, key=lambda dtype: not self._is_native(dtype))

    def effort_in(self, dtype: str) -> Effort:
        """Return how often a model is measured in ``dtype``: a few times where the device is slow in it."""
        return self.effort if self._is_native(dtype) else Effort(min(self.repeats, 3), self.warmup)

    def _is_native(self, dtype: str) -> bool:
        return is_native(getattr(torch, dtype), self.place)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: what a result was measured with."""
        return {f.name: value for f in fields(self) if f.compare and (value := asdict(self)[f.name]) is not None}

    def standard(self) -> dict[str, Any]:
        """Return what :meth:`to_dict` gives for the settings that the targets were set for, on this device."""
        return type(self).of(self.device).to_dict()


@dataclass(frozen=True, kw_only=True)
class TextWorkload(Workload):
    """One that reads text: rows of LAMBADA in ``data_dir``, or else the embedded passages."""

    model: str = models.EMBEDDED
    data_dir: Path | None = field(default=None, compare=False)  # no part of what was measured

    def __post_init__(self) -> None:
        super().__post_init__()
        data.digests((self.task,), self.data_dir)  # raises where the file is missing

    @property
    def task(self) -> str:
        """The name of the rows."""
        return data.PASSAGES if self.data_dir is None else LAMBADA

    def to_dict(self) -> dict[str, Any]:
        """See :meth:`Workload.to_dict`."""
        return {**super().to_dict(), "rows": self._rows(self.task)}

    def standard(self) -> dict[str, Any]:
        """See :meth:`Workload.standard`."""
        return {**super().standard(), "rows": self._rows(LAMBADA)}

    def _rows(self, text: str) -> str:
        return "random tokens" if self.model in RANDOM else text


def check_count(name: str, value: int) -> None:
    """Raise SpecError unless ``value`` is 1 or more."""
    check_int(name, value, 1, None, "a whole number, 1 or more")


def check_recipes(names: tuple[str, ...]) -> None:
    """Raise SpecError unless all ``names`` are recipes."""
    for name in names:
        load_any_recipe(name)


def parse_shape(text: str) -> tuple[int, ...]:
    """Return ``2048x576`` as (2048, 576).

    Raises:
        SpecError: not such a text.
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise SpecError(f"shape is {text!r}: write the lengths of its axes, 1 or more, like 2048x576")
    return tuple(map(int, text.split("x")))


def shape_text(shape: tuple[int, ...]) -> str:
    """Return a shape as ``2048x576``."""
    return "x".join(map(str, shape))


def check_choices(name: str, values: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    """Raise FormatError unless all ``values`` are among ``allowed``."""
    for value in values:
        check_choice(name, value, allowed)


def check_numerics(values: tuple[str, ...]) -> None:
    """Raise FormatError unless all ``values`` are numerics."""
    check_choices("numerics", values, NUMERICS)


def check_dtypes(values: tuple[str, ...]) -> None:
    """Raise FormatError unless all ``values`` are dtypes that mxlab quantizes."""
    check_choices("dtype", values, DTYPES)


def expand_formats(formats: tuple[str, ...], blocks: tuple[int, ...]) -> list[MXFormat]:
    """Return each format with each block size; one that is spelled with a block size (``int8@16``) has that.

    Raises:
        FormatError: not a format.
    """
    spelled = [
        [text] if "@" in text else [f"{head}@{block}{comma}{rest}" for block in blocks]
        for text in formats
        for head, comma, rest in [text.partition(",")]
    ]
    return [MXFormat.parse(text) for group in spelled for text in group]
