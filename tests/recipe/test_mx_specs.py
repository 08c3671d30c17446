"""microxcaling's options: defaults, every option's effect on the recipe, and errors that say what to do."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mxlab.errors import FormatError, SpecError
from mxlab.formats import MICROXCALING_ROUNDINGS, MXFormat, parse_format
from mxlab.recipe import Elementwise, Recipe, load_recipe
from mxlab.recipe.mx_specs import ATTENTIONS, LINEARS, OPTIONS, MxSpecs, add_arguments, override, parse_assignment
from mxlab.recipe.rule import Rule

DEFAULTS = {
    "w_elem_format": "fp4_e2m1",
    "a_elem_format": "fp6_e2m3",
    "kv_elem_format": None,
    "quantize_linear": True,
    "block_size": 32,
    "scale_bits": 8,
    "bfloat": 16,
    "round": "nearest",
    "custom_cuda": True,
}
# microxcaling's own list of what a resolved dictionary holds.
MICROXCALING = {
    "scale_bits", "w_elem_format", "a_elem_format", "w_elem_format_bp", "a_elem_format_bp", "a_elem_format_bp_ex",
    "a_elem_format_bp_os", "mx_flush_fp32_subnorms", "shared_exp_method", "block_size", "bfloat", "fp",
    "bfloat_subnorms", "quantize_backprop", "round", "round_m", "round_weight", "round_output", "round_grad_weight",
    "round_grad_input", "round_mx_output", "round_mx_input_grad_input", "round_mx_weight_grad_input",
    "round_mx_grad_output_grad_input", "round_mx_input_grad_weight", "round_mx_grad_output_grad_weight", "softmax_exp2",
    "vec_use_exp2", "vec_use_recip", "custom_cuda",
}  # fmt: skip
KV = {"kv_elem_format": "fp4_e2m1"}


def recipe(**options: Any) -> Recipe:
    return MxSpecs.from_mapping(options).to_recipe()


def formats(found: Recipe) -> dict[str, dict[str, str]]:
    return {rule.modules: {role: str(fmt) for role, fmt in rule.formats.items()} for rule in found.rules}


def parse(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    return vars(parser.parse_args(arguments))


# ---- defaults


def test_defaults():
    values = asdict(MxSpecs())
    assert {name: values[name] for name in DEFAULTS} == DEFAULTS
    assert values.keys() == MICROXCALING | {"kv_elem_format", "quantize_linear"}


def test_nothing_is_ex1():
    assert MxSpecs.from_json("{}").to_recipe().hash == load_recipe("ex1").hash
    assert recipe(**DEFAULTS) == recipe()
    assert formats(recipe()) == {LINEARS: {"weight": "fp4_e2m1@32", "activation": "fp6_e2m3@32"}}
    assert recipe().numerics == "exact"
    assert recipe().elementwise == Elementwise(bfloat=16)


def test_with_kv_it_is_ex2():
    assert recipe(**KV).hash == load_recipe("ex2").hash


@pytest.mark.parametrize("text", ["{}", '{"block_size": 16, "kv_elem_format": "int8", "w_elem_format": null}'])
def test_json_round_trip(text):
    specs = MxSpecs.from_json(text)
    assert MxSpecs.from_json(specs.to_json()) == specs
    assert json.loads(specs.to_json()).keys() == OPTIONS.keys()


# ---- what each option does


@pytest.mark.parametrize(
    ("options", "field", "expected"),
    [
        ({"block_size": 16}, "block_size", 16),
        ({"block_size": 0}, "block_size", 0),
        ({"scale_bits": 6}, "scale_bits", 6),
        ({"scale_bits": 0}, "scale_bits", 8),
        ({"shared_exp_method": "none"}, "scale_rule", "none"),
        ({"shared_exp_method": "max"}, "scale_rule", "floor"),
        ({"mx_flush_fp32_subnorms": True}, "flush_fp32_subnorms", True),
        ({"round": "even"}, "rounding", "even"),
        ({"round_mx_output": "floor"}, "rounding", "floor"),
        ({"round": "even", "round_mx_output": "floor"}, "rounding", "floor"),
        ({"round": "even", "round_mx_output": None}, "rounding", "even"),
        ({"round_weight": "even", "round_output": "even"}, "rounding", "nearest"),
    ],
)
def test_options_of_all_formats(options, field, expected):
    found = recipe(**KV, **options)
    assert len(found.formats) == 4
    assert {getattr(fmt, field) for fmt in found.formats} == {expected}


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"bfloat": 0}, {"bfloat": 0}),
        ({"bfloat": 0, "fp": 16}, {"bfloat": 0, "fp": 16}),
        ({"bfloat_subnorms": False}, {"subnormals": False}),
        ({"round": "floor"}, {"weight_rounding": "floor", "output_rounding": "floor"}),
        ({"round_weight": "even"}, {"weight_rounding": "even"}),
        ({"round_output": "even"}, {"output_rounding": "even"}),
        ({"round": "floor", "round_weight": "even"}, {"weight_rounding": "even", "output_rounding": "floor"}),
        ({"round_mx_output": "even"}, {}),
    ],
)
def test_options_of_the_elementwise_rounding(options, changes):
    assert recipe(**options).elementwise == Elementwise(**{"bfloat": 16, **changes})


@pytest.mark.parametrize("rounding", MICROXCALING_ROUNDINGS)
def test_every_rounding(rounding):
    found = recipe(round=rounding)
    assert {fmt.rounding for fmt in found.formats} == {rounding}
    assert found.elementwise.weight_rounding == found.elementwise.output_rounding == rounding


@pytest.mark.parametrize(("custom_cuda", "numerics"), [(True, "exact"), (False, "microxcaling")])
def test_custom_cuda_chooses_the_numerics_and_nothing_else(custom_cuda, numerics):
    found = recipe(custom_cuda=custom_cuda)
    assert found.numerics == numerics
    assert (found.rules, found.elementwise) == (recipe().rules, recipe().elementwise)


@pytest.mark.parametrize("off", [None, "none"])
def test_null_and_none_switch_a_role_off(off):
    both = {"weight": "fp4_e2m1@32", "activation": "fp6_e2m3@32"}
    kv = {ATTENTIONS: {"k": "fp4_e2m1@32", "v": "fp4_e2m1@32"}}
    assert formats(recipe(w_elem_format=off)) == {LINEARS: {"activation": both["activation"]}}
    assert formats(recipe(a_elem_format=off)) == {LINEARS: {"weight": both["weight"]}}
    assert formats(recipe(kv_elem_format=off)) == {LINEARS: both}
    # The linear layers still round element-wise.
    assert formats(recipe(w_elem_format=off, a_elem_format=off, **KV)) == {LINEARS: {}, **kv}


def test_quantize_linear_and_kv():
    kv = {ATTENTIONS: {"k": "int8@16", "v": "int8@16"}}
    assert formats(recipe(quantize_linear=False, kv_elem_format="int8", block_size=16)) == kv
    assert recipe(quantize_linear=False, **KV).hash == load_recipe("kv_only").hash
    assert recipe(quantize_linear=False).rules == ()
    assert formats(recipe(kv_elem_format="int8", block_size=16)).keys() == {LINEARS, ATTENTIONS}


@pytest.mark.parametrize(("given", "canonical"), [("fp4", "fp4_e2m1"), ("mxfp6_e3m2", "fp6_e3m2"), ("INT8", "int8")])
def test_formats_are_stored_in_their_canonical_spelling(given, canonical):
    assert MxSpecs(w_elem_format=given, kv_elem_format=given) == MxSpecs(
        w_elem_format=canonical, kv_elem_format=canonical
    )


def test_every_option_changes_the_recipe_or_says_that_it_has_no_effect():
    other: dict[str, Any] = {"format": "int8", "rounding": "even", "int": 8, "flag": None, "choice": None}
    special = {"bfloat": 12, "fp": 16, "block_size": 16, "scale_bits": 6, "shared_exp_method": "none", "round": "even"}
    for name, f in OPTIONS.items():
        kind = f.metadata["kind"]
        value = special.get(name, not f.default if kind == "flag" else other[kind])
        base = {"bfloat": 0} if name == "fp" else {}
        specs = MxSpecs.from_mapping({**base, name: value})
        changed = specs.to_recipe().hash != recipe(**base).hash
        assert changed == (name not in specs.without_effect), name
    assert MxSpecs().without_effect == []


@pytest.mark.parametrize("name", ["raw_specs", "resolved_specs"])
def test_microxcalings_dictionaries(name, shared):
    manifest = json.loads((shared / "golden" / "open" / "manifest.json").read_text(encoding="utf-8"))
    cases = [case[name] for case in manifest["cases"] if case["op"] == "linear"]
    assert len(cases) == 60
    for values in cases:
        found = MxSpecs.from_json(json.dumps(values)).to_recipe()
        [rule] = found.rules
        more = {"block_size": values["block_size"], "rounding": values["round"]}
        assert rule.weight == MXFormat(values["w_elem_format"], **more)
        assert rule.activation == MXFormat(values["a_elem_format"], **more)
        assert (found.numerics, found.elementwise.bfloat) == ("microxcaling", values["bfloat"])


def test_a_resolved_dictionary():
    """As microxcaling's ``finalize_mx_specs`` fills it in: everything there, the roundings and backward formats too."""
    rounded = {name: "even" for name in MICROXCALING if name.startswith("round")}
    resolved = {**{name: OPTIONS[name].default for name in MICROXCALING}, **rounded}
    resolved |= {name: "fp8_e4m3" for name in MICROXCALING if "elem_format" in name}
    assert MxSpecs.from_mapping(resolved).to_recipe() == recipe(
        round="even", w_elem_format="fp8_e4m3", a_elem_format="fp8_e4m3"
    )


# ---- laid over a recipe


def test_override_leaves_what_is_not_named():
    ex2 = load_recipe("ex2")
    assert override(ex2, {}) == ex2
    changed = override(ex2, {"block_size": 16})
    assert {fmt.block_size for fmt in changed.formats} == {16}
    assert changed.map_formats(block_size=32) == ex2
    assert override(ex2, {"custom_cuda": False}).rules == ex2.rules


def test_override_switches_roles_on_and_off():
    ex1, ex2, baseline = (load_recipe(name) for name in ("ex1", "ex2", "baseline"))
    assert override(ex1, KV) == Recipe("ex1", ex2.rules, ex2.numerics, ex2.elementwise)
    assert override(ex2, {"kv_elem_format": "none"}).hash == ex1.hash
    assert override(ex2, {"quantize_linear": False}).hash == load_recipe("kv_only").hash
    assert override(ex2, {"a_elem_format": None}).rules[0] == Rule(LINEARS, weight=MXFormat("fp4_e2m1"))
    on = override(baseline, {"w_elem_format": "int8", "block_size": 16})
    assert formats(on) == {LINEARS: {"weight": "int8@16"}}
    # A role that is switched on takes the block size, the scale bits, ... of the others.
    assert str(override(override(ex1, {"block_size": 64}), KV).rules[1].k) == "fp4_e2m1@64"


# ---- errors


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["line 1, column 1 (character 0)", "{} (Ex1)"]),
        ("   ", ["line 1, column 4 (character 3)"]),
        ("{", ["line 1, column 2 (character 1)"]),
        ('{"block_size": 16,\n "scale_bits" 8}', ["line 2, column 15 (character 33)"]),
        ("{'block_size': 16}", ["line 1, column 2"]),
        ("[]", ["must be a JSON object"]),
        ("32", ["must be a JSON object"]),
        ("null", ["must be a JSON object"]),
        ('"ex1"', ["must be a JSON object"]),
        ('{"block_size": 16, "block_size": 32}', ["'block_size' is given twice"]),
        ('{"block_sizes": 16}', ["unknown key 'block_sizes'", "did you mean 'block_size'?", "scale_bits"]),
        ('{"": 1}', ["unknown key ''"]),
        ('{"w_elem_format": "fp4_e2m2"}', ["w_elem_format", "'fp4_e2m2'", "fp8_e5m2, fp8_e4m3", "did you mean"]),
        ('{"kv_elem_format": ""}', ["kv_elem_format", "known are"]),
        ('{"w_elem_format": 4}', ["w_elem_format", "4 is not the name"]),
        ('{"w_elem_format": true}', ["w_elem_format", "True is not the name"]),
        ('{"a_elem_format": ["int8"]}', ["a_elem_format", "['int8'] is not the name"]),
        ('{"a_elem_format": {}}', ["a_elem_format", "{} is not the name"]),
        ('{"block_size": -1}', ["block_size is -1"]),
        ('{"block_size": 32.0}', ["block_size is 32.0", "whole number"]),
        ('{"block_size": "32"}', ["block_size is '32'"]),
        ('{"block_size": null}', ["block_size is None"]),
        ('{"block_size": true}', ["block_size is True"]),
        ('{"block_size": NaN}', ["block_size is nan"]),
        ('{"block_size": 1e999}', ["block_size is inf"]),
        ('{"scale_bits": 9}', ["scale_bits is 9", "1 to 8"]),
        ('{"scale_bits": -1}', ["scale_bits is -1"]),
        ('{"bfloat": 9}', ["bfloat", "10 to 32"]),
        ('{"bfloat": 33}', ["bfloat is 33"]),
        ('{"bfloat": 0, "fp": 6}', ["fp", "7 to 29"]),
        ('{"fp": 16}', ["bfloat is 16 and fp is 16"]),
        ('{"custom_cuda": 1}', ["custom_cuda is 1", "true or false"]),
        ('{"custom_cuda": "true"}', ["custom_cuda is 'true'"]),
        ('{"quantize_linear": null}', ["quantize_linear is None"]),
        ('{"round": "up"}', ["round is 'up'", "nearest, even, floor, dither"]),
        ('{"round": null}', ["round is None"]),
        ('{"round_output": "evn"}', ["round_output is 'evn'", "did you mean 'even'?"]),
        ('{"round_output": ["even"]}', ["round_output is ['even']"]),
        ('{"shared_exp_method": "mean"}', ["shared_exp_method is 'mean'", "max, none"]),
    ],
)
def test_bad_json(text, parts):
    with pytest.raises(SpecError) as caught:
        MxSpecs.from_json(text)
    message = str(caught.value)
    assert message.startswith("MX_SPECS_JSON")
    for part in parts:
        assert part in message, message


def test_the_source_is_named():
    with pytest.raises(SpecError, match=r"^mxlab run: block_size is -3"):
        MxSpecs.from_mapping({"block_size": -3}, "mxlab run")
    with pytest.raises(SpecError, match=r"^specs\.json is not valid JSON"):
        MxSpecs.from_json("{", "specs.json")


def test_from_environment():
    assert MxSpecs.from_environment({}) is None
    assert MxSpecs.from_environment({"MX_SPECS_JSON": '{"block_size": 16}'}) == MxSpecs(block_size=16)
    with pytest.raises(SpecError, match="MX_SPECS_JSON is not valid JSON"):
        MxSpecs.from_environment({"MX_SPECS_JSON": ""})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocksize": 16}, "unknown option 'blocksize'; did you mean 'block_size'"),
        ({"scale_bits": 99}, "scale_bits is 99"),
        ({"fp": 16}, "bfloat is 16 and fp is 16"),
        ({"bfloat": 3}, "bfloat is 3"),
    ],
)
def test_bad_overrides(options, message):
    with pytest.raises(SpecError, match=message):
        override(load_recipe("ex1"), options)


# ---- the command line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--block_size", "16"], {"block_size": 16}),
        (["--block-size", "16"], {"block_size": 16}),
        (["--block_size=16", "--scale-bits=6"], {"block_size": 16, "scale_bits": 6}),
        (["--w_elem_format", "int8", "--kv-elem-format", "none"], {"w_elem_format": "int8", "kv_elem_format": "none"}),
        (["--custom_cuda"], {"custom_cuda": True}),
        (["--custom-cuda"], {"custom_cuda": True}),
        (["--no-custom-cuda"], {"custom_cuda": False}),
        (["--no_custom_cuda"], {"custom_cuda": False}),
        (["--no-custom_cuda"], {"custom_cuda": False}),
        (["--custom_cuda", "--no_custom_cuda"], {"custom_cuda": False}),
        (["--no_quantize_linear"], {"quantize_linear": False}),
        (["--round", "even", "--round_mx_output", "floor"], {"round": "even", "round_mx_output": "floor"}),
    ],
)
def test_only_what_is_given_is_in_the_result(arguments, expected):
    assert parse(*arguments) == expected


def test_every_option_is_on_the_command_line():
    for name, f in OPTIONS.items():
        value = [] if f.metadata["kind"] == "flag" else ["8" if f.metadata["kind"] == "int" else "even"]
        for spelling in (name, name.replace("_", "-")):
            assert list(parse(f"--{spelling}", *value)) == [name]


@pytest.mark.parametrize("arguments", [["--block_size", "x"], ["--block"], ["--blocksize", "16"], ["--round"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("block_size=16", ("block_size", 16)),
        ("custom_cuda=false", ("custom_cuda", False)),
        ("kv_elem_format=null", ("kv_elem_format", None)),
        ("w_elem_format=int8", ("w_elem_format", "int8")),
        (' round = "even" ', ("round", "even")),
        ("round=", ("round", "")),
        ("a=b=c", ("a", "b=c")),
    ],
)
def test_assignments(text, expected):
    assert parse_assignment(text) == expected


def test_an_assignment_needs_an_equals_sign():
    with pytest.raises(SpecError, match=r"cannot read 'block_size'.*block_size=16"):
        parse_assignment("block_size")


def test_specs_are_frozen_and_checked_when_they_are_made():
    with pytest.raises(AttributeError):
        MxSpecs().block_size = 16  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(SpecError):
        MxSpecs(block_size=-1)
    assert issubclass(SpecError, ValueError)
    assert issubclass(FormatError, ValueError)


def test_options_need_no_torch():
    import subprocess
    import sys

    code = "import sys, mxlab.recipe.mx_specs, mxlab.hf.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent).returncode == 0


# ---- overrides of recipes with the other kinds of rules


def test_overrides_leave_skip_rules_where_they_are():
    skip, mlp, attention = (
        Rule(part="mlp", layers="0", skip=True),
        Rule(part="mlp", weight=MXFormat("fp4")),
        Rule(part="attention", k=MXFormat("int8"), q=MXFormat("int8")),
    )
    recipe = Recipe("mine", (skip, mlp, attention))
    changed = override(recipe, {"w_elem_format": "int4", "block_size": 16, "kv_elem_format": "fp4"})
    assert changed.rules[0] == skip
    assert str(changed.rules[1].weight) == "int4@16"
    assert {role: str(fmt) for role, fmt in changed.rules[2].formats.items()} == {
        "k": "fp4_e2m1@16",
        "v": "fp4_e2m1@16",
        "q": "int8@16",
    }
    assert override(recipe, {"quantize_linear": False}).rules == (skip, attention)
    without_kv = override(recipe, {"kv_elem_format": None})
    assert [set(rule.formats) for rule in without_kv.rules] == [set(), {"weight"}, {"q"}]


def test_new_kv_rules_fit_the_architecture_that_parts_fit():
    recipe = override(Recipe("mine", (Rule(part="mlp", weight=MXFormat("fp4")),)), {"kv_elem_format": "int8"})
    assert recipe.rules[1].part == "attention"


def test_options_of_other_formats_are_errors():
    recipe = Recipe("mine", (Rule(part="mlp", weight=parse_format("integer,width=8,frac=4")),))
    with pytest.raises(SpecError, match=r"block_size cannot be set for integer.*not a microscaling format"):
        override(recipe, {"block_size": 16})
    assert str(override(recipe, {"w_elem_format": "int4"}).rules[0].weight) == "int4@32"


def test_a_rule_without_effect_is_an_error():
    with pytest.raises(SpecError, match=r"gives no format, and nothing is rounded element-wise"):
        Recipe("mine", (Rule(part="mlp"),))
    with pytest.raises(SpecError, match="every rule skips"):
        Recipe("mine", (Rule(part="mlp", skip=True),))
