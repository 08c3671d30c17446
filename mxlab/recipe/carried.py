"""Read the recipe that a saved model carries in its ``config.json``. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mxlab.errors import MxlabError, SpecError
from mxlab.recipe.recipe import Recipe

METHOD = "mxlab"  # the quant_method in the quantization_config, by which transformers knows who wrote it


def carried_recipe(config: Mapping[str, Any]) -> Recipe:
    """Return the recipe in a ``quantization_config``.

    Raises:
        SpecError: it holds none, or one that this version does not know.
    """
    try:
        return Recipe.from_dict(config["recipe"], "quantization_config of config.json")
    except (KeyError, MxlabError) as e:
        reason = e if isinstance(e, MxlabError) else "there is no recipe in it"
        raise SpecError(f"the model's quantization_config cannot be read: {reason}; convert it anew") from None


def recipe_of_model(name: str) -> Recipe | None:
    """Return the recipe that a model's folder carries, or what this machine has of the hub's; None where none does.

    Raises:
        SpecError: it carries one that cannot be read.
    """
    file = _config_file(name)
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError):
        return None  # loading the model will say what is wrong
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return carried_recipe(found) if isinstance(found, dict) and found.get("quant_method") == METHOD else None


def _config_file(name: str) -> Path | None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / "config.json"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(file) if isinstance(file, str) else None
