"""Read and set environment variables: no other module of the package does. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

MX_SPECS = "MX_SPECS_JSON"  # microxcaling's options, for a patched Llama
INVENTORY = "MXLAB_INVENTORY"  # where `mxlab run` asks its child to write what was quantized
CACHE = "MXLAB_CACHE"  # the folder of what can be made again
# What the notebooks evaluate, and where their results go.
MODEL, TASKS, LIMIT, DATA_DIR, RESULTS = (
    "MXLAB_MODEL",
    "MXLAB_TASKS",
    "MXLAB_LIMIT",
    "MXLAB_DATA_DIR",
    "MXLAB_RESULTS",
)
_VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
_HIDDEN_BARS = "TQDM_DISABLE"


def variables() -> Mapping[str, str]:
    """Return all variables."""
    return os.environ


def with_variables(**changes: str) -> dict[str, str]:
    """Return all variables and these, for a child process."""
    return {**os.environ, **changes}


@contextmanager
def hidden(name: str) -> Iterator[None]:
    """Hide a variable as long as the context is open."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


def inventory_file() -> Path | None:
    """Return the file that `mxlab run` asked for; None where this process does not run under it."""
    path = os.environ.get(INVENTORY)
    return Path(path) if path else None


def cache_folder() -> Path:
    """Return ``$MXLAB_CACHE``, else ``~/.cache/mxlab`` (or below ``$XDG_CACHE_HOME``)."""
    if chosen := os.environ.get(CACHE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mxlab"


def has_hub_token() -> bool:
    """Return whether there is a token for gated models of the hub."""
    return bool(os.environ.get("HF_TOKEN"))


def take_hub_token(find: Callable[[str], str | None]) -> None:
    """Take the token for gated models from ``find``, a store of secrets, where the environment has none."""
    if not has_hub_token() and (token := find("HF_TOKEN")):
        os.environ["HF_TOKEN"] = token


def go_offline() -> None:
    """Keep huggingface_hub from the network; it reads this when it is imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def hide_inner_bars() -> None:
    """Leave the screen to our own progress: tqdm reads this when lm-eval and transformers import it."""
    os.environ.setdefault(_HIDDEN_BARS, "1")


def inner_bars_are_hidden() -> bool:
    """Return whether tqdm's bars are switched off; lm-eval overrides that where it makes its own."""
    return os.environ.get(_HIDDEN_BARS) == "1"


def visible_gpus() -> list[str]:
    """Return the GPUs that the user named for CUDA; none where it may use all."""
    return [gpu for gpu in os.environ.get(_VISIBLE_GPUS, "").split(",") if gpu]


def show_one_gpu(gpu: str) -> None:
    """Let CUDA see one GPU alone; it reads this when it starts."""
    os.environ[_VISIBLE_GPUS] = gpu


def asserts_mx_specs() -> bool:
    """Return whether microxcaling's functions must be given options (its variable ``MX_ASSERT``)."""
    return os.environ.get("MX_ASSERT") == "True"
