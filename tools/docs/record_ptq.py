"""Quantize a model under recipes, evaluate what was saved, and keep a row for each: the data of docs/ptq.md.

python tools/docs/record_ptq.py --data-dir DATA --out results/smollm2-135m/ptq RECIPE ... [--seed 0 --seed 1]
    [--model smollm2] [--text wikitext2] [--window 2048] [--windows 29] [--folder FOLDER]

A recipe without algorithms is rounded to nearest while it is evaluated. One with algorithms is quantized into a folder
(FOLDER/<recipe>-<seed>, by default a temporary one), from which the evaluation loads it; a folder that is there
already is only evaluated. A row that is there already is left alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from mxlab.compat.recipes import load_any_recipe
from mxlab.eval.text import TextRequest
from mxlab.experiments import provenance
from mxlab.progress import LineReporter, shown_by
from mxlab.ptq.job import RECORD, QuantizationJob
from mxlab.recipe import Recipe
from mxlab.rundir import RECIPE, read_json

ROWS = "rows.jsonl"
METRICS = ("perplexity", "cross_entropy", "kl_divergence", "top1_agreement")


def main() -> None:
    """Record what the command line asks for."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / ROWS
    kept = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    done = {(row["recipe"], row["seed"], row["text"], row["window"], row["windows"]) for row in kept}
    with shown_by(LineReporter(print)):
        for name in options.recipes:
            recipe = load_any_recipe(name)
            for seed in options.seed if recipe.algorithms else [None]:
                if (recipe.name, seed, options.text, options.window, options.windows) in done:
                    continue
                row = record(with_seed(recipe, seed), seed, options)
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(row) + "\n")
                print(json.dumps({key: row[key] for key in ("recipe", "seed", *METRICS)}))


def with_seed(recipe: Recipe, seed: int | None) -> Recipe:
    """Return the recipe with calibration windows of another seed."""
    if seed is None:
        return recipe
    calibration = {**recipe.algorithms.get("calibration", {}), "seed": seed}
    return replace(recipe, algorithms={**recipe.algorithms, "calibration": calibration})


def record(recipe: Recipe, seed: int | None, options: argparse.Namespace) -> dict[str, Any]:
    """Quantize, evaluate, and return the row."""
    with tempfile.TemporaryDirectory() as temporary:
        model, made, evaluated = options.model, {}, recipe
        if recipe.algorithms:
            folder = (options.folder or Path(temporary)) / f"{recipe.name}-{seed}"
            if not folder.exists():
                job = QuantizationJob(options.model, recipe, provenance.code_version(), data_dir=options.data_dir)
                job.run(folder, resume=True)
            model, made, evaluated = str(folder), read_json(folder / RECORD), load_any_recipe(folder / RECIPE)
        request = TextRequest(
            recipe=evaluated,
            model=model,
            dtype="float32",
            batch_size=1,
            data_dir=options.data_dir,
            text=options.text,
            window=options.window,
            windows=options.windows,
            reference=options.model,
        )
        outcome = request.evaluate(Path(temporary), _load)
    [values] = outcome.results.values()
    conversion = outcome.conversion
    return {
        "recipe": recipe.name,
        "seed": seed,
        "model": options.model,
        "text": options.text,
        "window": options.window,
        "windows": options.windows,
        "tokens": values["tokens"],
        **{name: values[f"{name},none"] for name in METRICS},
        "bits_per_parameter": conversion.bits_per_parameter,
        "bits_per_weight": conversion.bits_per_weight,
        **{key: made[key] for key in ("seconds", "peak_memory_bytes") if key in made},
        "recipe_toml": recipe.to_toml(),
        "environment": provenance.describe(),
    }


def _load(name: str, dtype: str, device: str) -> Any:
    from mxlab.sources.models import load_model

    return load_model(name, dtype, device)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--text", default="wikitext2")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=29)
    options = parser.parse_args()
    options.seed = options.seed or [0]
    return options


if __name__ == "__main__":
    main()
