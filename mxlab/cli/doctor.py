"""``mxlab doctor``: what is in place, and what is not."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from mxlab import environment
from mxlab.cli.console import console
from mxlab.cli.options import DataDirOption, JsonOption
from mxlab.cli.records import print_json
from mxlab.errors import MxlabError
from mxlab.experiments import provenance
from mxlab.hf import patch
from mxlab.recipe.mx_specs import MxSpecs

_HUB_TIMEOUT = 5  # seconds


def doctor(data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Say what is in place: the patch, versions, the backend, hub and data."""
    if as_json:
        print_json({name: {"ok": well, "found": found} for name, well, found in checks(data_dir)})
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, well, found in checks(data_dir):
        table.add_row("[green]ok[/]" if well else "[red]--[/]", name, escape(found))
    console.print(table)


def checks(data_dir: Path | None = None) -> Iterator[tuple[str, bool, str]]:
    """Yield one line of the report after another: what was looked at, whether it is well, and what was found."""
    yield "mxlab", True, provenance.code_version()
    yield from _versions()
    yield "patch", *_patch()
    yield "MX_SPECS_JSON", *_specs()
    yield "kernels", *_cpu_kernels()
    yield "device", True, _device()
    yield from _gpu_kernels()
    yield "hub", *_hub()
    yield (
        "token",
        True,
        "HF_TOKEN is set" if environment.has_hub_token() else "HF_TOKEN is not set (gated models need it)",
    )
    yield "embedded model", *_embedded_model()
    yield "data", *_data(data_dir)


def _versions() -> Iterator[tuple[str, bool, str]]:
    described = provenance.describe()
    for name in ("python", "torch", "transformers", "lm_eval"):
        yield name, described[name] != "not installed", described[name]


def _patch() -> tuple[bool, str]:
    try:
        status = patch.status()
    except MxlabError as e:
        return False, str(e)
    return status.state in ("stock", "patched"), str(status)


def _specs() -> tuple[bool, str]:
    try:
        specs = MxSpecs.from_environment()
    except MxlabError as e:
        return False, str(e)
    if specs is None:
        return True, "is not set: a patched Llama is stock Llama"
    return True, environment.variables()[environment.MX_SPECS]


def _device() -> str:
    import torch

    from mxlab.sources.devices import choose_dtype, describe_dtype

    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    cpu = torch.device("cpu")
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"CPU, {capability}, {threads} threads; {describe_dtype(cpu)}: dtype auto is {choose_dtype('auto', cpu)}"


def _cpu_kernels() -> tuple[bool, str]:
    from mxlab.numerics.kernels import native

    if reason := native.missing():
        return False, f"are not there ({reason}): quantizing in eager torch, slowly; {native.remedy()}"
    return True, f"native, for {native.instruction_set()}"


def _gpu_kernels() -> Iterator[tuple[str, bool, str]]:
    import torch

    from mxlab.numerics.kernels import cuda

    if not torch.cuda.is_available():
        return
    if reason := cuda.missing():
        yield "GPU", False, f"are not there ({reason}): quantizing in eager torch, slowly; {cuda.remedy()}"
    else:
        yield "GPU", True, "compiled by NVRTC when they are first used"


def _hub() -> tuple[bool, str]:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False, "switched off by HF_HUB_OFFLINE: models and data come from folders, the cache or mxlab itself"
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=_HUB_TIMEOUT).close()
    except (urllib.error.URLError, OSError) as e:
        return False, f"cannot be reached ({getattr(e, 'reason', e)}): use smollm2, a folder, and --data-dir"
    return True, f"{constants.ENDPOINT} can be reached"


def _embedded_model() -> tuple[bool, str]:
    from mxlab.sources import models

    try:
        models.gguf_file()
    except MxlabError as e:
        return False, str(e)
    converted = (environment.cache_folder() / "models").is_dir()
    return True, f"{models.EMBEDDED} is installed" + ("" if converted else "; converted at its first use (15 s)")


def _data(data_dir: Path | None) -> tuple[bool, str]:
    from mxlab.sources import tasks as data

    if data_dir is None:
        return True, f"{data.PASSAGES} is embedded; lambada_openai and wikitext come from the hub without --data-dir"
    missing = [task.file for task in data.LOCAL.values() if not (data_dir / task.file).is_file()]
    return not missing, f"{data_dir}: " + (f"{', '.join(missing)} missing" if missing else "complete")
