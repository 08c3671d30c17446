"""Quantize a model under recipes, evaluate what was saved, and keep a row for each: the data of docs/ptq.md.

python tools/docs/record_ptq.py --data-dir DATA --out results/smollm2-135m/ptq RECIPE ... [--seed 0 --seed 1]
    [--set gptq.correction=0.5] [--without distillation] [--model smollm2] [--text wikitext2] [--window 2048]
    [--windows 29] [--folder FOLDER]

A recipe that takes no calibration is rounded to nearest while it is evaluated. Another is quantized into a folder
(FOLDER/<recipe>-<changes>-<seed>, by default a temporary one), from which the evaluation loads it; a folder that is
there already is only evaluated. A row that is there already is left alone. ``--set`` changes an option of an algorithm,
as a TOML value, ``--without`` leaves an algorithm out, or what rules ask for (transform, k_offset): the row says so.
"""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from mxlab.compat.recipes import load_any_recipe
from mxlab.experiments import provenance
from mxlab.progress import LineReporter, shown_by
from mxlab.ptq.measure import METRICS, Measurement, with_options
from mxlab.recipe import Recipe

ROWS = "rows.jsonl"
OF_RULES: dict[str, Any] = {"transform": None, "k_offset": False}


def main() -> None:
    """Record what the command line asks for."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / ROWS
    kept = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    done = {(r["recipe"], r["changes"], r["seed"], r["text"], r["window"], r["windows"]) for r in kept}
    changes = ", ".join([*options.set, *(f"without {name}" for name in options.without)])
    with shown_by(LineReporter(print)):
        for name in options.recipes:
            recipe = changed(load_any_recipe(name), options)
            for seed in options.seed if recipe.takes_calibration else [None]:
                if (recipe.name, changes, seed, options.text, options.window, options.windows) in done:
                    continue
                calibrated = recipe if seed is None else with_options(recipe, {"calibration": {"seed": seed}})
                place = None if options.folder is None else options.folder / _folder_name(recipe.name, changes, seed)
                row = {**record(calibrated, seed, place, options), "changes": changes}
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(row) + "\n")
                print(json.dumps({key: row[key] for key in ("recipe", "changes", "seed", *METRICS)}))


def changed(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """Return a recipe as the options change it."""
    for change in options.set:
        path, _, value = change.partition("=")
        table, _, key = path.partition(".")
        recipe = with_options(recipe, {table: {key: tomllib.loads(f"x = {value}")["x"]}})
    for name in options.without:
        if name in OF_RULES:
            recipe = replace(recipe, rules=tuple(replace(rule, **{name: OF_RULES[name]}) for rule in recipe.rules))
        else:
            recipe = replace(recipe, algorithms={k: v for k, v in recipe.algorithms.items() if k != name})
    return recipe


def _folder_name(recipe: str, changes: str, seed: int | None) -> str:
    return "-".join([recipe, *re.findall(r"[\w.]+", changes), str(seed)])


def record(recipe: Recipe, seed: int | None, folder: Path | None, options: argparse.Namespace) -> dict[str, Any]:
    """Quantize, evaluate, and return the row."""
    measurement = Measurement(options.model, options.text, options.window, options.windows, options.data_dir)
    row = measurement.of(recipe, provenance.code_version(), folder)
    return {**row, "seed": seed, "environment": provenance.describe()}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--without", action="append", default=[])
    parser.add_argument("--text", default="wikitext2")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=29)
    options = parser.parse_args()
    options.seed = options.seed or [0]
    return options


if __name__ == "__main__":
    main()
