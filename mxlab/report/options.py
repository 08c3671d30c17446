"""The swept options of a run: read from a folder's name, printed, put in order."""

import re
from collections.abc import Iterable, Mapping

Option = str | int | float | bool | None
Options = Mapping[str, Option]

SWEPT = ("block_size", "scale_bits", "custom_cuda")
ABBREVIATED = {"block_size": "bs", "scale_bits": "sb"}

RUN_NAME = re.compile(
    r"\d{8}_\d{6}_bs(?P<block_size>\d+)_sb(?P<scale_bits>\d+)_cc(?P<custom_cuda>true|false)", re.ASCII
)


def options_of_name(name: str) -> Options | None:
    """Return the options in a name such as ``20260207_220640_bs16_sb6_ccfalse``; None where it is another name."""
    found = RUN_NAME.fullmatch(name)
    if found is None:
        return None
    return {
        "block_size": int(found["block_size"]),
        "scale_bits": int(found["scale_bits"]),
        "custom_cuda": found["custom_cuda"] == "true",
    }


def in_order(options: Options) -> Options:
    """Return the options with those of the exercises first and the others by name: files may list them in any order."""
    names = [name for name in SWEPT if name in options]
    return {name: options[name] for name in (*names, *sorted(options.keys() - set(SWEPT)))}


def option_text(value: Option) -> str:
    """Return a value as the command line and the folder names write it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def option_rank(value: Option) -> tuple[bool, bool, Option]:
    """Return a sort key for values of any type: numbers and false before true, then text, then what is not set."""
    return value is None, isinstance(value, str), value


def options_rank(options: Options | None) -> tuple[object, ...]:
    """Return a sort key for configurations: block size, scale bits, custom CUDA, then the others; unknown ones last."""
    if options is None:
        return (True,)
    others = [(name, option_rank(value)) for name, value in options.items() if name not in SWEPT]
    return False, *(option_rank(options.get(name)) for name in SWEPT), others


def brief(options: Options | None) -> str:
    """Return the options on one line: ``bs=16, sb=6, custom_cuda=false``."""
    if options is None:
        return "configuration unknown"
    named = ((ABBREVIATED.get(name, name), value) for name, value in options.items() if value is not None)
    return ", ".join(f"{name}={option_text(value)}" for name, value in named) or "no swept options"


def further_options(many: Iterable[Options]) -> list[str]:
    """Return the names swept besides the three of the exercises, in the order in which they appear."""
    return list(dict.fromkeys(name for options in many for name in options if name not in SWEPT))
