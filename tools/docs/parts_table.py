"""Write docs/parts.md: what each module is for, in every causal LM that transformers builds from a small configuration.

python tools/docs/parts_table.py [MODEL_TYPE ...]    without a name: all, into docs/parts.md; else to the screen
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mxlab.model.sites import find_sites
from mxlab.model.structure import Structure

PAGE = Path(__file__).parents[2] / "docs" / "parts.md"
PARTS = ("attention", "mixer", "mlp", "router", "head", "vision")
# Few layers, by the names that configurations have for their number; the last keeps the default.
_SMALL: tuple[dict[str, Any], ...] = (
    {"num_hidden_layers": 4}, {"n_layer": 4}, {"num_layers": 4}, {"n_layers": 4}, {},
)  # fmt: skip

HEAD = """# What the modules of each architecture are for

Made by `python tools/docs/parts_table.py` with transformers {version}; do not edit. For every causal language model that
transformers builds from its default configuration with few layers: the sites ([architecture.md](architecture.md)) by their
part, layers and experts as `*`. Decoder layers are those of the list that is named. An attention whose K and V can be
quantized is in **bold**; a site that mxlab cannot convert is in parentheses. Nothing here rests on a name: see
[mxlab/model/structure.py](../mxlab/model/structure.py).

| model | decoder layers | {parts} |
|---|---|{rules}|
"""


def build(model_type: str) -> Any:
    """Return the causal LM of that type on the meta device; the last error where it cannot be built."""
    error: Exception = ValueError(f"no model type {model_type}")
    for small in _SMALL:
        try:
            config = CONFIG_MAPPING[model_type](**small)
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config)
        except Exception as e:  # whatever a configuration's own checks raise
            error = e
    return error


def row(model_type: str, model: Any) -> str:
    """Return the model's row of the table."""
    structure = Structure(model)
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for site in find_sites(model, structure):
        layers = next((x for x in structure.layer_lists if site.name.startswith(f"{x}.")), "")
        inside = site.name.removeprefix(f"{layers}.").partition(".")[2] if layers else site.name
        name = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", inside)
        text = f"**{name}**" if site.kind == "attention" else f"({name})" if site.obstacle else name
        found[site.part][text] = None
    lists = ", ".join(f"`{name}`" for name in structure.layer_lists)
    cells = (" ".join(found[part]) for part in PARTS)
    return f"| {model_type} | {lists} | {' | '.join(cells)} |"


def page() -> str:
    """Return the whole page."""
    rows, missing = [], []
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        model = build(model_type)
        if isinstance(model, Exception):
            missing.append(model_type)
        else:
            rows.append(row(model_type, model))
    head = HEAD.format(version=transformers.__version__, parts=" | ".join(PARTS), rules="|".join("---" for _ in PARTS))
    return head + "\n".join(rows) + f"\n\nNot built from a default configuration: {', '.join(missing)}.\n"


if __name__ == "__main__":
    if sys.argv[1:]:
        print(*(row(name, build(name)) for name in sys.argv[1:]), sep="\n")
    else:
        PAGE.write_text(page(), encoding="utf-8")
