"""Helpers for the tests of the patched Llama.

The transformers of the environment is never touched. Tests patch a copy of it, made of links but for the Llama folder,
and run in a process of their own that imports this copy: :func:`call` runs a function there, :func:`in_patched` a test.
"""

import atexit
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.paths import ROOT, TESTS

LLAMA = Path("transformers", "models", "llama")


def copy_transformers(folder: Path) -> Path:
    """A stock transformers in ``folder``, to put on PYTHONPATH: links, but for the Llama folder and the metadata."""
    installed = importlib.metadata.distribution("transformers")
    site = Path(str(installed.locate_file("")))
    for part in (LLAMA.parent.parent, LLAMA.parent):
        (folder / part).mkdir(parents=True)
        for entry in (site / part).iterdir():
            if entry.name not in ("models", "llama"):
                (folder / part / entry.name).symlink_to(entry)
    (folder / LLAMA.parent / "llama").mkdir()
    for entry in (site / LLAMA).glob("*.py"):
        shutil.copy2(entry, folder / LLAMA)
    metadata = f"transformers-{installed.version}.dist-info"
    shutil.copytree(site / metadata, folder / metadata)
    return folder


def environment(transformers: Path | None = None, **more: str) -> dict[str, str]:
    """The environment of a process that imports mxlab from here and that copy of transformers."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MX_", "MXLAB_", "PYTHONPATH"))}
    path = [str(p) for p in (transformers, ROOT, TESTS) if p is not None]
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(path), **more}


class Worker:
    """A Python process that runs functions of test modules: one line of JSON in, one out, for each."""

    def __init__(self, patched: bool) -> None:
        self._folder = tempfile.TemporaryDirectory()
        copy = None
        if patched:
            copy = copy_transformers(Path(self._folder.name, "site"))
            command = [sys.executable, "-m", "mxlab.hf.patch", "--patch"]
            subprocess.run(command, env=environment(copy), check=True, stdout=subprocess.DEVNULL)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.llama"],
            env=environment(copy),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def call(self, function: Callable, kwargs: dict[str, Any]) -> Any:
        """Run ``function`` there and return what it returns; the test fails with its traceback where it raises."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"module": function.__module__, "name": function.__name__, "kwargs": kwargs}
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._log.seek(0)
            pytest.fail(f"the process that runs the patched Llama ended:\n{self._log.read()[-4000:]}", pytrace=False)
        result = json.loads(answer)
        if result["error"]:
            pytest.fail(result["error"], pytrace=False)
        return result["value"]

    def close(self) -> None:
        """End the process and remove its copy of transformers."""
        self._process.communicate()
        self._log.close()
        self._folder.cleanup()


@functools.cache
def _worker(where: str) -> Worker:
    worker = Worker(patched=where == "patched")
    atexit.register(worker.close)
    return worker


def call(where: str, function: Callable, **kwargs: Any) -> Any:
    """Run ``function`` of a test module where transformers is ``"patched"`` or ``"stock"``; arguments must be JSON."""
    return _worker(where).call(function, kwargs)


def in_patched(test: Callable) -> Callable:
    """A test that runs where transformers is patched."""

    @functools.wraps(test)
    def run(**kwargs: Any) -> None:
        call("patched", test, **kwargs)

    return run


@contextlib.contextmanager
def specs(options: dict[str, Any] | str | None = None, **more: Any) -> Iterator[None]:
    """MX_SPECS_JSON set to these options while models are made."""
    text = options if isinstance(options, str) else json.dumps({**(options or {}), **more})
    os.environ["MX_SPECS_JSON"] = text
    try:
        yield
    finally:
        del os.environ["MX_SPECS_JSON"]


def config(**changes: Any) -> Any:
    """The configuration of a tiny Llama with grouped queries; weights large enough for attention to matter."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **{
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 97,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
            "attn_implementation": "sdpa",
            **changes,
        }
    )


def tiny(head: str = "LlamaForCausalLM", seed: int = 0, **changes: Any) -> Any:
    """A tiny Llama with random weights, in evaluation mode."""
    import torch
    import transformers

    torch.manual_seed(seed)
    return getattr(transformers, head)(config(**changes)).eval()


def checkpointed(model: Any) -> Any:
    """The model with gradient checkpointing, by the name that its transformers has for it."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


def tokens(batch: int = 2, length: int = 12, seed: int = 1) -> Any:
    """Random token ids (batch, length), none of them padding."""
    import torch

    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def _serve() -> None:
    """Answer requests on standard input until it closes; what the functions print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)  # the same bits in every process
    for line in sys.stdin:
        request = json.loads(line)
        result = {"value": None, "error": None}
        try:
            function = getattr(importlib.import_module(request["module"]), request["name"])
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                result["value"] = getattr(function, "__wrapped__", function)(**request["kwargs"])
        except BaseException:
            result["error"] = traceback.format_exc()
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
