"""Fixtures shared by the tests."""

import logging
import os
import sys

from support.paths import ROOT

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # the workers share the cores; torch's threads would wait for each other
os.environ["COLUMNS"] = "300"  # before rich makes consoles: what is printed is not to be wrapped

from pathlib import Path

import pytest
from hypothesis import settings

# The same examples on every run, and no limit on the time of one: a slow machine is not a failure.
settings.register_profile("mxlab", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("mxlab")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference material beside the repository; skips where there is none."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder `shared` beside the repository: the material in it is not published")
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of two layers and random weights, and the tokenizer of the embedded model."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from mxlab.sources import models

    tokenizer = AutoTokenizer.from_pretrained(models.embedded_folder())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def restored(monkeypatch):
    """What the command changes in its process: the logger, and the environment."""
    logger = logging.getLogger("mxlab")
    kept = logger.level, list(logger.handlers), logger.propagate
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("MX_SPECS_JSON", raising=False)
    yield
    level, logger.handlers, logger.propagate = kept
    logger.setLevel(level)


@pytest.fixture
def mxlab(restored, monkeypatch, capfd):
    """Runs the command in this process; returns its exit code and what it printed and complained."""
    from mxlab.cli import main as cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mxlab", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = capfd.readouterr()
        return caught.value.code or 0, printed.out, printed.err

    return call


def _instruction_sets() -> list[str]:
    from mxlab.numerics.kernels import native

    return native._native.instruction_sets() if native.MISSING is None else []


@pytest.fixture(params=_instruction_sets())
def instruction_set(request):
    """One instruction set of the native kernels after the other, of those that this processor has."""
    from mxlab.numerics.kernels import native

    before = native.instruction_set()
    native._native.use(request.param)
    yield request.param
    native._native.use(before)
