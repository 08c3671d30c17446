"""Time a forward pass of a calibrated model with transforms beside one that is rounded to nearest without any.

python bench/transforms.py FOLDER OUT.json [--data-dir DATA] [--rounds 7]

FOLDER is what `mxlab quantize smollm2 --recipe mxfp4_w4a4kv4_best` saved. The models take turns on the same rows; of
each it writes the samples in seconds, and the ratios to the model that is rounded to nearest within a round.
"""

import argparse
import json
import math
import statistics
from functools import partial
from pathlib import Path

import torch

import mxlab
from mxlab.bench.timing import Contender, Effort, WallClock, alternate
from mxlab.experiments import provenance
from mxlab.sources.models import load_model
from mxlab.sources.texts import encode, load_text

ROWS, TOKENS = 4, 256
NEAREST = "rounded to nearest"


def main() -> None:
    """Time what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    loaded, nearest = (load_model("smollm2", "float32", "cpu") for _ in range(2))
    mxlab.apply(nearest.model, "mxfp4_w4a4kv4")
    models = {
        "unquantized": loaded.model,
        NEAREST: nearest.model,
        "calibrated, with transforms": load_model(str(options.folder), "float32", "cpu").model,
    }
    ids = encode(loaded.tokenizer, load_text("wikitext2_valid", options.data_dir))[: ROWS * TOKENS].view(ROWS, TOKENS)
    contenders = [Contender(name, partial(model, ids, use_cache=False)) for name, model in models.items()]
    with torch.no_grad():
        series = alternate(contenders, Effort(options.rounds, warmup=1, time_limit=math.inf), WallClock())
    samples = {name: one.samples for name, one in zip(models, series, strict=True)}
    found = {
        name: {
            "seconds": times,
            "ratio": statistics.median(a / b for a, b in zip(times, samples[NEAREST], strict=True)),
        }
        for name, times in samples.items()
    }
    settings = {"rows": ROWS, "tokens": TOKENS, "threads": torch.get_num_threads(), "dtype": "float32"}
    record = {**settings, "contenders": found, "environment": provenance.describe()}
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, values in found.items():
        print(f"{name}: {statistics.median(values['seconds']):.3f} s, {values['ratio']:.3f}")


if __name__ == "__main__":
    main()
