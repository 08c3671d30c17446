"""A converted model as a Hugging Face folder: its weights on the grid, in the dtype they were computed in."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from mxlab import models
from mxlab.conversion import Conversion
from mxlab.convert import apply
from mxlab.errors import RunError
from mxlab.recipe import Recipe


def convert(model: str, recipe: Recipe, dtype: str, out: Path) -> Conversion:
    """Load ``model`` on the CPU, apply ``recipe``, and save it into the new folder ``out``, whole or not at all.

    The folder loads in transformers as any other, with weights on the grid; what a recipe does to activations and to
    K and V needs ``mxlab.apply(model, out / "recipe.toml")`` again.

    Raises:
        RunError: ``out`` exists already, or cannot be written.
        SourceError, ConversionError: as :func:`mxlab.models.load` and :func:`mxlab.apply`.
    """
    if out.exists():
        raise RunError(f"{out} exists already: give another --out folder")
    partial = out.with_name(f".partial-{os.getpid()}-{out.name}")
    try:
        partial.mkdir(parents=True)
        loaded = models.load(model, dtype, "cpu")
        conversion = apply(loaded.model, recipe)
        loaded.model.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
        (partial / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
        (partial / "inventory.json").write_text(json.dumps(conversion.inventory(), indent=1) + "\n", encoding="utf-8")
        partial.rename(out)
    except OSError as e:
        raise RunError(f"cannot write to {out}: {e}; nothing was kept") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return conversion
