"""A converted model as a Hugging Face folder: its weights on the grid, in the dtype they were computed in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mxlab import rundir
from mxlab.errors import RunError
from mxlab.model.apply import Storage, apply
from mxlab.model.conversion import Conversion
from mxlab.progress import Steps
from mxlab.recipe import Recipe
from mxlab.sources import models

SHARD = "1GB"  # of a file of weights, which safetensors holds in memory whole while it is written


def save_converted(model: str, recipe: Recipe, dtype: str, out: Path, storage: Storage = "grid") -> Conversion:
    """Load ``model`` on the CPU, apply ``recipe``, and :func:`save` it into the new folder ``out``.

    Its weights are kept as ``storage`` says; see :func:`mxlab.apply`.

    Raises:
        RunError: as :func:`save`.
        SourceError, ConversionError: as :func:`mxlab.sources.models.load_model` and :func:`mxlab.apply`.
    """

    def convert() -> tuple[Conversion, Any]:
        loaded = models.load_model(model, dtype, "cpu")
        return apply(loaded.model, recipe, storage), loaded.tokenizer

    return save(convert, out)


def save(
    make: Callable[[], tuple[Conversion, Any]], out: Path, record: Callable[[Path], None] = lambda folder: None
) -> Conversion:
    """Make a converted model and its tokenizer, and save both into the new folder ``out``, whole or not at all.

    The folder carries its recipe. With mxlab imported it loads in transformers as a converted model, under every tool;
    without mxlab transformers warns that it does not know the method, and computes with the weights on the grid alone.

    Args:
        make: makes them.
        out: the folder.
        record: writes what else the folder is to have.

    Raises:
        RunError: ``out`` exists already, or cannot be written. That is found out before ``make`` is called.
    """
    with new_folder(out) as folder:
        conversion, tokenizer = make()
        with Steps("saving"):
            conversion.model.save_pretrained(folder, max_shard_size=SHARD)  # pyright: ignore[reportCallIssue]
            tokenizer.save_pretrained(folder)
        inventory = json.dumps(conversion.inventory(), indent=1) + "\n"
        (folder / rundir.RECIPE).write_text(conversion.recipe.to_toml(), encoding="utf-8")
        (folder / rundir.INVENTORY).write_text(inventory, encoding="utf-8")
        record(folder)
    return conversion


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder that becomes the new folder ``out`` when it is filled, and that is gone where that fails.

    Raises:
        RunError: ``out`` exists already, which is found out at once, or cannot be written.
    """
    if out.exists():
        raise RunError(f"{out} exists already: give another --out folder")
    try:
        with rundir.partial(out.parent) as folder:
            yield folder
            folder.rename(out)
    except OSError as e:
        raise RunError(f"cannot write to {out}: {e}; there is no such folder now") from e
