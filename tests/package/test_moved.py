"""What documentation, notebooks and patched installations of mxlab 0.1 import is still there."""

import subprocess
import sys
from importlib import import_module

import pytest
import torch

from support.paths import ROOT


def test_models_load(tiny_llama):
    import mxlab.models
    from mxlab import models

    assert mxlab.models is models
    for dtype in ("float32", torch.float32):
        loaded = mxlab.models.load(str(tiny_llama), dtype=dtype, device="cpu")
        assert (loaded.model.config.num_hidden_layers, loaded.model.dtype) == (2, torch.float32)
    assert models.EMBEDDED == "smollm2"


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("mxlab.notebook", "mxlab.experiments.notebook", {"Settings": "Settings"}),
        ("mxlab.sweep", "mxlab.experiments.sweep", {"load": "load_sweep", "run_sweep": "run_sweep"}),
        ("mxlab.overlay", "mxlab.hf.patched_llama", {"convert_llama": "convert_llama"}),
        ("mxlab.quantizers", "mxlab.formats", {"parse_format": "parse_format", "Quantizer": "FormatFamily"}),
        ("mxlab.scales", "mxlab.formats.scales", {"SCALES": "SCALES"}),
        ("mxlab.nn.residual_binary", "mxlab.train.binary_residual", {"BinaryResidual": "BinaryResidual"}),
    ],
)
def test_a_module_that_moved(old, new, names):
    for name, now in names.items():
        assert getattr(import_module(old), name) is getattr(import_module(new), now)
    with pytest.raises(AttributeError, match="no_such_name"):
        import_module(old).no_such_name  # noqa: B018


def test_a_module_that_never_was():
    with pytest.raises(ImportError, match="no_such_module"):
        import_module("mxlab.no_such_module")
    assert not hasattr(import_module("mxlab"), "no_such_module")


def test_the_patch_by_its_old_name():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "mxlab.patching", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "--unpatch" in done.stdout


def test_importing_the_package_needs_no_torch():
    code = "import mxlab, sys; mxlab.MXFormat; mxlab.Recipe; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
