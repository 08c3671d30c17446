"""MASE's TOML files: the recipes they become, what they compute, what is noted, and errors that name the remedy."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import mxlab
from mxlab.compat import mase
from mxlab.compat.recipes import load_any_recipe
from mxlab.errors import ConversionError, SpecError
from mxlab.formats import MXFormat
from mxlab.recipe import Recipe
from mxlab.recipe.rule import Rule

from support.architectures import build
from support.paths import ROOT

FILES = Path(__file__).parent / "files"
LAYERS = r"model\.layers\.\d+\."
LINEAR = "weight_block_size = 32\nweight_width = 4\ndata_in_block_size = 32\ndata_in_width = 4\n"
GPTQ = '[gptq]\nmodel_name = "x"\nformat = "mxint"\nweight_config = { weight_block_size = 32, weight_width = 4 }\n'


def mxint(bits: int, block: int) -> MXFormat:
    return MXFormat(f"int{bits}", block, scale_rule="mase_int")


def mxfp(element: str, block: int) -> MXFormat:
    return MXFormat(element, block, rounding="even")


def selector(keys: str, *, name: str = "mxint", modules: str = "a") -> str:
    return f"['{modules}']\nname = \"{name}\"\n{keys}\n"


# ---- tutorial 7

ATTENTION = Rule(rf"{LAYERS}self_attn$", k=mxint(4, 32), v=mxint(4, 32))
PROJECTIONS = tuple(
    Rule(LAYERS + modules, weight=mxint(4, 32), activation=mxint(4, 32))
    for modules in (r"self_attn\.(q|k|v|o)_proj", r"mlp\.(gate|up|down)_proj")
)
TABLES = {
    "gptq": {
        "model_name": "unsloth/Llama-3.2-1B",
        "format": "mxint",
        "dataset": "wikitext2",
        "nsamples": 32,
        "seqlen": 512,
        "cali_batch_size": 8,
        "quantile_search": True,
        "clip_search_y": True,
        "checkpoint_dir": "tutorial_7_output/checkpoints/config_b_gptq",
        "weight_config": {"weight_block_size": 32, "weight_width": 4},
        "modules": [rule.modules for rule in PROJECTIONS],
    },
    "rotation_search": {
        "calib_nsamples": 32,
        "calib_seqlen": 512,
        "improvement_eps": 0.0,
        "cache_path": "tutorial_7_output/checkpoints/config_c_rotsearch/rotation_decisions.json",
    },
}


@pytest.mark.parametrize(
    ("name", "algorithms"),
    [("config_a_rtn", ()), ("config_b_gptq", ("gptq",)), ("config_c_rotsearch", ("gptq", "rotation_search"))],
)
def test_the_files_of_the_tutorial(name, algorithms):
    config = mase.load(FILES / f"{name}.toml")
    expected = {"mase": {algorithm: TABLES[algorithm] for algorithm in algorithms}} if algorithms else {}
    assert config.recipe == Recipe(name, (ATTENTION, *PROJECTIONS), algorithms=expected)
    assert config.notes == ()


@pytest.mark.parametrize(
    ("name", "asked"), [("config_b_gptq", "gptq"), ("config_c_rotsearch", "gptq, rotation_search")]
)
def test_an_algorithm_is_not_left_out_by_mistake(name, asked):
    model = build("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        ConversionError, match=f"asks for MASE's {asked}, which take a calibration text: use mxlab quantize"
    ):
        mxlab.apply(model, FILES / f"{name}.toml")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["config_b_gptq", "config_c_rotsearch"])
def test_what_the_errors_tell_to_take_out_leads_to_rounding_to_nearest(name):
    """As the message of mxlab.apply says: the tables and every gptq = true, or one of the two and an error."""
    text = (FILES / f"{name}.toml").read_text(encoding="utf-8")
    without_tables = re.sub(r"(?ms)^\s*\[(gptq|rotation_search)\b.*?(?=^\s*\[')", "", text)
    with pytest.raises(SpecError, match=r"take gptq = true out"):
        mase.load(without_tables)
    config = mase.load(re.sub(r"(?m)^gptq = true$", "", without_tables))
    assert config.notes == ()
    assert config.recipe == Recipe("mase", (ATTENTION, *PROJECTIONS))
    with pytest.raises(ConversionError, match=r"take the table \[gptq\] and every gptq = true"):
        mxlab.apply(build("llama"), FILES / f"{name}.toml")
    searching = mase.load(selector(LINEAR + "clip_search = true", modules=".*_proj")).recipe
    with pytest.raises(ConversionError, match=r"take every clip_search = true out, to round"):
        mxlab.apply(build("llama"), searching)


# ---- files like PLENA's


def test_mxfp():
    config = mase.load(FILES / "linear_mxfp.toml")
    weight, activation = mxfp("fp4_e2m1", 16), mxfp("fp8_e4m3", 32)
    attention = Rule(
        rf"{LAYERS}self_attn\.(q|k|v|o)_proj", weight=weight, activation=activation, bias=weight, bias_optional=True
    )
    mlp = Rule(rf"{LAYERS}mlp\.(gate|up|down)_proj", weight=weight, activation=activation)
    assert config.recipe == Recipe("linear_mxfp", (attention, mlp))
    assert len(config.notes) == 2
    assert "loses the carry" in config.notes[0]
    assert "bias_... is for the layers that have a bias" in config.notes[1]


def test_all_of_an_attention():
    config = mase.load(FILES / "attention.toml")
    [rule] = config.recipe.rules
    assert {role: str(fmt) for role, fmt in rule.formats.items()} == {
        "k": str(mxint(4, 16)),
        "v": str(mxint(4, 16)),
        "q": str(mxint(8, 16)),
        "p": str(mxint(6, 32)),
        "softmax": "minifloat_ieee,width=12,exponent_bits=5",
        "rope": "minifloat_ieee,width=8,exponent_bits=3",
    }
    assert len(config.notes) == 1
    assert "minifloat_ieee" in config.notes[0]


def test_layer_by_layer():
    config = mase.load(FILES / "by_layer.toml")
    q, kv, w4, w8 = mxfp("fp8_e4m3", 16), mxfp("fp4_e2m1", 16), mxint(4, 16), mxint(8, 16)
    assert config.recipe.rules == (
        Rule(r"model\.layers\.0\.self_attn$", skip=True),
        Rule(rf"{LAYERS}self_attn$", q=q, k=kv, v=kv),
        Rule(r"model\.layers\.0\..*_proj", skip=True),
        Rule(r".*\.down_proj", weight=w8),
        Rule(r"model\..*_proj", weight=w4, activation=w4),
    )
    conversion = mxlab.apply(build("llama", num_hidden_layers=3), config.recipe)
    weights = {site.name: str(site.formats["weight"]) for site in conversion.linears}
    assert len(weights) == 2 * 7
    assert [n for n, fmt in weights.items() if fmt == str(w8)] == [f"model.layers.{i}.mlp.down_proj" for i in (1, 2)]
    assert [site.name for site in conversion.attentions] == [f"model.layers.{i}.self_attn" for i in (1, 2)]


@pytest.mark.parametrize("file", sorted(FILES.glob("*.toml")), ids=lambda file: file.stem)
def test_a_recipe_prints_and_reads_back(file):
    recipe = mase.load(file).recipe
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert recipe.name == file.stem


@pytest.mark.parametrize(("name", "linears", "attentions"), [
    ("config_a_rtn", 14, 2),
    ("linear_mxfp", 14, 0),
    ("attention", 0, 2),
])  # fmt: skip
def test_on_a_tiny_llama(name, linears, attentions):
    model = build("llama")
    ids = torch.arange(1, 25).reshape(2, 12)
    with torch.no_grad():
        before = model(ids).logits
        conversion = mxlab.apply(model, FILES / f"{name}.toml")
        after = model(ids).logits
    assert (len(conversion.linears), len(conversion.attentions)) == (linears, attentions)
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


def test_biases_where_there_are_some():
    """Qwen2 has a bias in q, k and v, not in o; Llama has none."""
    conversion = mxlab.apply(build("qwen2"), FILES / "linear_mxfp.toml")
    with_bias = [site.name for site in conversion.linears if "bias" in site.formats]
    assert with_bias == [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkv"]
    assert not any("bias" in site.formats for site in mxlab.apply(build("llama"), FILES / "linear_mxfp.toml").linears)
    strict = Rule(".*self_attn.*_proj", weight=mxint(4, 16), bias=mxint(4, 16))
    with pytest.raises(
        ConversionError, match=r"has a bias to quantize: take that role out, or add bias_optional = true"
    ):
        mxlab.apply(build("llama"), Recipe("strict", (strict,)))


def test_the_first_file_on_the_embedded_model():
    from mxlab.sources import models

    loaded = models.load_model("smollm2", "bfloat16", "cpu")
    conversion = mxlab.apply(loaded.model, FILES / "config_a_rtn.toml")
    assert (len(conversion.linears), len(conversion.attentions)) == (210, 30)
    ids = loaded.tokenizer("The capital of France is Paris.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.isfinite(loaded.model(ids).logits).all()


def test_a_linear_layer_against_the_formula():
    """MXINT as MASE defines it, in plain float64: E = ceil(log2 amax), B - 1 fraction bits, half to even, clamped."""

    def oracle(x: torch.Tensor, bits: int, block: int) -> torch.Tensor:
        blocks = x.double().reshape(-1, block)
        scale = 2.0 ** blocks.abs().amax(1, keepdim=True).log2().ceil()
        steps = 2 ** (bits - 1)
        q = (blocks / scale * steps).round().clamp(-steps, steps - 1)
        return (q / steps * scale).float().reshape(x.shape)

    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 24), torch.randn(5, 64)
    x[0, :32] = torch.linspace(-4.0, 4.0, 32)  # the largest is a power of two: +4 is clamped, -4 is not
    expected = F.linear(oracle(x, 6, 16), oracle(layer.weight.detach(), 4, 32), layer.bias)
    model = torch.nn.Sequential(layer).eval()
    keys = "weight_block_size = 32\nweight_width = 4\ndata_in_block_size = 16\ndata_in_width = 6"
    mxlab.apply(model, mase.load(f"by = 'name'\n{selector(keys, modules='0')}").recipe)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_the_example_of_the_docs():
    page = (ROOT / "docs" / "mase.md").read_text(encoding="utf-8")
    theirs, ours = re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)
    config = mase.load(theirs)
    assert config.recipe == Recipe.from_toml(ours)
    assert config.notes == ()


# ---- how files are found


def test_load_recognises_a_file(caplog):
    with caplog.at_level(logging.WARNING, logger="mxlab"):
        recipe = load_any_recipe(str(FILES / "linear_mxfp.toml"))
    assert recipe == mase.load(FILES / "linear_mxfp.toml").recipe
    notes = mase.load(FILES / "linear_mxfp.toml").notes
    assert [record.getMessage() for record in caplog.records] == [f"{FILES / 'linear_mxfp.toml'}: {n}" for n in notes]


def test_a_file_that_does_not_say_by(tmp_path):
    file = tmp_path / "_4 bits!.toml"
    file.write_text(selector(LINEAR), encoding="utf-8")
    assert load_any_recipe(file) == Recipe("4 bits_", (Rule("a", weight=mxint(4, 32), activation=mxint(4, 32)),))


@pytest.mark.parametrize(
    "text", ["", "[elementwise]\nbfloat = 16", "numerics = 'exact'", "[a]\nname = 5", "[a]\nname = 'b'"]
)
def test_other_files_are_not_taken_for_one(text, tmp_path):
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    with pytest.raises(SpecError, match=r"needs a name|unknown key"):
        load_any_recipe(tmp_path / "mine.toml")


def test_loading_needs_no_torch_and_our_own_recipes_no_reader():
    code = (
        "import sys; from mxlab.compat.recipes import load_any_recipe; load_any_recipe('ex2');"
        "assert 'mxlab.compat.mase' not in sys.modules;"
        f"load_any_recipe({str(FILES / 'config_a_rtn.toml')!r}); assert 'mxlab.compat.mase.recipe' in sys.modules;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- selectors


def test_by_name_and_by_type():
    named = mase.load("by = 'name'\n" + GPTQ + selector(LINEAR + "gptq = true", modules="model.layers.0.mlp.up_proj"))
    assert named.recipe.rules[0].name == "model.layers.0.mlp.up_proj"
    assert named.recipe.algorithms["mase"]["gptq"]["modules"] == [r"model\.layers\.0\.mlp\.up_proj"]
    typed = mase.load("by = 'type'\n" + GPTQ + selector(LINEAR + "gptq = true", modules="linear"))
    assert typed.recipe.rules == (Rule(type="Linear", weight=mxint(4, 32), activation=mxint(4, 32)),)
    assert typed.recipe.algorithms["mase"]["gptq"]["modules"] == [".*"]
    assert len(mxlab.apply(build("llama"), Recipe("typed", typed.recipe.rules)).linears) == 2 * 7 + 1


@given(st.integers(2, 8), st.integers(1, 512), st.integers(2, 8), st.integers(1, 512))
def test_mxint_formats(bits, block, input_bits, input_block):
    keys = (
        f"weight_block_size = {block}\nweight_width = {bits}\n"
        f"data_in_block_size = {input_block}\ndata_in_width = {input_bits}\n"
    )
    [rule] = mase.load(selector(keys)).recipe.rules
    assert rule == Rule("a", weight=mxint(bits, block), activation=mxint(input_bits, input_block))


@pytest.mark.parametrize(
    ("exponent", "fraction", "element"),
    [
        (4, 3, "fp8_e4m3"),
        (5, 2, "fp8_e5m2"),
        (2, 3, "fp6_e2m3"),
        (3, 2, "fp6_e3m2"),
        (2, 1, "fp4_e2m1"),
        (1, 2, "fp4_e1m2"),
    ],
)
def test_mxfp_formats(exponent, fraction, element):
    keys = f"weight_block_size = 8\nweight_exponent_width = {exponent}\nweight_frac_width = {fraction}"
    assert mase.load(selector(keys, name="mxfp")).recipe.rules == (Rule("a", weight=mxfp(element, 8)),)


def older(**keys: object) -> str:
    """The same keys for weight, input and bias."""
    return "".join(f"{prefix}_{k} = {v!r}\n" for prefix in ("weight", "data_in", "bias") for k, v in keys.items())


@pytest.mark.parametrize(
    ("name", "keys", "text"),
    [
        ("integer", {"width": 8, "frac_width": 4}, "integer,width=8,frac=4"),
        ("fixed", {"width": 4, "frac_width": -1}, "integer,width=4,frac=-1"),
        ("minifloat", {"exponent_width": 3, "frac_width": 4}, "minifloat_ieee,width=8,exponent_bits=3"),
        ("minifloat_ieee", {"width": 8, "exponent_width": 4}, "minifloat_ieee,width=8,exponent_bits=4"),
        (
            "minifloat_denorm",
            {"width": 8, "exponent_width": 4, "exponent_bias": 9},
            "minifloat_denorm,width=8,exponent_bits=4,bias=9",
        ),
        ("log", {"width": 8, "exponent_bias": 10}, "log,width=8,bias=10"),
        (
            "block_fp",
            {"width": 7, "exponent_width": 8, "exponent_bias": 120, "block_size": [1, 16]},
            "block_fp@16,width=7,bias=120",
        ),
        (
            "block_minifloat",
            {"width": 5, "exponent_width": 2, "exponent_bias_width": 6, "block_size": [16]},
            "block_minifloat@16,width=5,exponent_bits=2,bias_bits=6",
        ),
        ("block_log", {"width": 5, "exponent_bias_width": 6, "block_size": 4}, "block_log@4,width=5,bias_bits=6"),
    ],
)
def test_the_older_quantizers(name, keys, text):
    roles = ("weight", "activation") if name == "minifloat" else ("weight", "activation", "bias")
    [rule] = mase.load(selector(older(**keys), name=name)).recipe.rules
    assert {role: str(fmt) for role, fmt in rule.formats.items()} == dict.fromkeys(roles, text)
    assert rule.bias_optional == ("bias" in roles)


def test_older_quantizers_on_a_model():
    keys = {"width": 8, "frac_width": 6}
    config = mase.load("by = 'type'\n" + selector(older(**keys), name="integer", modules="linear"))
    model = build("opt")
    conversion = mxlab.apply(model, config.recipe)
    text = "integer,width=8,frac=6"
    layer = next(site for site in conversion.linears if site.name.endswith("layers.0.fc1"))
    assert {role: str(fmt) for role, fmt in layer.formats.items()} == dict.fromkeys(
        ("weight", "activation", "bias"), text
    )
    weight = layer.weight.detach()
    assert torch.equal(weight, (weight * 64).round().clamp(-128, 127) / 64)
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(1, 9)[None]).logits).all()


def test_outputs_of_integer_layers():
    keys = older(width=8, frac_width=4) + "data_out_width = 16\ndata_out_frac_width = 8"
    [rule] = mase.load(selector(keys, name="integer")).recipe.rules
    assert str(rule.output) == "integer,width=16,frac=8"


# ---- notes

BYPASSED = "qk_matmul.bypass = true\nav_matmul.bypass = true\nkv_cache.bypass = true"
KV = "kv_cache = { data_in_block_size = 32, data_in_width = 4 }\n"


@pytest.mark.parametrize(
    ("text", "note", "rules"),
    [
        (selector(BYPASSED), "selector 'a': no sub-table gives a format", []),
        (selector(LINEAR + "weight_frac_width = 1"), "selector 'a': weight_frac_width is not read", None),
        (selector(LINEAR + "clip_serch = true"), "clip_serch is not read; did you mean 'clip_search'?", None),
        (selector(LINEAR + "data_out_width = 8"), "selector 'a': data_out_width is not read", None),
        (selector(LINEAR + "bias_width = 8"), "bias_block_size is missing, without which bias is not quantized", None),
        (
            selector("weight_block_size = 32\nweight_width = 4\ndata_in_width = 4"),
            "data_in_block_size is missing, without which data_in is not quantized, as in MASE",
            [{"weight": mxint(4, 32)}],
        ),
        (selector(KV + "data_in_width = 4"), "selector 'a': data_in_width is not read", [{"k": mxint(4, 32)}]),
        (selector(KV + "kv_cash.bypass = false"), "the sub-table kv_cash is not read; did you mean 'kv_cache'?", None),
        (selector(KV.replace(" }", ", weight_width = 4 }")), "kv_cache.weight_width is not read", None),
        (selector(KV.replace(" }", ", rotate = true }")), "kv_cache.rotate is not read", None),
        (selector(KV + "bypass = true"), "bypass = true does not hold for the sub-tables that", [{"v": mxint(4, 32)}]),
        (
            selector(KV + "rope = { data_in_block_size = 8, data_in_width = 8 }"),
            "rope is read as mxint; MASE wants a minifloat there",
            [{"rope": mxint(8, 8)}],
        ),
        (
            selector(LINEAR, modules="^x.*") + selector(LINEAR, modules="x.*$"),
            "selector 'x.*$' is not read: '^x.*' chooses the same modules, and comes first",
            [{"modules": "^x.*"}],
        ),
        (
            selector(LINEAR, modules=r"x\$") + selector(LINEAR, modules="x"),
            None,
            [{"modules": r"x\$"}, {"modules": "x"}],
        ),
        ("report = true\n" + selector(LINEAR), "report = True is not read", None),
        ("[default]\nname = 'integer'\n" + selector(LINEAR), "[default] is not read: MASE's pass over modules", None),
        ("[token_collector]\nseqlen = 8\n" + selector(LINEAR), "[token_collector] is not read", None),
        # [gptq] and clip_search
        (GPTQ + selector("gptq = true"), None, [{"weight": mxint(4, 32)}]),
        (
            GPTQ + selector(LINEAR.replace("4", "8") + "gptq = true"),
            "its weights are int8@32,scale_rule=mase_int, those of [gptq] int4@32,scale_rule=mase_int: MASE goes by",
            [{"weight": mxint(4, 32), "activation": mxint(8, 32)}],
        ),
        (
            GPTQ + selector(LINEAR) + selector(LINEAR + "gptq = true", modules="b"),
            "selector 'a': it does not say gptq = true. MASE would round the weights that [gptq] makes a second time",
            None,
        ),
        (GPTQ + selector(LINEAR), "[gptq] is for no selector", None),
        (GPTQ + "nsample = 4\n" + selector(LINEAR), "[gptq]: nsample is not known, and kept; did you mean", None),
        (
            GPTQ.replace("4 }", "4, weight_frac_width = 1, data_in_width = 2 }") + selector("gptq = true"),
            "[gptq.weight_config]: weight_frac_width is not read",
            None,
        ),
        ("[rotation_search]\neps = 0.0\n" + selector(LINEAR), "[rotation_search]: eps is not known, and kept", None),
        (GPTQ + selector("gptq = true\nclip_search = true"), "clip_search is not read where gptq = true", None),
    ],
)  # fmt: skip
def test_notes(text, note, rules):
    config = mase.load(text)
    assert any(note in found for found in config.notes) if note else config.notes == (), config.notes
    if rules is not None:
        for rule, expected in zip(config.recipe.rules, rules, strict=True):
            assert {key: getattr(rule, key) for key in expected} == expected
    assert Recipe.from_toml(config.recipe.to_toml()) == config.recipe


@pytest.mark.parametrize(("width", "notes"), [(4, 1), (6, 2)])
def test_a_width_that_its_parts_contradict(width, notes):
    keys = f"weight_block_size = 8\nweight_exponent_width = 2\nweight_frac_width = 1\nweight_width = {width}"
    config = mase.load(selector(keys, name="mxfp"))
    assert config.recipe.rules == (Rule("a", weight=mxfp("fp4_e2m1", 8)),)
    assert len(config.notes) == notes
    assert notes == 1 or "weight_width is 6: exponent, fraction and sign make 4, which counts" in config.notes[0]


def test_clip_search_is_asked_for_as_an_algorithm():
    config = mase.load(selector(LINEAR + "clip_search = true"))
    assert config.recipe.algorithms == {"mase": {"clip_search": {"modules": ["a"]}}}
    with pytest.raises(ConversionError, match="asks for MASE's clip_search, which take a calibration text"):
        mxlab.apply(build("llama"), config.recipe)
    keys = "weight_block_size = 8\nweight_exponent_width = 2\nweight_frac_width = 1\nclip_search = true"
    config = mase.load(selector(keys, name="mxfp"))
    assert not config.recipe.algorithms
    assert "selector 'a': clip_search is not read: MASE searches for mxint only" in config.notes


def test_unknown_keys_of_the_algorithms_are_kept():
    config = mase.load(GPTQ + "mine = [1, 2]\n" + selector(LINEAR + "gptq = true"))
    assert config.recipe.algorithms["mase"]["gptq"]["mine"] == [1, 2]


def test_a_bypassed_selector_shields_its_modules():
    """The first that matches wins, in MASE as here: what a later selector says is not for them."""
    text = selector(BYPASSED, modules=r".*\.0\.self_attn") + selector(KV, modules=r".*\.self_attn")
    conversion = mxlab.apply(build("llama"), mase.load(text).recipe)
    assert [site.name for site in conversion.attentions] == ["model.layers.1.self_attn"]


# ---- errors


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("by = 'regex'\n", ["by is 'regex'", "regex_name, name, type", "did you mean 'regex_name'?"]),
        ("by = \n", ["MASE file is not valid TOML"]),
        (selector(LINEAR, modules="("), ["selector '('", "regular expression"]),
        ("by = 'type'\n" + selector("", modules="conv2d"), ["selector 'conv2d'", "weight_block_size is missing"]),
        ("by = 'type'\n" + selector(LINEAR, modules="conv2d"), ["selector 'conv2d'", "by type, mxlab has linear"]),
        ("by = 'type'\n" + selector(KV, modules="linear"), ["selector 'linear'", "without sub-tables"]),
        ("by = 'name'\n[a.b]\nname = 'mxint'", ["selector 'a'", "no name", "Quote a selector with dots"]),
        (selector(LINEAR, name="mxitn"), ["selector 'a'", "name is 'mxitn'", "did you mean 'mxint'?"]),
        ("by = 'name'\n[a]\nname = []\n", ["selector 'a'", "name is []"]),
        (selector(LINEAR, name="ternary"), ["name is 'ternary'", "write a recipe"]),
        (selector(LINEAR, name="mxint_rotate"), ["rotations", 'write name = \'mxint\'']),
        ("[rotation]\nonline_rotate = true\n" + selector(LINEAR), ["[rotation]", "take the table out"]),
        (selector(""), ["selector 'a'", "weight_block_size is missing; write weight_block_size, weight_width"]),
        (selector("weight_block_size = 32"), ["selector 'a'", "weight_width is missing"]),
        (selector(LINEAR.replace("4", "16")), ["selector 'a'", "weight_width is 16", "2 to 8"]),
        (selector(LINEAR.replace("4", "true")), ["selector 'a'", "weight_width is True"]),
        (selector(LINEAR.replace("4", "'4'")), ["selector 'a'", "weight_width is '4'"]),
        (selector(LINEAR.replace("32", "0")), ["selector 'a'", "weight_block_size is 0"]),
        (selector(LINEAR.replace("32", "[16, 16]")), ["selector 'a'", "weight_block_size is [16, 16]", "[1, 16]"]),
        (selector(LINEAR + "bypass = 1"), ["selector 'a'", "bypass is 1", "true or false"]),
        (selector(LINEAR + "gptq = 'yes'"), ["selector 'a'", "gptq is 'yes'"]),
        (selector(LINEAR + "gptq = true"), ["selector 'a'", "[gptq], which is not there", "take gptq = true out"]),
        (selector("gptq = true"), ["selector 'a'", "would stay unquantized"]),
        (selector(LINEAR + KV), ["selector 'a'", "the sub-table 'kv_cache' is for an attention"]),
        (selector(KV, name="integer"), ["selector 'a'", "mxint or mxfp"]),
        (selector("kv_cache = {}"), ["selector 'a', kv_cache", "data_in_block_size is missing"]),
        (selector("softmax = { data_in_frac_width = 4 }"), ["'a', softmax", "data_in_exponent_width is missing"]),
        (selector("kv_cache = { bypass = 'no' }"), ["selector 'a', kv_cache", "bypass is 'no'"]),
        (selector(f"decode = {{ {KV.strip()} }}"), ["selector 'a', decode", "rules of a recipe"]),
        (
            selector("weight_block_size = 8\nweight_exponent_width = 3\nweight_frac_width = 3", name="mxfp"),
            ["selector 'a'", "exponent_width and frac_width are 3 and 3", "4 and 3"],
        ),
        (
            selector("data_in_exponent_width = 3\ndata_in_frac_width = 4", name="mxfp"),
            ["weight_block_size is missing", "weight_exponent_width"],
        ),
        (selector("weight_width = 8\nweight_frac_width = 4", name="integer"), ["data_in_width is missing"]),
        (selector(older(width=40, frac_width=4), name="integer"), ["selector 'a'", "width is 40"]),
        ("gptq = true\n" + selector(LINEAR), ["gptq is True", "must be a table"]),
        ("[gptq]\nformat = 'mxint'\n" + selector(LINEAR), ["[gptq]", "weight_config"]),
        (GPTQ.replace("mxint", "int") + selector(LINEAR), ["[gptq]", 'format = "mxint" or "mxfp"']),
        (GPTQ.replace("weight_width", "width") + selector(LINEAR), ["weight_config: weight_width is missing"]),
        (GPTQ + "modules = []\n" + selector(LINEAR), ["[gptq]", "modules", "take it out"]),
        (
            "[rotation_search]\nmatmul_types = ['q_prj']\n" + selector(LINEAR),
            ["[rotation_search]", "'q_prj'", "did you mean 'q_proj'?"],
        ),
        ("[rotation_search]\nmatmul_types = 'q_proj'\n" + selector(LINEAR), ["matmul_types has 'q_proj'"]),
    ],
)  # fmt: skip
def test_errors(text, parts):
    with pytest.raises(SpecError) as caught:
        mase.load(text)
    for part in parts:
        assert part in str(caught.value), caught.value


def test_a_selector_that_matches_nothing():
    with pytest.raises(ConversionError, match=r"modules = 'nothing' matches no module of LlamaForCausalLM"):
        mxlab.apply(build("llama"), mase.load(selector(LINEAR, modules="nothing")).recipe)


def test_a_norm_is_no_linear_layer():
    text = selector(LINEAR, modules=r".*input_layernorm")
    with pytest.raises(ConversionError, match=r"input_layernorm is a LlamaRMSNorm: only torch\.nn\.Linear"):
        mxlab.apply(build("llama"), mase.load(text).recipe)


def test_a_missing_file():
    with pytest.raises(SpecError, match=r"cannot read nowhere\.toml"):
        mase.load("nowhere.toml")
