"""Checks of values that come from outside: whole numbers, choices, keys. Each error names the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from mxlab.errors import FormatError, SpecError


def check_int(name: str, value: object, low: int, high: int | None, allowed: str) -> None:
    """Raise FormatError unless ``value`` is an int (no bool) from ``low`` to ``high``; ``allowed`` says so in words."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise FormatError(f"{name} is {value!r}: it must be {allowed}")


def check_bool(name: str, value: object) -> None:
    """Raise FormatError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise FormatError(f"{name} is {value!r}: it must be true or false")


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise FormatError unless ``value`` is one of ``allowed``; the message suggests the nearest one."""
    if value not in allowed:
        raise FormatError(
            f"{name} is {value!r}: it must be one of {', '.join(map(str, allowed))}{suggestion(value, allowed)}"
        )


def check_keys(values: Mapping[str, object], known: Sequence[str], source: str) -> None:
    """Raise SpecError at the first key of ``values`` that is not ``known``; ``source`` names their table."""
    for key in values:
        if key not in known:
            raise SpecError(f"{source}: unknown key {key!r}{suggestion(key, known)}; known are {', '.join(known)}")


def suggestion(word: object, known: Iterable[object]) -> str:
    """Return ``; did you mean 'x'?`` for the nearest of ``known``, or nothing where none is near."""
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
