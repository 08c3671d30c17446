"""Check and time mxlab's kernels on this machine's GPU: bits first, then speed, then whole models.

Each part runs in a process of its own, case by case, and reports every case as a line of JSON. A case that raises is
noted; one that crashes or hangs costs its process, and the part goes on behind it in a new one. So the whole ends in
time whatever a kernel does, and says which cases it did not reach. bench/device.sh sets a machine up and calls this.

    python bench/device.py --out FOLDER             on the GPU
    python bench/device.py --device cpu --out FOLDER    the same code on the CPU, with tiny sizes: a rehearsal
"""

from __future__ import annotations

import argparse
import json
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The end of each part, as a share of the whole time; time that one leaves over goes to the next.
PARTS = {"machine": 0.2, "bits": 0.6, "quantize": 0.8, "forward": 1.0}
PATIENCE = 45.0  # seconds without a line before a process is taken to hang; a kernel compiles in less than one
CLOSING = 5.0  # seconds kept back to report
LONGEST = 2000  # characters of an error that are kept

Case = tuple[str, Callable[[], dict[str, Any]]]
Record = dict[str, Any]


@dataclass
class Part:
    """The outcome of a part: ``results`` and ``failures`` by the name of the case, and the names of all other cases."""

    results: dict[str, Record] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0


def main() -> int:
    """Run all parts, or in a process of its own one of them; return 1 if a kernel failed or gave other bits."""
    options = _options()
    if options.part:
        return _work(options)
    start = time.monotonic()
    length = options.seconds - CLOSING
    parts = {name: _run(name, options, start + share * length) for name, share in PARTS.items()}
    path = _write(parts, options)
    print(table(parts))
    print(f"everything measured: {path}")
    return int(bool(parts["bits"].failures))


def cases(part: str, device: str) -> list[Case]:
    """Return the cases of a part, each with its name; a call measures or compares, and raises on failure."""
    if part == "bits":
        import device_bits

        return device_bits.cases(device)
    import device_speed

    return device_speed.CASES[part](device)


# The process of a part


def _work(options: argparse.Namespace) -> int:
    """Work through the cases from ``--first`` on until the time is over, a line of JSON before and after each."""
    deadline = time.monotonic() + options.seconds
    found = cases(options.part, options.device)
    _say({"cases": [name for name, _ in found]})
    if error := _why_unusable(options.device):
        _say({"unusable": error})
        return 1
    for index, (name, call) in enumerate(found[options.first :], options.first):
        if time.monotonic() > deadline:
            break
        _say({"begun": index})
        try:
            _say({"case": name, "result": call()})
        except Exception as e:
            _say({"case": name, "error": f"{type(e).__name__}: {e}"[:LONGEST]})
            if _why_unusable(options.device):
                return 1
    return 0


def _why_unusable(device: str) -> str | None:
    """Return why this process cannot use the GPU, at all or since an error; None where it can."""
    import torch

    try:
        torch.zeros(1, device=device).add_(1).item()
    except Exception as e:
        return f"{type(e).__name__}: {e}"[:LONGEST]
    return None


def _say(record: Record) -> None:
    print(json.dumps(record), flush=True)


# The process that runs them


def _run(name: str, options: argparse.Namespace, deadline: float) -> Part:
    """Run a part until it is done or ``deadline``, in as many processes as it takes."""
    start = time.monotonic()
    part, names, first = Part(), [name], 0
    while first < len(names) and (left := deadline - time.monotonic()) > 0:
        begun, ending, unusable = -1, "", None
        for record in _lines(name, options, first, left):
            names = record.get("cases", names)
            begun = record.get("begun", begun)
            ending, unusable = record.get("ending", ending), record.get("unusable", unusable)
            if "result" in record:
                part.results[record["case"]] = record["result"]
            elif "error" in record:
                part.failures[record["case"]] = record["error"]
        if ending == "done" or time.monotonic() > deadline:
            break
        if unusable or begun < 0:  # no case can be tried
            part.failures[name] = unusable or ending
            break
        first = begun + 1
        if names[begun] not in part.results:
            part.failures.setdefault(names[begun], ending)
    part.skipped = [n for n in names if n not in part.results and n not in part.failures]
    part.seconds = round(time.monotonic() - start, 1)
    return part


def _lines(name: str, options: argparse.Namespace, first: int, seconds: float) -> Iterator[Record]:
    """Yield what the process of a part says, and how it ended: ``done``, or what went wrong."""
    command = [sys.executable, __file__, "--part", name, "--device", options.device]
    command += ["--first", str(first), "--seconds", str(seconds)]
    deadline = time.monotonic() + seconds
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        said: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_pass_on, args=(process.stdout, said), daemon=True)
        reader.start()
        try:
            while (line := said.get(timeout=max(0.1, min(PATIENCE, deadline + 1 - time.monotonic())))) is not None:
                if line.startswith("{"):
                    yield json.loads(line)
        except queue.Empty:
            yield {"ending": "did not end in time"}
        else:
            code = process.wait()
            yield {"ending": "done" if code == 0 else f"its process ended with code {code}"}
        finally:
            process.kill()


def _pass_on(stream: Any, said: queue.Queue[str | None]) -> None:
    for line in stream:
        said.put(line)
    said.put(None)


# The report


def table(parts: dict[str, Part]) -> str:
    """Return what was found as a short text, the most important last."""
    bits = parts["bits"]
    lines = [*_machine_lines(parts["machine"]), "", *_quantize_lines(parts["quantize"]), ""]
    lines += [*_forward_lines(parts["forward"]), ""]
    for name, part in parts.items():
        lines += _failure_lines(name, part)
        if part.skipped:
            lines.append(f"{name}: {len(part.skipped)} cases not reached in time, the first: {part.skipped[0]}")
    total = len(bits.results) + len(bits.failures) + len(bits.skipped)
    lines.append(
        f"bits: {len(bits.results)} of {total} cases as the reference, {len(bits.failures)} failed, "
        f"{len(bits.skipped)} not reached ({bits.seconds:.0f} s)"
    )
    return "\n".join(lines)


def _machine_lines(part: Part) -> list[str]:
    found = part.results.get("machine", {})
    return [
        f"{key}: {found[key]}"
        for key in ("device", "compute capability", "driver", "torch", "GPU kernels", "mxlab")
        if key in found
    ]


def _quantize_lines(part: Part) -> list[str]:
    head = f"{'quantizing':44}{'ns/element':>12}{'GB/s':>9}{'x copy':>8}"
    rows = [
        f"{name:44}{r['ns/element']:12.4f}{r['GB/s']:9.0f}{r['x copy']['median']:8.2f}"
        for name, r in part.results.items()
    ]
    return [head, *rows]


def _forward_lines(part: Part) -> list[str]:
    head = f"{'forward':44}{'ms':>9}{'plain ms':>10}{'x plain':>9}{'quartiles':>14}{'peak GiB':>10}{'plain':>7}"
    rows = [
        f"{name:44}{r['ms']['median']:9.1f}{r['plain ms']['median']:10.1f}{r['x plain']['median']:9.3f}"
        f"{r['x plain']['q1']:8.3f}-{r['x plain']['q3']:.3f}{r['peak GiB']:9.2f}{r['plain peak GiB']:7.2f}"
        for name, r in part.results.items()
    ]
    return [head, *rows]


def _failure_lines(name: str, part: Part) -> list[str]:
    """Return a line for each kind of failure: how many cases, and the first of them."""
    kinds: dict[str, list[str]] = {}
    for case, error in part.failures.items():
        first_line = error.partition("\n")[0][:200]
        kinds.setdefault(re.sub(r"such as .*|\d+", "", first_line), []).append(f"{case}: {first_line}")
    return [
        f"{name} FAILED: {found[0]}" + (f", and {len(found) - 1} more like it" if found[1:] else "")
        for found in kinds.values()
    ]


def _write(parts: dict[str, Part], options: argparse.Namespace) -> Path:
    """Write everything to ``device-<name>.json`` and return the path."""
    described = parts["machine"].results.get("machine", {})
    name = re.sub(r"[^a-z0-9]+", "-", str(described.get("device", options.device)).lower()).strip("-")
    path = options.out / f"device-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {name: vars(part) for name, part in parts.items()}
    # All that agree need no name each.
    bits = document["bits"]
    document["bits"] = {**bits, "results": len(bits["results"])}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check and time mxlab's kernels on a GPU.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal with tiny sizes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON file")
    parser.add_argument("--seconds", type=float, default=290.0, help="end after so many, whatever is measured by then")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
