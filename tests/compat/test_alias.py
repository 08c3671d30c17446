"""``import mx`` finds mxlab.compat.mx after mxlab.compat.enable(), and does not after disable()."""

import importlib
import importlib.util
import re
import runpy
import subprocess
import sys
from types import ModuleType

import pytest

import mxlab.compat
import mxlab.compat.mx
from mxlab.bench import mxpackage
from mxlab.compat import missing
from mxlab.errors import CompatError

from support.paths import ROOT

# As written for microxcaling, but for `enable` before it.
SCRIPT = """
import argparse

import torch
import torch.nn.functional as F

from mx import LayerNorm, Linear, gelu, linear, matmul, bmm, simd_add, simd_split, MxSpecs
from mx import add_mx_args, get_mx_specs, finalize_mx_specs, apply_mx_specs, quantize_mx_op, quantize_elemwise_op
from mx.elemwise_ops import quantize_elemwise_op
from mx.formats import ElemFormat
from mx.mx_ops import quantize_mx_op
from mx.specs import MxSpecs, get_default_mx_specs


class ResidualMLP(torch.nn.Module):
    def __init__(self, hidden_size, mx_specs):
        super().__init__()
        self.mx_specs = mx_specs
        self.layernorm = LayerNorm(hidden_size, mx_specs=mx_specs)
        self.dense_4h = Linear(hidden_size, 4 * hidden_size, mx_specs=mx_specs)
        self.dense_h = Linear(4 * hidden_size, hidden_size, mx_specs=mx_specs)

    def forward(self, inputs):
        inputs, residual = simd_split(inputs, mx_specs=self.mx_specs)
        x = gelu(self.dense_4h(self.layernorm(inputs)), mx_specs=self.mx_specs)
        return simd_add(residual, quantize_elemwise_op(self.dense_h(x), self.mx_specs), mx_specs=self.mx_specs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden_size", type=int, default=32)
    parser = add_mx_args(parser)
    args = parser.parse_args()
    mx_specs = get_mx_specs(args)
    assert mx_specs is not None and mx_specs["a_elem_format_bp_os"] == args.a_elem_format

    torch.manual_seed(0)
    model = ResidualMLP(args.hidden_size, mx_specs)
    x, target = torch.randn(2, 64, args.hidden_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(20):
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(loss.item())
"""


# microxcaling's modules, but for those in missing.REMEDIES.
MODULES = [
    "activations",
    "adaptive_avg_pooling",
    "batchnorm",
    "bmm",
    "convolution",
    "elemwise_ops",
    "formats",
    "groupnorm",
    "layernorm",
    "linear",
    "matmul",
    "mx_mapping",
    "mx_ops",
    "norm_utils",
    "quantize",
    "rnn",
    "simd_ops",
    "softmax",
    "specs",
    "transpose_convolution",
    "vector_ops",
]


@pytest.fixture
def enabled():
    mxlab.compat.enable()
    yield
    mxlab.compat.disable()


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    assert not [name for name in sys.modules if name.partition(".")[0] == "mx"]
    assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("mxlab.compat")]


@pytest.mark.usefixtures("enabled")
def test_the_modules_are_the_same_under_both_names():
    mx = importlib.import_module("mx")
    assert mx is mxlab.compat.mx
    for name in MODULES:
        assert importlib.import_module(f"mx.{name}") is sys.modules[f"mxlab.compat.mx.{name}"]
    assert mx.linear is mxlab.compat.mx.linear.__globals__["linear"]  # the function, not the module of that name
    for name in ("linear", "matmul", "bmm", "softmax"):  # ... which serves as the module, too
        function, names = getattr(mx, name), {}
        exec(f"import mx.{name} as found; from mx import {name} as also", names)
        assert names["found"] is names["also"] is function is getattr(function, name)
    assert mx.linear.Linear is mx.Linear
    assert mx.__spec__.name == mx.__name__ == "mxlab.compat.mx"
    assert mxlab.compat.mx.Linear is mx.Linear


def test_enabling_twice_and_taking_it_back(enabled):
    mxlab.compat.enable()
    importlib.import_module("mx")
    mxlab.compat.enable()
    mxlab.compat.disable()
    mxlab.compat.disable()
    with pytest.raises(ModuleNotFoundError, match="No module named 'mx'"):
        importlib.import_module("mx")
    mxlab.compat.enable()
    assert importlib.import_module("mx.specs").MxSpecs is mxlab.compat.mx.MxSpecs


def test_another_mx_that_is_imported(tmp_path, monkeypatch):
    (tmp_path / "mx.py").write_text("theirs = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    mx = importlib.import_module("mx")
    with pytest.raises(CompatError, match=r"another package mx is imported already, from .*mx\.py: call"):
        mxlab.compat.enable()
    mxlab.compat.disable()
    assert sys.modules["mx"] is mx
    del sys.modules["mx"]
    mxlab.compat.enable()  # found before what is installed
    assert importlib.import_module("mx") is mxlab.compat.mx
    mxlab.compat.disable()
    assert importlib.import_module("mx").theirs
    del sys.modules["mx"]


def test_a_folder_called_mx(monkeypatch):
    module = ModuleType("mx")
    module.__path__ = ["/there/mx"]
    monkeypatch.setitem(sys.modules, "mx", module)
    with pytest.raises(CompatError, match="another package mx is imported already, from /there/mx"):
        mxlab.compat.enable()
    monkeypatch.undo()


@pytest.mark.usefixtures("enabled")
def test_what_is_not_provided():
    mx = importlib.import_module("mx")
    remedy = r"mxlab's mx has no custom_extensions: custom_cuda=True needs no extension here"
    for statement in ("from mx import custom_extensions", "import mx.custom_extensions"):
        with pytest.raises(ImportError, match=remedy):
            exec(statement)
    with pytest.raises(CompatError, match="has no matmul_precision: products are torch's"):
        mx.matmul_precision  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'linaer'"):
        exec("from mx import linaer")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'mx\.tests'"):
        exec("import mx.tests")
    assert not hasattr(mx, "linaer")


@pytest.mark.usefixtures("enabled")
def test_a_star_import_takes_what_is_provided():
    names: dict = {}
    exec("from mx import *", names)
    found = set(names) - {"__builtins__"}
    assert found == set(mxlab.compat.mx.__all__)
    assert not found & set(missing.REMEDIES)


def test_the_benchmarks_do_not_take_it_for_microxcaling(enabled):
    assert not mxpackage.is_there()
    importlib.import_module("mx")
    assert not mxpackage.is_there()
    assert importlib.util.find_spec("mx.specs").name == "mxlab.compat.mx.specs"


def test_no_torch_before_it_is_needed():
    code = "import sys, mxlab.compat; mxlab.compat.enable(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def check_losses(printed: str) -> None:
    losses = [float(line) for line in printed.split()]
    assert len(losses) == 20
    assert losses[-1] < 0.8 * losses[0]


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


OPTIONS = ["--w_elem_format", "fp6_e3m2", "--a_elem_format", "fp6_e3m2", "--block_size", "32", "--bfloat", "16"]


def test_a_script_written_for_microxcaling(script):
    run = "import mxlab.compat, runpy; mxlab.compat.enable(); runpy.run_path('script.py', run_name='__main__')"
    command = [sys.executable, "-W", "error", "-c", run, *OPTIONS, "--custom_cuda"]
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check_losses(done.stdout)


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("flags", [[], ["--no_quantize_backprop", "--round", "even"]])
def test_the_script_with_other_options(script, flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", *OPTIONS, *flags])
    runpy.run_path(str(script), run_name="__main__")
    check_losses(capsys.readouterr().out)


@pytest.mark.usefixtures("enabled")
def test_the_example_of_the_documentation(capsys):
    page = (ROOT / "docs" / "microxcaling.md").read_text(encoding="utf-8")
    code, printed = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("python", "text"))
    exec(code, {})
    assert capsys.readouterr().out == printed
