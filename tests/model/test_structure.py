"""What modules are for: architectures whose names mislead, towers, hybrids; and the page that shows all."""

import copy

import pytest
import transformers

import mxlab
from mxlab.errors import ConversionError
from mxlab.model.sites import find_sites
from mxlab.model.structure import Structure
from mxlab.recipe import Recipe, Rule

from support.architectures import IS_OLD, build
from support.hybrids import SMALL, small
from support.paths import ROOT, load_tool


def parts(model) -> dict[str, str]:
    return {site.name: site.part for site in find_sites(model)}


def chosen(model, **rule) -> list[str]:
    return [site.name for site in mxlab.apply(copy.deepcopy(model), Recipe("test", (Rule(**rule),))).sites]


FP4 = mxlab.MXFormat.parse("fp4_e2m1@8")


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        # The decoder layer's class has Attention in its name.
        ("jamba", {"feed_forward": {"mlp", "router"}, "mamba": {"mixer"}, "self_attn": {"attention"}}),
        ("olmo_hybrid", {".mlp.": {"mlp"}, "linear_attn": {"mixer"}, "self_attn": {"attention"}}),
        ("qwen3_next", {".mlp.": {"mlp", "router"}, "linear_attn": {"mixer"}, "self_attn": {"attention"}}),
        # The linear attention of the first layer is called as the other's attention.
        ("minimax", {"0.self_attn": {"mixer"}, "1.self_attn": {"attention"}}),
        # Two attentions a layer, in a list; no Attention in their class's name.
        ("longcat_flash", {"self_attn": {"attention"}, ".mlps.": {"mlp"}, ".router": {"router"}}),
        ("deepseek_v32", {"self_attn": {"attention"}, "indexer": {"attention"}, ".mlp.": {"mlp", "router"}}),
        ("gemma3n_text", {"altup_projections": {"head"}, "self_attn": {"attention"}, ".mlp.": {"mlp"}}),
    ],
)
def test_parts(model_type, expected):
    found = parts(small(model_type))
    for piece, wanted in expected.items():
        assert {part for name, part in found.items() if piece in name} == wanted, piece


def test_a_router_is_what_has_an_output_for_each_expert():
    model = small("jamba")
    routers = [name for name, part in parts(model).items() if part == "router"]
    assert routers == ["model.layers.1.feed_forward.router"]
    experts = model.get_submodule("model.layers.1.feed_forward")
    experts.router_by_another_name = experts.router
    del experts.router
    assert [n for n, p in parts(model).items() if p == "router"] == [
        "model.layers.1.feed_forward.router_by_another_name"
    ]


def test_the_mlps_of_a_hybrid_are_quantized_and_its_mixers_are_not():
    conversion = mxlab.apply(small("olmo_hybrid"), "mlp_only")
    assert [s.name.split(".")[3] for s in conversion.sites] == ["mlp"] * 6
    assert {
        s.name.split(".")[3]
        for s in mxlab.apply(small("olmo_hybrid"), Recipe("t", (Rule(part="mixer", weight=FP4),))).sites
    } == {"linear_attn"}


def test_a_linear_attention_has_no_k_to_quantize():
    model = small("olmo_hybrid")
    attentions = [site.name for site in find_sites(model) if site.kind == "attention"]
    assert attentions == ["model.layers.1.self_attn"]
    with pytest.raises(ConversionError, match=r"model\.layers\.0\.linear_attn .*hands no K and V"):
        mxlab.apply(model, Recipe("test", (Rule(name="model.layers.0.linear_attn", k=FP4),)))


def test_layers_are_the_decoders_own():
    """Gemma3n has a list of three projections beside its layers."""
    model = small("gemma3n_text")
    assert Structure(model).layer_count == 4
    assert all(name.startswith("model.layers.0.") for name in chosen(model, part="mlp", layers="0", weight=FP4))


@pytest.mark.skipif(IS_OLD, reason="transformers 4 configures Qwen2-VL otherwise")
def test_towers_have_no_decoder_layers():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 4, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(
        text_config={**SMALL, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=7,
    )
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    last = chosen(model, part="mlp", layers="-1", weight=FP4)
    assert [name.split("layers.")[1] for name in last] == [f"1.mlp.{x}_proj" for x in ("gate", "up", "down")]
    visual = [name for name, part in parts(model).items() if part == "vision"]
    assert visual
    assert all(".visual." in name for name in visual)
    assert set(chosen(model, part="vision", weight=FP4)) == set(visual)
    assert not set(visual) & set(chosen(model, part="mlp", weight=FP4))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral"])
def test_every_site_has_the_layer_of_its_number(name):
    model = build(name)
    for site in find_sites(model):
        numbers = [int(part) for part in site.name.split(".") if part.isdecimal()]
        assert site.layer == (numbers[0] if numbers else None)


def test_the_page_shows_what_the_code_finds():
    page = (ROOT / "docs" / "parts.md").read_text(encoding="utf-8")
    if f"transformers {transformers.__version__};" not in page:
        pytest.skip("the page was made with another transformers")
    assert load_tool("docs/parts_table").page() == page


# ---- adapters


@pytest.fixture
def adapted():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    return peft.get_peft_model(build("llama"), config).eval()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # between PEFT and transformers
def test_adapters_are_no_sites_of_part_rules(adapted):
    """What was adapted is: it keeps its part, its layer, and the name that the recipes know."""
    found = chosen(adapted, part="all", weight=FP4)
    assert len(found) == len(chosen(build("llama"), part="all", weight=FP4))
    assert not any("lora_" in name for name in found)
    assert {site.layer for site in find_sites(adapted) if ".q_proj.base_layer" in site.name} == {0, 1}
    assert len(chosen(adapted, modules=r".*\.(q|up)_proj", weight=FP4)) == 4
    assert len(chosen(adapted, modules=r".*lora_A\.default", weight=FP4)) == 4


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_recipe_of_patterns_fits_an_adapted_model(adapted):
    assert len(mxlab.apply(adapted, "ex1").linears) == len(mxlab.apply(build("llama"), "ex1").linears)
