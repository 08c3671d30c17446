"""microxcaling's options as a dictionary: defaults, what follows what, the command line."""

import argparse
import copy
import json
import logging
import pickle

import pytest

from mxlab.compat.mx import (
    MxSpecs,
    add_mx_args,
    apply_mx_specs,
    finalize_mx_specs,
    get_backwards_mx_specs,
    get_mx_specs,
    quantize_mx_op,
)
from mxlab.compat.mx.specs import UnknownOptionError, get_default_mx_specs, mx_assert_test
from mxlab.errors import SpecError
from mxlab.recipe.mx_specs import OPTIONS

ROUNDINGS = (
    "round_m",
    "round_weight",
    "round_output",
    "round_grad_weight",
    "round_grad_input",
    "round_mx_output",
    "round_mx_input_grad_input",
    "round_mx_weight_grad_input",
    "round_mx_grad_output_grad_input",
    "round_mx_input_grad_weight",
    "round_mx_grad_output_grad_weight",
)
# As microxcaling's documentation and its parser's help give them.
DEFAULTS = {
    "scale_bits": 0,
    "w_elem_format": None,
    "a_elem_format": None,
    "w_elem_format_bp": None,
    "a_elem_format_bp": None,
    "a_elem_format_bp_ex": None,
    "a_elem_format_bp_os": None,
    "mx_flush_fp32_subnorms": False,
    "shared_exp_method": "max",
    "block_size": 0,
    "bfloat": 0,
    "fp": 0,
    "bfloat_subnorms": True,
    "quantize_backprop": True,
    "round": "nearest",
    **dict.fromkeys(ROUNDINGS, "nearest"),
    "softmax_exp2": False,
    "vec_use_exp2": False,
    "vec_use_recip": False,
    "custom_cuda": False,
}


def parsed(*arguments: str) -> MxSpecs | None:
    return get_mx_specs(add_mx_args(argparse.ArgumentParser()).parse_args(arguments))


def test_the_defaults():
    assert dict(MxSpecs()) == dict(get_default_mx_specs()) == DEFAULTS
    assert set(OPTIONS) - set(DEFAULTS) == {"kv_elem_format", "quantize_linear"}
    assert MxSpecs.help_strings.keys() == DEFAULTS.keys()
    assert MxSpecs({"bfloat": 16}, block_size=32) == {**DEFAULTS, "bfloat": 16, "block_size": 32}


def test_it_behaves_as_a_dictionary():
    specs = MxSpecs(bfloat=16)
    assert json.loads(str(specs)) == json.loads(specs.safe_json()) == dict(specs)
    assert specs.safe_json(indent=4) == str(specs)
    assert "<<non-serializable: set>>" in MxSpecs(round={1}).safe_json()
    assert specs.get("bfloat") == 16
    assert specs.get("blocksize", 5) == 5
    assert "blocksize" not in specs
    for twin in (specs.copy(), copy.deepcopy(specs), pickle.loads(pickle.dumps(specs)), specs | {}):
        twin["fp"] = 12
        assert isinstance(twin, MxSpecs)
        assert (twin["bfloat"], specs["fp"]) == (16, 0)


def test_unknown_options(caplog):
    hint = r"microxcaling has no option 'blocksize'; did you mean 'block_size'\?; known: w_elem_format, "
    for wrong in (
        lambda: MxSpecs(blocksize=32),
        lambda: MxSpecs()["blocksize"],
        lambda: apply_mx_specs({"blocksize": 32}),
        lambda: finalize_mx_specs({"blocksize": 32, "bfloat": 16}),
    ):
        for error in (UnknownOptionError, KeyError, AssertionError, SpecError):
            with pytest.raises(error, match=hint):
                wrong()
    assert str(UnknownOptionError("as it is")) == "as it is"
    assert apply_mx_specs({"blocksize": None}) == DEFAULTS  # not given
    with caplog.at_level(logging.WARNING, "mxlab"):
        MxSpecs()["blocksize"] = 32  # microxcaling's own tests do that
    assert "no option 'blocksize'" in caplog.text
    assert "it has no effect" in caplog.text


def test_applying_over_defaults():
    base = MxSpecs(bfloat=16, round="even")
    found = apply_mx_specs({"bfloat": 12, "round": None}, base)
    assert found is base
    assert (found["bfloat"], found["round"]) == (12, "even")
    assert apply_mx_specs(None) == apply_mx_specs({}) == DEFAULTS


# ---- finalize_mx_specs


@pytest.mark.parametrize("make", [dict, MxSpecs])
def test_nothing_to_quantize(make):
    specs = make(custom_cuda=True, round="even", quantize_backprop=False)
    assert finalize_mx_specs(specs) is None
    assert finalize_mx_specs(make(w_elem_format=None, a_elem_format=None)) is None
    assert finalize_mx_specs(specs, early_exit=False)["custom_cuda"] is True


@pytest.mark.parametrize("name", [*(n for n in DEFAULTS if "elem_format" in n), "bfloat", "fp"])
def test_anything_to_quantize(name):
    value = 16 if name in ("bfloat", "fp") else "int8"
    assert finalize_mx_specs({name: value})[name] == value


def test_what_follows_what():
    found = finalize_mx_specs({"w_elem_format": "int8", "a_elem_format": "fp4", "round": "even"})
    assert {n: v for n, v in found.items() if "_bp" in n} == {
        "w_elem_format_bp": "int8",
        "a_elem_format_bp": "fp4",
        "a_elem_format_bp_ex": "fp4",
        "a_elem_format_bp_os": "fp4",
    }
    assert {v for n, v in found.items() if n.startswith("round")} == {"even"}
    given = {"a_elem_format": "fp4", "a_elem_format_bp_ex": "int8", "round_grad_input": "floor", "round_weight": None}
    found = finalize_mx_specs(given)
    assert found["a_elem_format_bp_ex"] == "int8"
    assert {n for n, v in found.items() if v == "floor"} == {
        "round_grad_input",
        "round_mx_input_grad_input",
        "round_mx_weight_grad_input",
        "round_mx_grad_output_grad_input",
        "round_mx_input_grad_weight",
        "round_mx_grad_output_grad_weight",
    }
    assert found["round_weight"] == "nearest"


def test_the_dictionary_itself_is_filled_in():
    given = {"w_elem_format": "int8", "round": "even"}
    found = finalize_mx_specs(given)
    assert isinstance(found, MxSpecs)
    assert given["w_elem_format_bp"] == "int8"
    assert given["round_mx_output"] == "even"


def test_specs_with_defaults_have_every_rounding_already():
    specs = MxSpecs(w_elem_format="int8", round="even")
    found = finalize_mx_specs(specs)
    assert found["w_elem_format_bp"] == "int8"
    assert found["round_output"] == "nearest"


def test_the_recorded_dictionaries(shared):
    manifest = json.loads((shared / "golden" / "open" / "manifest.json").read_text(encoding="utf-8"))
    cases = [case for case in manifest["cases"] if case["op"] == "linear"]
    assert len(cases) == 60
    for case in cases:
        assert finalize_mx_specs(case["raw_specs"]) == case["resolved_specs"]


def test_backward_options():
    specs = finalize_mx_specs({"w_elem_format": "int8", "a_elem_format": "fp4", "bfloat": 16, "block_size": 32})
    assert get_backwards_mx_specs(specs) == specs
    specs["quantize_backprop"] = False
    backward = get_backwards_mx_specs(specs)
    assert specs["w_elem_format"] == "int8"
    assert {n for n, v in backward.items() if v != specs[n]} == {
        *(n for n in DEFAULTS if "elem_format" in n and specs[n]),
        "block_size",
        "bfloat",
    }
    assert finalize_mx_specs(backward) is None


# ---- the command line


def test_arguments():
    assert parsed() is None
    assert parsed("--bfloat", "16") == {**DEFAULTS, "bfloat": 16}
    assert parsed("--skip_early_exit") == DEFAULTS
    found = parsed("--w_elem_format", "int8", "--block_size=32", "--round", "even", "--no_quantize_backprop")
    assert found == finalize_mx_specs(
        {"w_elem_format": "int8", "block_size": 32, "round": "even", "quantize_backprop": False}
    )
    assert found["round_mx_output"] == "even"
    assert parsed("--custom_cuda", "--fp", "16", "--mx_dir", "/somewhere") == {
        **DEFAULTS,
        "custom_cuda": True,
        "fp": 16,
    }


def test_every_option_has_an_argument(capsys):
    parser = add_mx_args(argparse.ArgumentParser())
    for name, default in DEFAULTS.items():
        argument = f"--no_{name}" if default is True else f"--{name}"
        value = [] if isinstance(default, bool) else ["8" if isinstance(default, int) else "even"]
        args = parser.parse_args([argument, *value, "--skip_early_exit"])
        assert get_mx_specs(args)[name] != default
    with pytest.raises(SystemExit):
        parser.parse_args(["--block_size", "many"])
    assert "invalid int value: 'many'" in capsys.readouterr().err


def test_a_namespace_of_another_parser():
    assert get_mx_specs(argparse.Namespace(epochs=3)) is None
    assert get_mx_specs(argparse.Namespace(bfloat=16))["bfloat"] == 16


# ---- MX_ASSERT


def test_assert_mode(monkeypatch):
    mx_assert_test(None)
    monkeypatch.setenv("MX_ASSERT", "True")
    mx_assert_test(MxSpecs())
    with pytest.raises(SpecError, match=r"mx_specs is None in quantize_mx_op, called from .*test_specs\.py, l"):
        quantize_mx_op(None, None)
