"""Recipes: TOML out and in, the hash, the shipped ones, and errors that name the file, the rule and the key."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxlab import shipped
from mxlab.errors import SpecError
from mxlab.formats import ELEMENTS, MICROXCALING_ROUNDINGS, ROUNDINGS, MXFormat
from mxlab.recipe import Elementwise, Recipe, load_recipe
from mxlab.recipe.mx_specs import injected_options, override
from mxlab.recipe.rule import Rule

EXERCISES = ("activations_only", "baseline", "ex1", "ex2", "kv_only", "weights_only")
FOUR_BITS = tuple(f"{fmt}_w4a4kv4" for fmt in ("mxfp4", "mxint4", "nvfp4"))
CALIBRATED = tuple(f"{plain}{more}" for plain in (*FOUR_BITS, "ex2") for more in ("_gptq", "_best"))
TIERS = ("all_linears", "mlp_only", "tier_a", "tier_b", "tier_c", "tier_d")

formats = st.builds(
    MXFormat,
    element=st.sampled_from([*ELEMENTS, "int5", "fp7_e3m3"]),
    block_size=st.integers(0, 10_000),
    scale_bits=st.integers(0, 8),
    scale_rule=st.sampled_from(["floor", "none"]),  # the other rules are not in all numerics
    rounding=st.sampled_from(ROUNDINGS),
    flush_fp32_subnorms=st.booleans(),
)
patterns = st.one_of(
    st.sampled_from([r".*\.(q|k)_proj", "lm_head", r'"\\"', "", "'''", "é☃\t", r"[\"'\]]*"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\\[](){}*+?|^$"), max_size=20),
)
optional = st.none() | formats
rules = st.one_of(
    st.builds(Rule, modules=patterns, weight=formats, activation=optional),
    st.builds(Rule, modules=patterns, k=optional, v=formats),
)
widths = st.one_of(
    st.tuples(st.sampled_from([0, *range(10, 33)]), st.just(0)), st.tuples(st.just(0), st.sampled_from(range(7, 30)))
)
elementwise = st.builds(
    lambda width, **more: Elementwise(*width, **more),
    width=widths,
    subnormals=st.booleans(),
    weight_rounding=st.sampled_from(ROUNDINGS),
    output_rounding=st.sampled_from(ROUNDINGS),
)


def _known(numerics: str, rules: tuple[Rule, ...], elementwise: Elementwise, **more) -> Recipe:
    """A recipe whose rules have an effect, and whose numerics know its formats."""
    rules = tuple(rule for rule in rules if rule.formats or elementwise.is_used)
    formats = [f for r in rules for f in r.formats.values()]
    roundings = {elementwise.weight_rounding, elementwise.output_rounding, *(f.rounding for f in formats)}
    plain = all(f.scale == "e8m0" and f.scale_rule in ("floor", "none") for f in formats)
    plain &= roundings <= set(MICROXCALING_ROUNDINGS)
    return Recipe(numerics=numerics if plain else "exact", rules=rules, elementwise=elementwise, **more)


any_recipe = st.builds(
    _known,
    name=st.from_regex(r"\A[a-zA-Z0-9ä][a-zA-Z0-9 ._+=,-]{0,20}\Z"),
    rules=st.lists(rules, max_size=4).map(tuple),
    numerics=st.sampled_from(["exact", "microxcaling"]),
    elementwise=elementwise,
)


# ---- TOML and hash


@given(any_recipe)
def test_toml_round_trip(recipe):
    text = recipe.to_toml()
    assert Recipe.from_toml(text) == recipe
    assert Recipe.from_toml(text).hash == recipe.hash
    assert Recipe.from_dict(tomllib.loads(text)).to_toml() == text


@given(any_recipe, st.from_regex(r"\A[a-z][a-z0-9]*\Z"))
def test_the_name_is_not_in_the_hash(recipe, name):
    assert replace(recipe, name=name).hash == recipe.hash
    assert len(recipe.hash) == 16


@given(any_recipe, any_recipe)
def test_two_recipes_share_a_hash_only_if_they_are_alike_but_for_the_name(one, other):
    assert (one.hash == other.hash) == (replace(one, name="x") == replace(other, name="x"))


def test_everything_but_the_name_is_in_the_hash():
    base = load_recipe("ex2")
    linear, attention = base.rules
    fmt = linear.weight
    assert fmt is not None
    changed_formats = [
        MXFormat("int8"),
        *(replace(fmt, **change) for change in ({"block_size": 16}, {"scale_bits": 6}, {"scale_rule": "none"})),
        *(replace(fmt, **change) for change in ({"rounding": "even"}, {"flush_fp32_subnorms": True})),
    ]
    variants = [
        base,
        replace(base, numerics="microxcaling"),
        replace(base, rules=(linear,)),
        replace(base, rules=(attention, linear)),
        replace(base, rules=(*base.rules, linear)),
        replace(base, rules=(replace(linear, modules="x"), attention)),
        replace(base, rules=(linear, replace(attention, v=None))),
        replace(base, rules=(linear, replace(attention, k=None))),
        replace(base, rules=(replace(linear, activation=None), attention)),
        *(replace(base, rules=(replace(linear, weight=f), attention)) for f in changed_formats),
        *(replace(base, elementwise=Elementwise(fp=16)), replace(base, elementwise=Elementwise(bfloat=12))),
        *(replace(base, elementwise=replace(base.elementwise, **{f: "even"})) for f in ("weight_rounding",)),
        replace(base, elementwise=replace(base.elementwise, output_rounding="even")),
        replace(base, elementwise=replace(base.elementwise, subnormals=False)),
    ]
    assert len({v.hash for v in variants}) == len(variants)


def test_the_hash_is_the_same_tomorrow():
    """Finished runs are found by it: a change makes every sweep start again."""
    assert load_recipe("ex1").hash == Recipe.from_toml(load_recipe("ex1").to_toml()).hash
    assert Recipe("a").hash == Recipe("b").hash == "22af7e435e6c0922"


# ---- injected operators


def test_injected_options():
    recipe = load_recipe("injected")
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert recipe.quantizes
    assert recipe.options == {"block_size": 32, "scale_bits": 8, "custom_cuda": True}
    changed = override(recipe, {"block_size": 16, "custom_cuda": False, "softmax_exp2": True})
    assert injected_options(changed) == {**recipe.inject, "block_size": 16, "softmax_exp2": True, "custom_cuda": False}
    assert len({recipe.hash, changed.hash, Recipe("baseline").hash}) == 3


@pytest.mark.parametrize(
    ("inject", "message"),
    [
        ({"blocksize": 32}, "recipe r, inject: unknown option 'blocksize'; did you mean 'block_size'"),
        ({"kv_elem_format": "int8"}, "kv_elem_format is not an option of microxcaling's"),
        ({"a_elem_format": "fp9"}, "unknown element format 'fp9'"),
        ({"bfloat": 9}, "bfloat must be 10 to 32"),
        ({"block_size": 32}, "no format, bfloat or fp is given"),
    ],
)
def test_injected_options_that_are_none(inject, message):
    with pytest.raises(SpecError, match=message):
        override(Recipe("r", inject=inject), {})


def test_injected_operators_stand_alone():
    with pytest.raises(SpecError, match="inject replaces every operator: leave out rules"):
        Recipe("r", rules=load_recipe("ex1").rules, inject={"bfloat": 16})
    with pytest.raises(SpecError, match="write numerics instead"):
        Recipe("r", inject={"bfloat": 16, "custom_cuda": True})
    with pytest.raises(SpecError, match=r"f\.toml, \[inject\]: must be a table"):
        Recipe.from_dict({"name": "r", "inject": 16}, "f.toml")


# ---- the shipped ones


def test_the_shipped_recipes():
    assert sorted(path.stem for path in shipped.files("recipe").values()) == sorted(
        (*EXERCISES, *TIERS, *FOUR_BITS, *CALIBRATED, "injected")
    )
    assert all(load_recipe(name).name == name for name in EXERCISES + TIERS + FOUR_BITS + CALIBRATED)
    assert not any(load_recipe(name).takes_calibration for name in EXERCISES + TIERS + FOUR_BITS)
    assert all("gptq" in load_recipe(name).algorithms for name in CALIBRATED)


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("baseline", {}),
        ("ex1", {"weight": "fp4_e2m1@32", "activation": "fp6_e2m3@32"}),
        ("ex2", {"weight": "fp4_e2m1@32", "activation": "fp6_e2m3@32", "k": "fp4_e2m1@32", "v": "fp4_e2m1@32"}),
        ("kv_only", {"k": "fp4_e2m1@32", "v": "fp4_e2m1@32"}),
        ("weights_only", {"weight": "fp4_e2m1@32"}),
        ("activations_only", {"activation": "fp6_e2m3@32"}),
    ],
)
def test_they_do_what_they_say(name, roles):
    recipe = load_recipe(name)
    assert {role: str(fmt) for rule in recipe.rules for role, fmt in rule.formats.items()} == roles
    assert recipe.numerics == "exact"
    assert recipe.elementwise == Elementwise(bfloat=0 if name == "baseline" else 16)
    for rule in recipe.rules:
        for layer in ("", "layers.0.", "model.layers.11."):
            for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
                assert rule.matches(f"{layer}{part}") != rule.is_attention
            assert rule.matches(f"{layer}self_attn") == rule.is_attention
        assert not rule.matches("lm_head")
        assert not rule.matches("model.embed_tokens")


def test_load(tmp_path):
    ex1 = load_recipe("ex1")
    assert load_recipe(ex1) is ex1
    file = tmp_path / "mine.toml"
    file.write_text(replace(ex1, name="mine").to_toml(), encoding="utf-8")
    assert load_recipe(file) == load_recipe(str(file)) == replace(ex1, name="mine")
    assert load_recipe(Path("ex1")) == ex1


def test_options():
    assert load_recipe("baseline").options == {}
    assert load_recipe("ex2").options == {"block_size": 32, "scale_bits": 8, "custom_cuda": True}
    mixed = Recipe("m", (Rule("a", weight=MXFormat("int8", 16), activation=MXFormat("int8", 32)),), "microxcaling")
    assert mixed.options == {"scale_bits": 8, "custom_cuda": False}


# ---- errors


def rule(**values: object) -> str:
    lines = "".join(f"{key} = {value!r}\n" for key, value in values.items())
    return f'name = "mine"\n[[rules]]\n{lines}'


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["mine.toml", "needs a name"]),
        ("name = 5", ["mine.toml", "needs a name"]),
        ("name = ", ["mine.toml is not valid TOML"]),
        ('name = "a"\nname = "b"', ["mine.toml is not valid TOML"]),
        ('name = "a"\nrulez = []', ["mine.toml", "unknown key 'rulez'", "did you mean 'rules'?"]),
        ('name = "a"\nrules = "x"', ["mine.toml", "[[rules]]"]),
        ('name = "a"\nrules = ["x"]', ["mine.toml, rule 1", "modules"]),
        ('name = "a"\nnumerics = "exakt"', ["mine.toml", "numerics is 'exakt'", "did you mean 'exact'?"]),
        ('name = "a"\nelementwise = 5', ["mine.toml, [elementwise]", "table"]),
        (
            'name = "a"\n[elementwise]\nbfloats = 16',
            ["mine.toml, [elementwise]", "'bfloats'", "did you mean 'bfloat'?"],
        ),
        ('name = "a"\n[elementwise]\nbfloat = 9', ["mine.toml", "bfloat is 9"]),
        ('name = "a"\n[elementwise]\nbfloat = "16"', ["mine.toml", "bfloat is '16'"]),
        ('name = "a"\n[elementwise]\nbfloat = 16\nfp = 16', ["mine.toml", "bfloat is 16 and fp is 16"]),
        ('name = "a"\n[elementwise]\nsubnormals = "no"', ["mine.toml", "subnormals is 'no'"]),
        ('name = "a"\n[elementwise]\nsubnormals = 1', ["mine.toml", "subnormals is 1"]),
        ('name = "a"\n[elementwise]\nweight_rounding = "up"', ["mine.toml", "weight_rounding is 'up'"]),
        (rule(weight="int8"), ["mine.toml, rule 1", "modules"]),
        (rule(modules=5), ["mine.toml, rule 1", "modules"]),
        (rule(modules="(", weight="int8"), ["mine.toml, rule 1", "modules = '('", "regular expression"]),
        (rule(modules="x", wieght="int8"), ["mine.toml, rule 1", "unknown key 'wieght'", "did you mean 'weight'?"]),
        (rule(modules="x", weight="int9"), ["mine.toml, rule 1", "'int9'", "known are"]),
        (rule(modules="x", weight="int8@x"), ["mine.toml, rule 1", "block_size is 'x'"]),
        (rule(modules="x", weight="int8@-4"), ["mine.toml, rule 1", "block_size is -4"]),
        (rule(modules="x", weight="int8,scale_bit=6"), ["mine.toml, rule 1", "did you mean 'scale_bits'?"]),
        (rule(modules="x", weight=8), ["mine.toml, rule 1", "8 is not a format"]),
        (rule(modules="x", weight="int8", k="int8"), ["mine.toml, rule 1", "write two rules"]),
        (rule(modules="x") + rule(modules="(")[14:], ["mine.toml, rule 2", "regular expression"]),
        ('name = "../up"', ["mine.toml", "name is '../up'", "folder"]),
        ('name = ""', ["mine.toml", "name is ''"]),
        ('name = ".hidden"', ["mine.toml", "name is '.hidden'"]),
        ('name = "a\\nb"', ["mine.toml", "name is"]),
    ],
)
def test_bad_files(text, parts, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        load_recipe(file)
    for part in parts:
        assert part in str(caught.value), caught.value


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(SpecError, match=r"cannot read .*mine\.toml.*utf-8"):
        load_recipe(tmp_path / "mine.toml")


@pytest.mark.parametrize("name", ["ex3", "no/such.toml", "", "."])
def test_no_such_recipe(name):
    with pytest.raises(SpecError, match=r"give a TOML file or one of activations_only, .*, baseline, ex1"):
        load_recipe(name)


def test_the_nearest_name_is_offered():
    with pytest.raises(SpecError, match="did you mean 'weights_only'"):
        load_recipe("weight_only")


def test_a_recipe_must_be_named_by_a_text():
    with pytest.raises(SpecError, match="recipe is 5"):
        load_recipe(5)  # pyright: ignore[reportArgumentType]


def test_a_rule_names_its_pattern():
    with pytest.raises(SpecError, match=r"modules = 'x' gives formats for a linear layer and for an attention"):
        Rule("x", weight=MXFormat("int8"), v=MXFormat("int8"))


def test_an_optional_bias():
    optional = Rule("x", bias=MXFormat("int8"), bias_optional=True)
    assert Rule.from_dict(optional.to_dict(), "here") == optional
    with pytest.raises(SpecError, match="says bias_optional but gives no format for bias"):
        Rule("x", weight=MXFormat("int8"), bias_optional=True)
    with pytest.raises(SpecError, match="bias_optional is 1: it must be true or false"):
        Rule("x", bias=MXFormat("int8"), bias_optional=1)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "more",
    [{"weight": "fp4@32,rounding=nearest_zero"}, {"elementwise": Elementwise(16, output_rounding="nearest_zero")}],
)
def test_microxcaling_has_no_rounding_of_ties_toward_zero(more):
    rule = Rule(modules=".*", weight=MXFormat.parse(more.pop("weight", "fp4@32")))
    with pytest.raises(SpecError, match=r"nearest_zero.*nearest, even, floor, dither"):
        Recipe("test", (rule,), numerics="microxcaling", **more)
