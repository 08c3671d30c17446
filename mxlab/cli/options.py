"""Options that several commands take, and what is made of them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from mxlab import environment
from mxlab.cli.help import shipped_names
from mxlab.errors import SpecError


class Dtype(StrEnum):
    """The dtypes a model can compute in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Storage(StrEnum):
    """How quantized weights are kept."""

    grid = "grid"
    packed = "packed"


_MODEL = "A hub name, a folder, or smollm2 (embedded)."
_RECIPE = "A shipped recipe's name, or a TOML file."
_recipes = shipped_names("recipe")
ModelOption = Annotated[str, typer.Option("--model", help=_MODEL)]
ModelArgument = Annotated[str, typer.Argument(help=_MODEL)]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help=_RECIPE, autocompletion=_recipes)]
RecipeArgument = Annotated[str, typer.Argument(help=_RECIPE, autocompletion=_recipes)]
RecipesOption = Annotated[
    list[str] | None,
    typer.Option("--recipe", help=f"{_RECIPE} Give it again for another, to compare.", autocompletion=_recipes),
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override an option: --set block_size=16.")]
TasksOption = Annotated[
    str | None,
    typer.Option("--tasks", help="lm-eval tasks, separated by commas, or mxlab_passages (embedded, the default)."),
]
TextOption = Annotated[
    str | None,
    typer.Option("--text", help="Perplexity of a text instead: wikitext2, pile, passages, ... or a file."),
]
WindowOption = Annotated[
    int | None, typer.Option("--window", help="Tokens of a window of the text; 512 where none is given.")
]
StrideOption = Annotated[
    int | None, typer.Option("--stride", help="Tokens from one window to the next; disjoint where none is given.")
]
WindowsOption = Annotated[
    int | None, typer.Option("--windows", help="The first so many windows; the whole text where none is given.")
]
CompareOption = Annotated[
    bool, typer.Option("--compare", help="KL divergence and top-1 agreement with the unquantized model.")
]
ReferenceOption = Annotated[
    str | None,
    typer.Option(
        "--reference", help="Compare with this model: for a saved quantized model, the one that it was made from."
    ),
]
BosOption = Annotated[
    bool, typer.Option("--bos", help="Let the model see its token for the beginning of a text before each window.")
]
LimitOption = Annotated[
    float | None, typer.Option("--limit", help="Rows of each task: a count, or a fraction below 1.")
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option("--batch-size", help="Rows or windows of a batch; 16 rows or 4 windows where none is given."),
]
MaxLengthOption = Annotated[
    int | None, typer.Option("--max-length", help="Longest context of a task in tokens; 2048 where none is given.")
]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="What the model computes in; auto: the fastest the device computes natively.")
]
StorageOption = Annotated[
    Storage,
    typer.Option("--storage", help="How quantized weights are kept: grid, in the dtype; packed, in their bits."),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:0, ...")]
DataDirOption = Annotated[
    Path | None,
    typer.Option("--data-dir", help="A folder with lambada_openai.jsonl, wikitext2_test.raw, wikitext2_valid.txt."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, nothing else, to standard output.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Where the stage folders go.")]


def given(**settings: Any) -> dict[str, Any]:
    """Return the settings that were named on the command line."""
    return {name: value for name, value in settings.items() if value is not None}


def text_settings(
    text: str | None,
    window: int | None,
    stride: int | None,
    windows: int | None,
    compare: bool,
    bos: bool,
    reference: str | None = None,
) -> dict[str, Any]:
    """Return the settings of a text that were named on the command line."""
    return given(
        text=text,
        window=window,
        stride=stride,
        windows=windows,
        compare=compare or None,
        bos=bos or None,
        reference=reference,
    )


def task_names(tasks: str | None) -> tuple[str, ...] | None:
    """Return the names in a list that is separated by commas."""
    return tuple(name.strip() for name in tasks.split(",") if name.strip()) if tasks else None


def row_limit(limit: float | None) -> float | None:
    """Return 16 rather than 16.0, so that the same limit is written in one way."""
    return int(limit) if limit is not None and limit >= 1 and limit.is_integer() else limit


def refuse_mx_specs(command: str, remedy: str = "has recipes of its own") -> None:
    """Raise SpecError where MX_SPECS_JSON is set, which ``command`` would not act on."""
    if environment.MX_SPECS in environment.variables():
        raise SpecError(f"{environment.MX_SPECS} is set: {command} {remedy}; unset it first")
