"""Run a benchmark, and say in its document where and how it was measured."""

from __future__ import annotations

import hashlib
import json
import time

from mxlab.bench import results
from mxlab.bench.decoding import DecodeWorkload
from mxlab.bench.evaluation import LmEvalWorkload, MemoryWorkload
from mxlab.bench.inference import ForwardWorkload, GenerateWorkload
from mxlab.bench.linear import LinearWorkload
from mxlab.bench.llamacpp import LlamaCppWorkload
from mxlab.bench.quantize import QuantizeWorkload
from mxlab.bench.results import Document, Measurement
from mxlab.bench.startup import ConvertWorkload, ImportWorkload
from mxlab.bench.timing import threads
from mxlab.bench.workload import Workload
from mxlab.experiments import provenance
from mxlab.progress import track

BENCHMARKS: dict[str, type[Workload]] = {
    "quantize": QuantizeWorkload,
    "linear": LinearWorkload,
    "forward": ForwardWorkload,
    "generate": GenerateWorkload,
    "decode": DecodeWorkload,
    "llama.cpp": LlamaCppWorkload,
    "lm-eval": LmEvalWorkload,
    "memory": MemoryWorkload,
    "convert": ConvertWorkload,
    "import": ImportWorkload,
}


def perform(name: str, workload: Workload, command: str) -> Document:
    """Measure the cases of benchmark ``name`` under the workload's number of threads."""
    busy = results.busy_cores()
    load = results.load_average()
    start = time.perf_counter()
    measured = Measurement()
    with threads(workload.threads):
        described = provenance.describe()
        for case in track(workload.cases(), f"bench {name}", len(workload)):
            measured.add(case.measure(workload.place))
    return {
        "benchmark": name,
        "standard": workload.to_dict() == workload.standard(),
        "command": command,
        "measured on": results.name(described, workload.device),
        "instruction set": results.instruction_set(described, workload.device),
        "machine": described,
        "load": {"average": load, "busy cores before": busy, "busy cores after": results.busy_cores()},
        "settings": workload.to_dict(),
        "elapsed_seconds": round(time.perf_counter() - start, 1),
        "failures": measured.failures,
        "rows": [row.to_dict() for row in measured.rows],
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
