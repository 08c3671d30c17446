"""Running benchmarks: each under its number of threads, into a document that says where and how it was measured."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mxlab.bench import forward, generate, linear, lmeval, quantize, results, startup
from mxlab.bench.results import Document, Outcome
from mxlab.bench.settings import Settings
from mxlab.bench.timing import threads
from mxlab.experiments import provenance

Note = Callable[[str], None]


@dataclass(frozen=True)
class Benchmark:
    """What can be told to a benchmark, and what it measures: case after case."""

    settings: type[Settings]
    measure: Callable[[Any], Iterator[tuple[str, Outcome]]]


BENCHMARKS = {
    "quantize": Benchmark(quantize.QuantizeSettings, quantize.measure),
    "linear": Benchmark(linear.LinearSettings, linear.measure),
    "forward": Benchmark(forward.ForwardSettings, forward.measure),
    "generate": Benchmark(generate.GenerateSettings, generate.measure),
    "lm-eval": Benchmark(lmeval.LmEvalSettings, lmeval.measure),
    "convert": Benchmark(startup.ConvertSettings, startup.measure_convert),
    "import": Benchmark(startup.ImportSettings, startup.measure_import),
}


def perform(name: str, settings: Settings, command: str, note: Note = lambda _: None) -> Document:
    """Run the benchmark; ``note`` hears of each case that is done."""
    busy = results.busy_cores()
    load = results.load_average()
    start = time.perf_counter()
    outcome = Outcome()
    with threads(settings.threads):
        described = provenance.describe()
        for case, found in BENCHMARKS[name].measure(settings):
            note(case)
            outcome.add(found)
    return {
        "benchmark": name,
        "standard": settings.to_dict() == settings.standard(),
        "command": command,
        "measured on": results.name(described, settings.device),
        "instruction set": results.instruction_set(described, settings.device),
        "machine": described,
        "load": {"average": load, "busy cores before": busy, "busy cores after": results.busy_cores()},
        "settings": settings.to_dict(),
        "elapsed_seconds": round(time.perf_counter() - start, 1),
        "failures": outcome.failures,
        "rows": [row.to_dict() for row in outcome.rows],
    }


def file_name(document: Document) -> str:
    """Return ``quantize-intel-xeon-processor-2-cores-avx512``: of the benchmark, the machine and its kernels.

    Settings other than the standard ones add six digits of their hash. So a file is only ever replaced by the same
    measurement on the same kind of machine.
    """
    parts = [document["benchmark"], results.slug(document["measured on"])]
    if not document["settings"]["device"].startswith("cuda"):
        parts.append(results.slug(document["machine"]["CPU kernels"]))
    if not document["standard"]:
        settings = json.dumps(document["settings"], sort_keys=True)
        parts.append(hashlib.sha256(settings.encode()).hexdigest()[:6])
    return "-".join(parts)


def is_disturbed(document: Document) -> bool:
    """Return whether other processes kept cores busy, before or after."""
    load = document["load"]
    return max(load["busy cores before"], load["busy cores after"]) > results.QUIET
