"""What modules are for: architectures whose names mislead, towers, hybrids; and the page that shows all."""

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import mxlab
from mxlab.errors import ConversionError
from mxlab.model.sites import find_sites
from mxlab.model.structure import Structure
from mxlab.recipe import Recipe, Rule

from support.architectures import IS_OLD, build
from support.paths import ROOT, load_tool

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
CONFIGS = {
    "jamba": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "qwen3_next": {
        **LINEAR,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "olmo_hybrid": LINEAR,
    "minimax": {"head_dim": 8, "layer_types": LINEAR["layer_types"], "num_local_experts": 4, "block_size": 8},
    "longcat_flash": {
        **MLA,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16,
        "num_layers": 1,
        "head_dim": 8,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "deepseek_v32": {
        **MLA,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "index_n_heads": 4,
        "index_head_dim": 16,
        "index_topk": 4,
    },
    "gemma3n_text": {
        "intermediate_size": [48] * 4,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 6,
        "activation_sparsity_pattern": [0.0] * 4,
    },
}


def small(model_type: str):
    """A model of that type with random weights; skips where this transformers lacks it."""
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    config = transformers.CONFIG_MAPPING[model_type](**{**SMALL, **CONFIGS[model_type]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.2)
    return model


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
