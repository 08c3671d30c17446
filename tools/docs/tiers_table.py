"""One line for each run of a stage that was scored on a text, as a CSV table: what docs/recipes.md shows.

python tools/docs/tiers_table.py results/wikitext2/tiers results/wikitext2/tiers.csv
"""

import csv
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

MEASURES = ("perplexity", "kl_divergence", "top1_agreement")


def line(run: Path) -> dict[str, Any]:
    """What one run directory holds."""
    inventory = json.loads((run / "inventory.json").read_text(encoding="utf-8"))
    [metrics] = json.loads(next(run.glob("metrics_*.json")).read_text(encoding="utf-8"))["results"].values()
    recipe = tomllib.loads((run / "recipe.toml").read_text(encoding="utf-8"))["name"]
    bits = {"recipe": recipe, "bits_per_parameter": f"{inventory['bits_per_parameter']:.4g}"}
    return bits | {name: f"{metrics[f'{name},none']:.4g}" for name in MEASURES}


def main(stage: str, file: str) -> None:
    """Write the table of a stage's folder."""
    lines = sorted((line(run.parent) for run in Path(stage).glob("*/run.json")), key=lambda row: row["recipe"])
    with Path(file).open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, ["recipe", "bits_per_parameter", *MEASURES], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(lines, key=lambda row: row["recipe"] != "baseline"))


if __name__ == "__main__":
    main(*sys.argv[1:])
