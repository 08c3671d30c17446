"""What a model takes in memory under a recipe: as its formats say, on disk, and measured from outside of the process.

A child process loads the model from a folder, reads a text and stops at each step; meanwhile its parent reads from the
system what the child has resident, and what it had at most since the step before.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mxlab.errors import RunError, SpecError
from mxlab.hf.checkpoint import save_converted
from mxlab.model import footprint
from mxlab.model.apply import prepare
from mxlab.model.footprint import Footprint
from mxlab.model.nn.packed import PARTS
from mxlab.progress import track
from mxlab.recipe import Recipe
from mxlab.sources import devices, models

_CHILD = "import sys; from mxlab.experiments.memory import stop_at_each_step; stop_at_each_step(*sys.argv[1:])"
_OF_OTHERS = "in the dtype of the model; buffers that are computed anew are not stored"
STEPS = ("libraries", "loaded", "read", "generated")


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        part: of the memory.
        theory: bytes by the formats; None where none are predicted, here and below.
        stored: bytes in the files, or of the codes in the cache.
        resident: bytes that stay in memory.
        peak: bytes at most, while they come to be.
        reason: why these differ.
    """

    part: str
    theory: int | None
    stored: int | None
    resident: int | None
    peak: int | None
    reason: str


@dataclass(frozen=True)
class Memory:
    """What a model takes under a recipe, with ``tokens`` in its cache."""

    recipe: str
    tokens: int
    lines: tuple[Line, ...]


def measure(model: str, recipe: Recipe, tokens: int, dtype: str = devices.AUTO) -> Memory:
    """Pack a model, and measure what it takes on the CPU.

    Args:
        model: a hub name, a folder, or ``smollm2``.
        recipe: how it is quantized.
        tokens: of a text that it reads in one pass, before it generates a few.
        dtype: what it computes in.

    Raises:
        SpecError: no tokens.
        RunError: this is not Linux, a container keeps the peak of a process from being reset, or the child ended.
        SourceError, ConversionError: as :func:`mxlab.sources.models.load_model` and :func:`mxlab.apply`.
    """
    if tokens < 1:
        raise SpecError(f"tokens is {tokens}: it must be 1 or more")
    if not Path("/proc/self/smaps_rollup").exists():
        raise RunError("memory is measured by what Linux says of a process in /proc: there is nothing of it here")
    theory = footprint.predicted(prepare(models.skeleton(model, dtype), recipe), tokens)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_converted(model, recipe, dtype, folder, "packed")
        devices.release_memory()
        stored = stored_bytes(folder)
        measured = _measured(folder, tokens, dtype)
    return Memory(recipe.name, tokens, tuple(_lines(theory, stored, measured)))


def stored_bytes(folder: Path) -> Footprint:
    """Return what the tensors in the files of a saved model take; no cache is there."""
    sizes = {"elements": 0, "scales": 0, "others": 0}
    kinds = {PARTS["elements"]: "elements", PARTS["scales"]: "scales", PARTS["tensor_scale"]: "scales"}
    for file in sorted(folder.glob("*.safetensors")):
        for name, (start, end) in _places(file).items():
            sizes[kinds.get(name.rpartition(".")[2], "others")] += end - start
    return Footprint(**sizes, cache=0)


def _places(file: Path) -> dict[str, tuple[int, int]]:
    """Return where the tensors of a safetensors file begin and end, from its header: no tensor is read."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return {name: tuple(told["data_offsets"]) for name, told in header.items() if name != "__metadata__"}


@dataclass(frozen=True)
class _Step:
    """What the system says of a process at a step: bytes that are resident, and that were since the step before."""

    resident: int
    peak: int
    told: dict[str, int]  # what the process says of itself


def _lines(theory: Footprint, stored: Footprint, at: dict[str, _Step]) -> Iterator[Line]:
    loaded = at["loaded"].resident - at["libraries"].resident
    kept = at["read"].resident - at["loaded"].resident
    yield Line("elements of quantized weights", theory.elements, stored.elements, None, None, "rows end with a byte")
    yield Line("their scales", theory.scales, stored.scales, None, None, "a byte for each block")
    yield Line("other parameters", theory.others, stored.others, None, None, _OF_OTHERS)
    yield Line(
        "weights together",
        theory.weights,
        stored.weights,
        loaded,
        at["loaded"].peak - at["libraries"].resident,
        "resident: whole pages, the modules themselves; peak: what loading needs beside",
    )
    yield Line(
        "keys and values",
        theory.cache,
        at["read"].told["cache"],
        kept,
        None,
        "resident: what the allocator keeps of the pass that made them, too",
    )
    yield Line(
        "activations",
        None,
        None,
        None,
        at["read"].peak - at["read"].resident,
        "of the text in one pass, beyond what stays; in the dtype of the model",
    )
    yield Line(
        "generating",
        None,
        None,
        at["generated"].resident - at["read"].resident,
        at["generated"].peak - at["read"].resident,
        "of sixteen more tokens",
    )


def _measured(folder: Path, tokens: int, dtype: str) -> dict[str, _Step]:
    with _child(folder, tokens, dtype) as child:
        return {step: _next_step(child, step) for step in track(list(STEPS), "measuring memory")}


@contextmanager
def _child(folder: Path, tokens: int, dtype: str) -> Iterator[Any]:
    command = [sys.executable, "-c", _CHILD, str(folder), str(tokens), dtype]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(command, stderr=errors, **pipes) as child:
        try:
            yield child
        except (EOFError, BrokenPipeError):
            child.wait()
            errors.seek(0)
            raise RunError(f"the process that was measured ended:\n{errors.read()[-2000:]}") from None
        finally:
            child.kill()


def _next_step(child: Any, step: str) -> _Step:
    """Wait for the child to reach a step, look at its memory, and let it go on."""
    while True:
        line = child.stdout.readline()
        if not line:
            raise EOFError
        if line.startswith("{") and (told := json.loads(line))["step"] == step:
            break
    place = Path("/proc") / str(child.pid)
    resident = devices.told_by_system(place / "smaps_rollup", "Rss")
    found = _Step(resident, devices.told_by_system(place / "status", "VmHWM"), told)
    try:
        (place / "clear_refs").write_text("5")  # the peak counts anew from here
    except OSError as e:
        raise RunError(f"the peak of a process cannot be measured here: {e}") from None
    child.stdin.write("\n")
    child.stdin.flush()
    return found


def stop_at_each_step(folder: str, tokens: str, dtype: str) -> None:
    """Load a model, read and generate, and wait at each step of :data:`STEPS` for a line: what the child does."""
    _read_text(_loaded(folder, dtype), 2)  # libraries load parts of themselves at their first use
    _stop("libraries")
    model = _loaded(folder, dtype)
    cache = _read_text(model, 2)  # touches every weight
    del cache
    _stop("loaded")
    cache = _read_text(model, int(tokens))
    _stop("read", cache=footprint.cache_bytes(cache))
    with torch.inference_mode():
        for _ in range(16):
            model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    _stop("generated", cache=footprint.cache_bytes(cache))


def _loaded(folder: str, dtype: str) -> Any:
    return models.load_model(folder, dtype, "cpu").model


@torch.inference_mode()
def _read_text(model: Any, tokens: int) -> Any:
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, tokens))
    return model(ids, use_cache=True, logits_to_keep=1).past_key_values


def _stop(step: str, **told: int) -> None:
    devices.release_memory()
    devices.return_freed_memory()
    print(json.dumps({"step": step, **told}), flush=True)
    sys.stdin.readline()
