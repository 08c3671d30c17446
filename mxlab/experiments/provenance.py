"""What a result was made with: versions, machine, code."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mxlab

_PACKAGES = ("torch", "transformers", "lm_eval", "datasets", "accelerate", "numpy")
_ROOT = Path(mxlab.__file__).parent
_SOURCES = (".py", ".cpp", ".h", ".cu")
# The folders whose code can move a number.
_COMPUTING = ("eval", "formats", "hf", "model", "numerics", "ptq", "recipe", "sources", "train")


def code_version() -> str:
    """Return mxlab's version and a digest of the source files that can move a number: ``0.1.0+1f2e3d4c5b6a``."""
    digest = hashlib.sha256()
    for path in sorted(p for folder in _COMPUTING for p in (_ROOT / folder).rglob("*") if p.suffix in _SOURCES):
        digest.update(path.relative_to(_ROOT).as_posix().encode() + path.read_bytes())
    return f"{mxlab.__version__}+{digest.hexdigest()[:12]}"


def describe() -> dict[str, Any]:
    """Return the environment as plain values, in the order a reader wants them."""
    import torch

    from mxlab.numerics.kernels import cuda, native
    from mxlab.sources.devices import is_native

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "date": datetime.datetime.now().isoformat(),
        "mxlab": code_version(),
        "commit": _commit(),
        **{name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16 units": "yes" if is_native(torch.bfloat16, torch.device("cpu")) else "no",
        "threads": torch.get_num_threads(),
        "CPU kernels": native.MISSING or native.instruction_set(),
        "cuda available": torch.cuda.is_available(),
        **({"GPU kernels": cuda.missing() or "NVRTC"} if gpus else {}),
        **{f"GPU {i}": name for i, name in enumerate(gpus)},
    }


def as_text(environment: dict[str, Any]) -> str:
    """Return one ``name: value`` a line."""
    return "".join(f"{name}: {value}\n" for name, value in environment.items())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@contextmanager
def quiet_git() -> Iterator[None]:
    """Keep git's complaint off the screen where lm-eval asks it for a commit and the working directory is no checkout.

    What lm-eval records stays the same.
    """
    from lm_eval import evaluator
    from lm_eval.loggers.utils import get_commit_from_path

    asks = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: _git(Path.cwd(), "describe", "--always") or get_commit_from_path(Path.cwd())
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asks


def _commit() -> str:
    """Return the commit of the checkout that mxlab runs from, ``-dirty`` where files differ from it."""
    if not (_ROOT.parent / ".git").exists():
        return "not a checkout"
    return _git(_ROOT.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or "unknown"


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints in a folder; None where it fails, or is not there."""
    try:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    return f"{model}, {os.cpu_count()} cores"
