"""Peak resident memory of an evaluation, loading included: each recipe in a fresh process, against the baseline.

python bench/memory.py [--limit 32] [--out bench/results/memory.json]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPES = ("baseline", "ex1", "ex2")


def measure(recipe: str, limit: int) -> float:
    """Peak resident memory, in MiB, of `mxlab eval` under ``recipe`` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", recipe, folder, str(limit)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def child(recipe: str, folder: str, limit: int) -> None:
    """Evaluate, then print the process's own peak."""
    from mxlab.eval.tasks import TaskRequest
    from mxlab.experiments import runs
    from mxlab.recipe import load_recipe

    runs.run(TaskRequest(load_recipe(recipe), limit=limit), Path(folder) / recipe)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Measure every recipe and write the peaks and their ratios to the baseline's."""
    from mxlab.experiments import provenance

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=32, help="rows of the embedded passages")
    parser.add_argument("--out", type=Path, default=Path("bench/results/memory.json"))
    arguments = parser.parse_args()
    peaks = {recipe: measure(recipe, arguments.limit) for recipe in RECIPES}
    ratios = {recipe: peak / peaks["baseline"] for recipe, peak in peaks.items()}
    for recipe in RECIPES:
        print(f"{recipe:10} {peaks[recipe]:7.0f} MiB  {ratios[recipe]:.3f} x baseline")
    result = {"environment": provenance.describe(), "limit": arguments.limit, "peak_mib": peaks, "ratio": ratios}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
