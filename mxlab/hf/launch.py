"""``mxlab run``: another program with MX_SPECS_JSON set, and proof that it did something."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mxlab import environment
from mxlab.errors import RunError, SpecError
from mxlab.recipe import mx_specs
from mxlab.recipe.mx_specs import ENVIRONMENT_VARIABLE, MxSpecs

_PATCH_REMEDY = "put the patch in place with: ./install.sh --patch"
_REFUSED = 2  # the exit code of mxlab.hf.patch where it says itself what is wrong


def main(arguments: Sequence[str]) -> int:
    """Run the command behind the MX options in ``arguments``; returns its exit code.

    Raises:
        SpecError: options that cannot be read.
        RunError: the command cannot be started, its interpreter lacks the patch, or it made no patched Llama.
    """
    given, command = parse(arguments)
    mx = _specs(given)
    _check_interpreter(command)
    with tempfile.TemporaryDirectory(prefix="mxlab-") as folder:
        inventory = Path(folder) / "inventory.json"
        variables = environment.with_variables(
            **{environment.MX_SPECS: mx.to_json(), environment.INVENTORY: str(inventory)}
        )
        exit_code = _call(command, variables)
        if exit_code == 0:
            _check_inventory(inventory, command)
    return exit_code


def parse(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the MX options that were given, and the command behind them.

    Raises:
        SpecError: no command.
    """
    parser = argparse.ArgumentParser(
        prog="mxlab run",
        usage="mxlab run [MX options] -- COMMAND ...",
        description="Run COMMAND with a Llama quantized as the options say. Options not given have Ex1's defaults.",
        allow_abbrev=False,
    )
    mx_specs.add_arguments(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="such as: python -m lm_eval run --model hf ...")
    values = vars(parser.parse_args(list(arguments)))
    command = values.pop("command")
    command = command[1:] if command[:1] == ["--"] else command
    if not command:
        raise SpecError("mxlab run: no command; write: mxlab run --block_size 16 -- python -m lm_eval run ...")
    return values, command


def _specs(given: dict[str, Any]) -> MxSpecs:
    """Return what the options say; without any, what MX_SPECS_JSON of this process says, which they would replace."""
    inherited = MxSpecs.from_environment() if not given else None
    if given and ENVIRONMENT_VARIABLE in environment.variables():
        raise SpecError(f"mxlab run: {ENVIRONMENT_VARIABLE} is set and MX options are given: use one of the two")
    return inherited or MxSpecs.from_mapping(given, "mxlab run")


def _call(command: list[str], variables: dict[str, str]) -> int:
    with _Relay() as relay:
        try:
            process = relay.start(command, variables)
        except OSError as e:
            raise RunError(f"mxlab run: cannot start {command[0]!r}: {e.strerror}") from None
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:
                continue  # the child got it too, and its exit code will tell
    return code if code >= 0 else 128 - code


class _Relay:
    """Sends the signals that would end this process, and leave the child running, to the child.

    It listens from before the child is started: what comes too early is kept until there is a child.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._early: list[int] = []

    def start(self, command: list[str], variables: dict[str, str]) -> subprocess.Popen:
        """Start the child. Raises OSError where that is not possible."""
        self._process = subprocess.Popen(command, env=variables)
        for number in self._early:
            self._process.send_signal(number)
        return self._process

    def _pass_on(self, number: int, _: Any) -> None:
        if self._process is None:
            self._early.append(number)
        else:
            self._process.send_signal(number)

    def __enter__(self) -> _Relay:
        # A signal that is ignored (nohup) stays ignored.
        listened = [s for s in self._SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        self._former = {s: signal.signal(s, self._pass_on) for s in listened}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)


def _check_interpreter(command: list[str]) -> None:
    """Check, where the command is a Python, that its own transformers is patched."""
    python = interpreter(command)
    if python is None:
        return
    name = " ".join(python)
    remedy = f"put the patch in place with: MXLAB_PYTHON={python[-1]} ./install.sh --patch"
    try:
        asked = subprocess.run([*python, "-m", "mxlab.hf.patch", "--status", "--json"], capture_output=True, text=True)
    except OSError as e:
        raise RunError(f"mxlab run: {command[0]} cannot be started with {name}: {e.strerror}") from None
    said = asked.stderr.strip().rpartition("\n")[-1]
    if asked.returncode == _REFUSED:
        raise RunError(f"mxlab run: {name} cannot run a patched Llama: {said.removeprefix('error: ')}")
    try:
        state = json.loads(asked.stdout)["state"]
    except (ValueError, KeyError, TypeError):
        raise RunError(
            f"mxlab run: {name} cannot import mxlab, which a patched Llama needs ({said or 'no output'}): install "
            f"mxlab there, then {remedy}"
        ) from None
    if state != "patched":
        raise RunError(f"mxlab run: transformers of {name} is not patched ({state}): {remedy}")


def interpreter(command: list[str]) -> list[str] | None:
    """Return the Python that ``command`` runs, itself or by its first line; None where neither tells."""
    path = shutil.which(command[0])
    if path is None:
        raise RunError(f"mxlab run: there is no command {command[0]!r}")
    if re.fullmatch(r"python[\d.]*", Path(path).name):
        return [path]
    try:
        with Path(path).open("rb") as file:
            first_line = file.readline(512)
    except OSError:  # a program may be executable, but not readable
        return None
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
    if not replaced["linear_layers"] and not replaced["attentions"]:
        raise RunError(
            "mxlab run: the options switch everything off, so that nothing was quantized: run it without mxlab"
        )
    print(
        f"mxlab run: {replaced['linear_layers']} linear layers and the K and V of {replaced['attentions']} attentions "
        "were quantized",
        file=sys.stderr,
    )
