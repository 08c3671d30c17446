"""One rule: its selector, layers, phase and formats; what it prints as; errors. No model is involved."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxlab import shipped
from mxlab.errors import FormatError, SpecError
from mxlab.formats import MXFormat, parse_format
from mxlab.recipe import Elementwise, Recipe, load_recipe
from mxlab.recipe.algorithms import ORDERS
from mxlab.recipe.mx_specs import override
from mxlab.recipe.rule import ATTENTION_ROLES, LINEAR_ROLES, PARTS, PHASES, Rule
from mxlab.recipe.transform import Hadamard, parse_transform

from support.paths import ROOT

INT8 = MXFormat("int8")

formats = st.sampled_from(
    ["int8@16", "fp4_e2m1@32,rounding=even", "fp8_e4m3@0", "integer,width=8,frac=4", "binary"]
).map(parse_format)
numbers = st.integers(0, 99)
layers = st.lists(
    numbers.map(str) | st.tuples(numbers, numbers).map(lambda p: f"{min(p)}-{max(p)}") | numbers.map(lambda n: f"-{n}"),
    min_size=1,
    max_size=4,
).map(",".join)
selectors = st.one_of(
    st.fixed_dictionaries({"modules": st.sampled_from([r".*\.(q|k)_proj", "", r'"\\"'])}),
    st.fixed_dictionaries({"type": st.text(min_size=1, max_size=9)}),
    st.fixed_dictionaries({"name": st.text(max_size=9)}),
    st.fixed_dictionaries({"part": st.sampled_from(PARTS)}),
)


def roles(names: tuple[str, ...]):
    return st.dictionaries(st.sampled_from(names), formats, min_size=1)


every_rule = st.builds(
    lambda selector, content, more: Rule(**selector, **content, **{k: v for k, v in more.items() if v is not None}),
    selectors,
    st.one_of(st.just({"skip": True}), roles(LINEAR_ROLES), roles(ATTENTION_ROLES)),
    st.fixed_dictionaries({"layers": st.none() | layers, "phase": st.none() | st.sampled_from(PHASES)}),
)
tables = st.fixed_dictionaries(
    {},
    optional={
        "mase": st.dictionaries(st.text(max_size=5), st.integers() | st.booleans()),
        "gptq": st.fixed_dictionaries({}, optional={"damping": st.floats(0.001, 1), "order": st.sampled_from(ORDERS)}),
        "calibration": st.fixed_dictionaries({}, optional={"samples": st.integers(1, 99)}),
    },
)


# ---- TOML


@given(st.lists(every_rule, max_size=4), tables)
def test_every_field_survives_toml(rules, algorithms):
    rules = [*rules, Rule("x", weight=INT8)]
    recipe = Recipe("a", tuple(rules), algorithms=algorithms, elementwise=Elementwise(fp=16))
    again = Recipe.from_toml(recipe.to_toml())
    assert again == recipe
    assert again.hash == recipe.hash


@given(every_rule, every_rule)
def test_rules_that_differ_have_hashes_that_differ(one, other):
    hashes = [Recipe("a", (rule, Rule("x", weight=INT8))).hash for rule in (one, other)]
    assert (hashes[0] == hashes[1]) is (one == other)


@pytest.mark.parametrize("name", ["ex1", "ex2"])
def test_the_hashes_of_published_runs_are_those_of_today(name):
    files = sorted((ROOT / "results" / "smollm2-135m" / name).glob("*/run.json"))
    assert len(files) == 12
    for file in files:
        run = json.loads(file.read_text(encoding="utf-8"))
        toml = Recipe.from_toml((file.parent / "recipe.toml").read_text(encoding="utf-8"))
        assert toml.hash == override(load_recipe(name), run["options"]).hash == run["key"]["recipe"]


@pytest.mark.parametrize("path", shipped.files("recipe").values(), ids=lambda p: p.stem)
def test_shipped_recipes_print_and_read_back(path):
    recipe = load_recipe(path.stem)
    assert Recipe.from_toml(recipe.to_toml()) == recipe


# ---- selectors


@pytest.mark.parametrize(
    ("selector", "chosen"),
    [
        ({"modules": r".*\.up"}, {"a.up"}),
        ({"modules": "up"}, set()),
        ({"modules": ""}, {""}),
        ({"name": "a.up"}, {"a.up"}),
        ({"name": "a.u."}, set()),
        ({"type": "Linear"}, {"a.up", "head"}),
        ({"part": "mlp"}, {"a.up"}),
        ({"part": "head"}, {"head"}),
        ({"part": "all"}, {"a.up", "head"}),
    ],
)
def test_each_selector(selector, chosen):
    modules = {"": ("Model", ""), "a.up": ("Linear", "mlp"), "head": ("Linear", "head"), "norm": ("Norm", "")}
    rule = Rule(**selector, weight=INT8)
    assert {name for name, (kind, part) in modules.items() if rule.matches(name, kind, part)} == chosen


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "selects by one of modules, type, name, part; this one has none"),
        ({"modules": "a", "part": "mlp"}, "this one has modules and part"),
        ({"type": "a", "name": "b"}, "this one has type and name"),
        ({"part": "mpl"}, r"part is 'mpl'.*did you mean 'mlp'"),
        ({"modules": "a", "phase": "decoding"}, r"phase is 'decoding'.*did you mean 'decode'"),
        ({"modules": "a("}, r"modules = 'a\(' is not a regular expression"),
        ({"modules": "a", "skip": "yes"}, "skip is 'yes': it must be true or false"),
        ({"modules": "a", "skip": True}, "skips its modules and gives formats for weight: one or other"),
        ({"modules": "a", "p": INT8}, "gives formats for a linear layer and for an attention: write two rules"),
    ],
)
def test_contradictory_rules(values, message):
    with pytest.raises(SpecError, match=message):
        Rule(weight=INT8, **values)


@pytest.mark.parametrize("key", ["type", "name", "part", "layers", "phase", "modules"])
def test_keys_that_must_be_texts(key):
    with pytest.raises(SpecError, match=rf"here: {key} is 3: it must be a text"):
        Rule.from_dict({"weight": "int8", key: 3}, "here")


def test_an_unknown_key():
    with pytest.raises(SpecError, match=r"here: unknown key 'layer'; did you mean 'layers'.; known are modules, "):
        Rule.from_dict({"part": "mlp", "layer": "3", "weight": "int8"}, "here")


# ---- layers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", {0}),
        ("0-3, 8, -1", {0, 1, 2, 3, 8, 11}),
        (" 3-3 ,-12", {0, 3}),
        ("11", {11}),
        ("0-11", set(range(12))),
        ("5,5,4-6", {4, 5, 6}),
    ],
)
def test_layers(text, expected):
    assert Rule("x", layers=text, weight=INT8).layer_numbers(12) == expected


def test_no_layers_are_all():
    assert Rule("x", weight=INT8).layer_numbers(12) is None


@pytest.mark.parametrize("text", ["", ",", "0-", "-", "--1", "3-1", "a", "1.5", "0;3", "-4--1", "0 3", "٣"])
def test_layers_that_cannot_be_read(text):
    with pytest.raises(SpecError, match=r"modules = 'x'.*cannot read .*layers are written like '0-3, 8, -1'"):
        Rule("x", layers=text, weight=INT8)


@pytest.mark.parametrize(("text", "layer"), [("12", 12), ("-13", -1), ("10-12", 12), ("0, 99", 99)])
def test_layers_that_a_model_lacks(text, layer):
    with pytest.raises(SpecError, match=rf"names layer {layer}: the model has 12, numbered from 0"):
        Rule("x", layers=text, weight=INT8).layer_numbers(12)


def test_spaces_between_layers_are_no_difference():
    one, other = (Rule("x", layers=text, weight=INT8) for text in ("0-3,8,-1", " 0-3 , 8,  -1"))
    assert one == other
    assert one.layers == "0-3, 8, -1"


# ---- recipes without effect, algorithms


def test_a_rule_without_formats_needs_element_wise_rounding():
    rule = Rule("x")
    assert Recipe("a", (rule,), elementwise=Elementwise(bfloat=16)).rules == (rule,)
    with pytest.raises(SpecError, match=r"modules = 'x' gives no format, and nothing is rounded element-wise"):
        Recipe("a", (rule,))


def test_a_recipe_that_only_skips():
    with pytest.raises(SpecError, match="every rule skips, so nothing is quantized"):
        Recipe("a", (Rule("x", skip=True), Rule(part="head", skip=True)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("algorithms = 3", r"\[algorithms\]: must be a table"),
        ("[algorithms]\ngptq = true", r"gptq is True: it must be a table of options"),
        ("[algorithms.gtpq]", r"unknown key 'gtpq'.*did you mean 'gptq'"),
    ],
)
def test_algorithms_that_cannot_be_read(text, message):
    with pytest.raises(SpecError, match=message):
        Recipe.from_toml(f'name = "a"\n{text}')


def test_an_unknown_algorithm_in_code():
    with pytest.raises(FormatError, match="algorithm is 'magic'"):
        Recipe("a", algorithms={"magic": {}})


def test_options_of_algorithms_are_in_the_hash():
    hashes = {Recipe("a", algorithms=a).hash for a in ({}, {"gptq": {}}, {"gptq": {"damping": 0.1}}, {"mase": {}})}
    assert len(hashes) == 4


# ---- transforms and algorithms


def test_a_transform_is_read_printed_and_hashed():
    rule = Rule.from_dict({"part": "mlp", "weight": "fp4@32", "transform": "hadamard@32"}, "file")
    assert rule.transform == Hadamard(32)
    assert Rule.from_dict(rule.to_dict(), "file") == rule
    assert str(parse_transform("hadamard")) == "hadamard"
    others = [replace(rule, transform=t) for t in (None, Hadamard(64), Hadamard())]
    assert len({Recipe("a", (r,)).hash for r in (rule, *others)}) == 4


@pytest.mark.parametrize("text", ["hadamrd", "hadamard@", "hadamard@1", "hadamard@-2", 32, "wush@1", "wash@32"])
def test_another_transform_is_refused(text):
    with pytest.raises(SpecError, match="transform"):
        Rule.from_dict({"part": "mlp", "weight": "fp4@32", "transform": text}, "file")


def test_a_transform_of_nothing_is_refused():
    with pytest.raises(SpecError, match="no format for what it transforms"):
        Rule(part="attention", p=INT8, transform=Hadamard(32))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('[algorithms.gptq]\norder = "size"', "order is 'size'"),
        ("[algorithms.gptq]\ndamping = 0", "above 0"),
        ("[algorithms.gptq]\ncorrection = [0, 2]", "between 0 and 1"),
        ("[algorithms.gptq]\nnsamples = 8", "unknown key 'nsamples'"),
        ("[algorithms.calibration]\nsamples = 0", "samples is 0"),
    ],
)
def test_a_bad_option_of_an_algorithm_is_named(table, message):
    with pytest.raises(SpecError, match=message):
        Recipe.from_toml(f'name = "a"\n{table}')
