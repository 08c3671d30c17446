"""Where a model goes, on GPUs that are made up."""

from pathlib import Path

import pytest
import torch

from mxlab.errors import RunError, SpecError
from mxlab.model.apply import apply
from mxlab.recipe import load_recipe
from mxlab.sources import devices, models

from support.llama import tiny, tokens


@pytest.fixture
def gpus(monkeypatch):
    """GPUs with so many bytes free."""

    def set_up(*free: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(free))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 2**40))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))

    return set_up


@pytest.mark.parametrize(
    ("free", "expected"), [((), "cpu"), ((1,), "cuda:0"), ((5, 9, 7), "cuda:1"), ((5, 5), "cuda:0")]
)
def test_the_gpu_with_the_most_free_memory(free, expected, gpus):
    gpus(*free)
    assert models.choose_device("auto") == torch.device(expected)


def test_a_device_that_is_named(gpus):
    gpus(5, 9)
    assert models.choose_device("cuda:0") == torch.device("cuda:0")
    assert models.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(SpecError, match="torch sees 2 GPUs here"):
        models.choose_device("cuda:2")


def needed(folder: Path, dtype: torch.dtype) -> int:
    count = sum(p.numel() for p in models.load_model(str(folder), "float32", "cpu").model.parameters())
    return int(1.2 * count * dtype.itemsize)


def test_a_model_that_fits_is_not_spread(tiny_llama, gpus):
    enough = needed(tiny_llama, torch.bfloat16)
    gpus(10, enough)
    assert devices.shares_of_gpus(str(tiny_llama), torch.bfloat16, torch.device("cuda:1")) is None
    gpus(enough - 2, enough - 1)
    shares = devices.shares_of_gpus(str(tiny_llama), torch.bfloat16, torch.device("cuda:1"))
    assert shares == {0: int(0.9 * (enough - 2)), 1: int(0.9 * (enough - 1))}


def test_a_model_that_no_gpus_hold(tiny_llama, gpus):
    gpus(1000, 2000)
    with pytest.raises(RunError, match=r"in float32, more than the GPUs have free \(cuda:0: 0\.0 GiB, .*--device cpu"):
        models.load_model(str(tiny_llama), "float32")


def test_loading_over_several_gpus(tiny_llama, gpus, monkeypatch):
    """transformers is asked to spread the model; that it does is its own affair, and needs GPUs."""
    from transformers import AutoModelForCausalLM

    asked = []
    original = AutoModelForCausalLM.from_pretrained

    def from_pretrained(source, **kwargs):
        asked.append(kwargs)
        return original(source, dtype=kwargs["dtype"], device_map={"": "cpu"})

    enough = needed(tiny_llama, torch.float32)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    gpus(enough - 1, enough - 1)
    model = models.load_model(str(tiny_llama), "float32").model
    assert asked[0]["device_map"] == "auto"
    assert asked[0]["max_memory"] == {0: int(0.9 * (enough - 1)), 1: int(0.9 * (enough - 1))}
    apply(model, load_recipe("ex2"))
    assert model(input_ids=tokens()).logits.shape[-1] == model.config.vocab_size


def test_the_parts_of_a_spread_model_fetch_their_inputs(monkeypatch):
    from accelerate import dispatch_model

    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    plain, spread = tiny(), tiny()
    model = dispatch_model(spread, dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True)
    assert "_old_forward" in vars(model.model.layers[0].self_attn.q_proj)
    devices.connect_parts(model)
    assert not any("_old_forward" in vars(module) for module in model.modules())
    fetched = []
    sent = devices._sent
    monkeypatch.setattr(devices, "_sent", lambda values, device: (fetched.append(device), sent(values, device))[1])
    assert torch.equal(model(input_ids=tokens()).logits, plain(input_ids=tokens()).logits)
    assert len(fetched) == len(parts) + 1  # the last one takes the logits back
    conversion = apply(model, load_recipe("ex2"))
    assert len(conversion.linears) == 14
    apply(plain, load_recipe("ex2"))
    assert torch.equal(model(input_ids=tokens()).logits, plain(input_ids=tokens()).logits)


def test_what_is_sent_to_another_device():
    values = {"states": torch.ones(2), "more": (torch.ones(1), None, 3)}
    found = devices._sent(values, "meta")
    assert found["states"].is_meta
    assert found["more"][0].is_meta
    assert found["more"][1:] == (None, 3)


def test_an_error_of_memory_is_told_from_one_of_the_source(tiny_llama, gpus, monkeypatch):
    gpus(1)
    monkeypatch.setattr(devices, "free_memory", lambda device: 1)
    with pytest.raises(RunError, match="more than the GPUs have free"):
        models.load_model(str(tiny_llama))


@pytest.mark.parametrize(
    ("flags", "capability", "expected"),
    [
        ("avx2 fma", "AVX2", "float32"),
        ("avx2 avx512f avx512_bf16", "AVX512", "bfloat16"),
        ("avx512f amx_bf16", "AVX512", "bfloat16"),
        ("avx512f avx512_bf16", "AVX2", "float32"),  # torch is kept from using it
        ("avx512f", "AVX512", "float32"),
    ],
)
def test_dtype_auto_on_a_cpu(flags, capability, expected, monkeypatch):
    devices._cpu_flags.cache_clear()
    monkeypatch.setattr(devices.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(devices.Path, "read_text", lambda *_, **__: f"processor : 0\nflags\t: {flags}\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    try:
        assert devices.choose_dtype("auto", torch.device("cpu")) == expected
        assert devices.choose_dtype("bfloat16", torch.device("cpu")) == "bfloat16"
    finally:
        devices._cpu_flags.cache_clear()


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_dtype_auto_on_a_gpu(capability, expected, gpus, monkeypatch):
    gpus(1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.choose_dtype("auto", torch.device("cuda:0")) == expected


def test_a_slow_dtype_is_warned_of_once(monkeypatch, caplog):
    monkeypatch.setattr(devices, "is_native", lambda dtype, device: dtype == torch.float32)
    monkeypatch.setattr(devices, "_warned", set())
    for _ in range(2):
        devices.warn_of_slow_dtype("bfloat16", torch.device("cpu"))
        devices.warn_of_slow_dtype("float32", torch.device("cpu"))
    [record] = caplog.records
    assert "six to ten times" in record.getMessage()
    assert "dtype auto" in record.getMessage()
