"""``mxlab run``: another program with MX_SPECS_JSON set, and proof that it did something."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mxlab import specs
from mxlab.errors import RunError, SpecError
from mxlab.specs import ENVIRONMENT_VARIABLE, MxSpecs

# The variable in which the patched Llama finds where to write its inventory; mxlab.overlay, which needs torch, too.
INVENTORY_VARIABLE = "MXLAB_INVENTORY"

_PATCH_REMEDY = "put the patch in place with: ./install.sh --patch"


def main(arguments: Sequence[str]) -> int:
    """Run the command behind the MX options in ``arguments``; returns its exit code.

    Raises:
        SpecError: options that cannot be read.
        RunError: the command cannot be started, its interpreter lacks the patch, or it made no patched Llama.
    """
    given, command = parse(arguments)
    mx = MxSpecs.from_mapping({**_inherited(given), **given}, "mxlab run")
    _check_interpreter(command)
    with tempfile.TemporaryDirectory(prefix="mxlab-") as folder:
        inventory = Path(folder) / "inventory.json"
        environment = {**os.environ, ENVIRONMENT_VARIABLE: mx.to_json(), INVENTORY_VARIABLE: str(inventory)}
        exit_code = _call(command, environment)
        if exit_code == 0:
            _check_inventory(inventory, command)
    return exit_code


def parse(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The MX options that were given, and the command behind them.

    Raises:
        SpecError: no command.
    """
    parser = argparse.ArgumentParser(
        prog="mxlab run",
        usage="mxlab run [MX options] -- COMMAND ...",
        description="Run COMMAND with a Llama quantized as the options say. Options not given have Ex1's defaults.",
        allow_abbrev=False,
    )
    specs.add_arguments(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="such as: python -m lm_eval run --model hf ...")
    values = vars(parser.parse_args(list(arguments)))
    command = values.pop("command")
    command = command[1:] if command[:1] == ["--"] else command
    if not command:
        raise SpecError("mxlab run: no command; write: mxlab run --block_size 16 -- python -m lm_eval run ...")
    return values, command


def _inherited(given: dict[str, Any]) -> dict[str, Any]:
    """MX_SPECS_JSON of our own environment, which the options would silently replace."""
    if ENVIRONMENT_VARIABLE in os.environ and given:
        raise SpecError(f"mxlab run: {ENVIRONMENT_VARIABLE} is set and MX options are given: use one of the two")
    text = os.environ.get(ENVIRONMENT_VARIABLE)
    if text is None:
        return {}
    MxSpecs.from_json(text)
    return json.loads(text)


def _call(command: list[str], environment: dict[str, str]) -> int:
    try:
        process = subprocess.Popen(command, env=environment)
    except OSError as e:
        raise RunError(f"mxlab run: cannot start {command[0]!r}: {e.strerror}") from None
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:
            continue  # the child got it too; what it makes of it is its answer
    return code if code >= 0 else 128 - code


def _check_interpreter(command: list[str]) -> None:
    """Ask the command's own Python, where it is one, whether its transformers is patched."""
    python = interpreter(command)
    if python is None:
        return
    asked = subprocess.run([*python, "-m", "mxlab.patching", "--status", "--json"], capture_output=True, text=True)
    try:
        state = json.loads(asked.stdout)["state"]
    except (ValueError, KeyError, TypeError):
        raise RunError(
            f"mxlab run: {python[0]} cannot import mxlab, which a patched Llama needs: install mxlab there, then "
            f"{_PATCH_REMEDY} ({asked.stderr.strip().splitlines()[-1:] or 'no output'})"
        ) from None
    if state != "patched":
        raise RunError(f"mxlab run: transformers of {python[0]} is not patched ({state}): {_PATCH_REMEDY}")


def interpreter(command: list[str]) -> list[str] | None:
    """The Python that ``command`` runs: the command itself, or what its first line names; None where neither tells."""
    path = shutil.which(command[0])
    if path is None:
        raise RunError(f"mxlab run: there is no command {command[0]!r}")
    if Path(path).name.startswith("python"):
        return [path]
    with Path(path).open("rb") as file:
        first_line = file.readline(512)
    if not first_line.startswith(b"#!"):
        return None
    words = first_line[2:].decode(errors="replace").split()
    return words if words and "python" in Path(words[-1]).name else None


def _check_inventory(inventory: Path, command: list[str]) -> None:
    if not inventory.is_file():
        raise RunError(
            f"mxlab run: {command[0]!r} ended well but made no quantized Llama: either its model is not a Llama, or it "
            f"ran in another Python, whose transformers is not patched ({_PATCH_REMEDY}). Its results are those of an "
            "unquantized model"
        )
    replaced = json.loads(inventory.read_text(encoding="utf-8"))
    print(
        f"mxlab run: {replaced['linear_layers']} linear layers and the K and V of {replaced['attentions']} attentions "
        "were quantized",
        file=sys.stderr,
    )
