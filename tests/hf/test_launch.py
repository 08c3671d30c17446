"""mxlab run: options, the checks before and after the command, exit codes and signals."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mxlab.errors import RunError, SpecError
from mxlab.hf import launch
from mxlab.hf.launch import interpreter, main, parse
from mxlab.recipe.mx_specs import MxSpecs

from support.llama import ROOT, copy_transformers, environment

# What a patched Llama does for the launcher, without its weight.
CHILD = """
import json, os, sys
inventory = {"linear_layers": 14, "attentions": 2, "specs": os.environ["MX_SPECS_JSON"], "argv": sys.argv[1:]}
with open(os.environ["MXLAB_INVENTORY"], "w") as file:
    json.dump(inventory, file)
print(json.dumps(inventory))
"""


def usable(transformers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Python processes import that copy of transformers."""
    for name, value in environment(transformers).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MX_SPECS_JSON", raising=False)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A stock and a patched copy of transformers."""
    folder = tmp_path_factory.mktemp("transformers")
    made = {name: copy_transformers(folder / name) for name in ("stock", "patched")}
    command = [sys.executable, "-m", "mxlab.hf.patch", "--patch"]
    subprocess.run(command, env=environment(made["patched"]), check=True, stdout=subprocess.DEVNULL)
    return made


@pytest.fixture
def stock(copies, monkeypatch):
    usable(copies["stock"], monkeypatch)


@pytest.fixture
def patched(copies, monkeypatch):
    usable(copies["patched"], monkeypatch)


def script(folder: Path, name: str, text: str) -> str:
    """An executable file."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return str(path)


# ---- options


@pytest.mark.parametrize(
    ("arguments", "given", "command"),
    [
        (["--", "python", "a.py"], {}, ["python", "a.py"]),
        (["python", "a.py"], {}, ["python", "a.py"]),
        (["--block_size", "16", "--", "python"], {"block_size": 16}, ["python"]),
        (["--block-size", "16", "python"], {"block_size": 16}, ["python"]),
        (["--no-custom-cuda", "--", "python"], {"custom_cuda": False}, ["python"]),
        (["--no_custom_cuda", "python"], {"custom_cuda": False}, ["python"]),
        (["python", "--block_size", "16"], {}, ["python", "--block_size", "16"]),
        (["python", "a.py", "--", "--round", "even"], {}, ["python", "a.py", "--", "--round", "even"]),
        (["--", "sh", "-c", "x", "--", "y"], {}, ["sh", "-c", "x", "--", "y"]),
        (["--round=even", "--", "python", "--help"], {"round": "even"}, ["python", "--help"]),
    ],
)
def test_options_and_command(arguments, given, command):
    assert parse(arguments) == (given, command)


@pytest.mark.parametrize("arguments", [[], ["--"], ["--block_size", "16"], ["--custom_cuda", "--"]])
def test_no_command(arguments):
    with pytest.raises(SpecError, match=r"mxlab run: no command; write: mxlab run --block_size 16 -- python"):
        parse(arguments)


@pytest.mark.parametrize(
    "arguments", [["--block_size", "x", "python"], ["--blocksize", "16", "python"], ["--bfl", "0"]]
)
def test_bad_options(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    assert caught.value.code == 2
    assert "usage: mxlab run [MX options] -- COMMAND" in capsys.readouterr().err


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    assert "--kv-elem-format" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block_size", "-1", "true"], "mxlab run: block_size is -1"),
        (["--w_elem_format", "fp5", "true"], "mxlab run: w_elem_format: unknown element format 'fp5'"),
        (["--fp", "16", "true"], "bfloat is 16 and fp is 16"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(SpecError, match=message):
        main(arguments)


# ---- the command's interpreter


def test_the_interpreter_of_a_command(tmp_path):
    env = script(tmp_path, "with-env", "#!/usr/bin/env python3\n")
    direct = script(tmp_path, "direct", f"#!{sys.executable}\n")
    assert interpreter([sys.executable, "a.py"]) == [sys.executable]
    assert interpreter([env]) == ["/usr/bin/env", "python3"]
    assert interpreter([direct, "--x"]) == [sys.executable]
    for unknown in ("#!/bin/sh\n", "#!/usr/bin/python3 -sE\n", "\x7fELF", "", "#!\n"):
        assert interpreter([script(tmp_path, "other", unknown)]) is None
    assert interpreter([script(tmp_path, "python3-config", "#!/bin/sh\n")]) is None
    assert interpreter(["sh", "-c", "python a.py"]) is None


@pytest.mark.parametrize("command", ["no-such-command", "./no/such/command", "/etc"])
def test_a_command_that_is_not_there(command):
    with pytest.raises(RunError, match=f"mxlab run: there is no command '{command}'"):
        main(["--", command])


def test_a_file_that_cannot_be_run(tmp_path):
    with pytest.raises(RunError, match=r"mxlab run: cannot start .*Exec format error"):
        main(["--", script(tmp_path, "text", "just text\n")])


def test_an_unpatched_interpreter(stock, tmp_path):
    """The command is not run: it would give the results of the unquantized model."""
    mark = tmp_path / "mark"
    remedy = rf"is not patched \(stock\): put the patch in place with: MXLAB_PYTHON={re.escape(sys.executable)} "
    shebang = script(tmp_path, "tool", f"#!{sys.executable}\nopen({str(mark)!r}, 'w')\n")
    for command in ([sys.executable, "-c", f"open({str(mark)!r}, 'w')"], [shebang]):
        with pytest.raises(RunError, match=rf"{remedy}\./install\.sh --patch"):
            main(["--", *command])
        assert not mark.exists()


def test_an_interpreter_without_mxlab(tmp_path):
    bare = script(tmp_path, "python3", f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    with pytest.raises(
        RunError, match=r"python3 cannot import mxlab.*No module named .*mxlab.*install mxlab there, then"
    ):
        main(["--", bare, "-c", "pass"])


def test_an_interpreter_without_transformers(tmp_path):
    code = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); runpy.run_module('mxlab.hf.patch', alter_sys=True, "
    (tmp_path / "status.py").write_text(f"{code}run_name='__main__')", encoding="utf-8")
    python = f'#!/bin/sh\nshift 2\nexec {sys.executable} -I -S {tmp_path}/status.py "$@"\n'
    with pytest.raises(RunError, match=r"python3 cannot run a patched Llama: transformers is not installed for .*pip"):
        main(["--", script(tmp_path, "python3", python), "-c", "pass"])


# ---- what the command sees, and its end


def test_the_command_sees_the_options(patched, capfd):
    assert main(["--block_size", "16", "--no-custom-cuda", "--", sys.executable, "-c", CHILD, "--x", "--", "y"]) == 0
    out, err = capfd.readouterr()
    child = json.loads(out)
    assert child["argv"] == ["--x", "--", "y"]
    assert MxSpecs.from_json(child["specs"]) == MxSpecs(block_size=16, custom_cuda=False)
    assert json.loads(child["specs"])["a_elem_format"] == "fp6_e2m3"
    assert "14 linear layers and the K and V of 2 attentions were quantized" in err


def test_options_of_the_environment_are_passed_on(patched, capfd, monkeypatch):
    monkeypatch.setenv("MX_SPECS_JSON", '{"block_size": 64}')
    assert main(["--", sys.executable, "-c", CHILD]) == 0
    assert MxSpecs.from_json(json.loads(capfd.readouterr().out)["specs"]) == MxSpecs(block_size=64)
    with pytest.raises(SpecError, match="MX_SPECS_JSON is set and MX options are given: use one of the two"):
        main(["--block_size", "16", "--", sys.executable, "-c", CHILD])
    monkeypatch.setenv("MX_SPECS_JSON", '{"block_sise": 64}')
    with pytest.raises(SpecError, match="did you mean 'block_size'"):
        main(["--", sys.executable, "-c", CHILD])


def test_a_shebang_script_and_a_shell(patched, tmp_path, capfd):
    assert main([script(tmp_path, "tool", f"#!{sys.executable}\n{CHILD}")]) == 0
    (tmp_path / "child.py").write_text(CHILD, encoding="utf-8")
    assert main(["--", "sh", "-c", f"{sys.executable} {tmp_path}/child.py && echo done"]) == 0
    assert "done" in capfd.readouterr().out


@pytest.mark.parametrize("command", [["true"], ["sh", "-c", "exit 0"]])
def test_success_without_a_quantized_llama_is_an_error(command):
    with pytest.raises(RunError) as caught:
        main(["--", *command])
    message = str(caught.value)
    assert f"mxlab run: {command[0]!r} ended well but made no quantized Llama" in message
    assert "not a Llama" in message
    assert "install.sh --patch" in message


@pytest.mark.parametrize(
    ("code", "expected"), [("exit 1", 1), ("exit 7", 7), ("kill -TERM $$", 143), ("kill -KILL $$", 137)]
)
def test_exit_codes_are_passed_on(code, expected):
    assert main(["--", "sh", "-c", code]) == expected


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_signals_are_passed_on(sent, tmp_path):
    if signal.getsignal(sent) is signal.SIG_IGN:
        pytest.skip(f"{sent!r} is ignored here, as under nohup, and stays so in every child")
    child = 'trap "echo ended; exit 9" TERM HUP; echo ready; while :; do sleep 0.05; done'
    code = f"import sys; from mxlab.hf.launch import main; sys.exit(main(['--', 'sh', '-c', {child!r}]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(sent)
    out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == ("ended\n", 9)
    assert list(tmp_path.iterdir()) == []


def test_the_handlers_of_signals_are_put_back():
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    assert main(["--", "false"]) == 1
    assert before == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]


# ---- with models


LLAMA = """
from transformers import LlamaConfig, LlamaForCausalLM
LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                             vocab_size=16))
"""
GPT2 = """
from transformers import GPT2Config, GPT2LMHeadModel
GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=16))
"""


def test_a_real_llama(patched, capfd):
    assert main(["--kv_elem_format", "fp4", "--", sys.executable, "-c", LLAMA]) == 0
    err = capfd.readouterr().err
    assert "recipe MX_SPECS_JSON: 21 linear layers (weight fp4_e2m1@32, activation fp6_e2m3@32); 3 attentions" in err
    assert "21 linear layers and the K and V of 3 attentions were quantized" in err


def test_a_model_that_is_no_llama(patched):
    with pytest.raises(RunError, match="made no quantized Llama: either its model is not a Llama"):
        main(["--", sys.executable, "-c", GPT2])


def test_a_script_whose_interpreter_is_missing(tmp_path):
    script = tmp_path / "script"
    script.write_text("#!/nowhere/python3\n")
    script.chmod(0o755)
    with pytest.raises(RunError, match="cannot be started with /nowhere/python3"):
        launch.main(["--", str(script)])


def test_options_that_quantize_nothing(copies, monkeypatch, tmp_path):
    usable(copies["patched"], monkeypatch)
    child = tmp_path / "child.py"
    child.write_text(CHILD.replace('"linear_layers": 14, "attentions": 2', '"linear_layers": 0, "attentions": 0'))
    with pytest.raises(RunError, match="nothing was quantized"):
        main(["--no-quantize_linear", "--", sys.executable, str(child)])
