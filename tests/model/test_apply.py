"""mxlab.apply: what it replaces, what it reports, and that a refusal leaves the model as it was."""

import copy
import json
from dataclasses import replace
from types import MethodType

import pytest
import torch
from torch import nn

import mxlab
from mxlab.errors import ConversionError, SpecError
from mxlab.model.apply import prepare
from mxlab.model.nn.linear import MxLinear
from mxlab.recipe import Elementwise

from support.llama import in_patched, specs, tiny, tokens

FP4 = mxlab.MXFormat("fp4_e2m1")
FP6 = mxlab.MXFormat("fp6_e2m3")
LINEARS = mxlab.Rule(r".*\.[qkv]_proj", weight=FP4, activation=FP6)
KV = mxlab.Rule(r".*self_attn", k=FP4, v=FP6)


class Attention(nn.Module):
    """One head of 24 elements, two query heads sharing it."""

    head_dim = 24

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(40, 48, bias=False)
        self.k_proj = nn.Linear(40, 24)
        self.v_proj = nn.Linear(40, 24)

    def forward(self, x, past_key_values=None):
        q, k, v = self.q_proj(x).unflatten(-1, (2, 24)).transpose(1, 2), self.k_proj(x), self.v_proj(x)
        k, v = k[:, None], v[:, None]
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, 0)
        return (q @ k.mT).softmax(-1) @ v


class Toy(nn.Module):
    """An embedding tied to its output layer, two attentions, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 40)
        self.blocks = nn.ModuleList(nn.ModuleDict({"self_attn": Attention()}) for _ in range(2))
        self.conv = nn.Conv1d(4, 4, 1)
        self.lm_head = nn.Linear(40, 10, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return sum(block["self_attn"](x).mean(1) for block in self.blocks)


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(8).reshape(2, 4)


def recipe(*rules: mxlab.Rule, **more) -> mxlab.Recipe:
    return mxlab.Recipe("test", rules, **more)


def run(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids)


def description(model: nn.Module) -> list:
    """All that a conversion changes: classes, hooks, attributes, weights."""
    weights = [(n, v.clone()) for n, v in model.state_dict().items()]
    modules = [(n, type(m), len(m._forward_pre_hooks), sorted(vars(m))) for n, m in model.named_modules()]
    return [repr(modules), *(repr((n, v.tolist())) for n, v in weights)]


# ---- what is refused


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([mxlab.Rule("nothing", weight=FP4)], r"the rule for modules = 'nothing' matches no module of Toy.*q_proj"),
        (
            [LINEARS, mxlab.Rule(r".*\.q_proj", weight=FP6)],
            r"matches no module of Toy, or only such as an earlier rule",
        ),
        ([LINEARS, mxlab.Rule("conv", weight=FP4)], r"conv is a Conv1d: only torch\.nn\.Linear"),
        ([LINEARS, mxlab.Rule(r"blocks\.1", weight=FP4)], r"blocks\.1 is a ModuleDict: only"),
        (
            [LINEARS, KV, mxlab.Rule("embed", k=FP4)],
            "embed is a Embedding, whose forward hands no K and V to a past_key_values",
        ),
    ],
    ids=["no match", "taken by an earlier rule", "convolution", "container", "no attention"],
)
def test_a_refusal_leaves_the_model_as_it_was(toy, rules, message):
    before = description(toy)
    with pytest.raises(ConversionError, match=message):
        mxlab.apply(toy, recipe(*rules))
    assert description(toy) == before


def test_a_tied_layer_may_quantize_its_input(toy):
    mxlab.apply(toy, recipe(mxlab.Rule("lm_head", activation=FP6)))
    assert toy.lm_head.weight is toy.embed.weight


@pytest.mark.parametrize("rule", [LINEARS, KV], ids=["linear", "kv"])
def test_converting_twice_is_refused(toy, ids, rule):
    mxlab.apply(toy, recipe(rule))
    expected, before = run(toy, ids), description(toy)
    with pytest.raises(ConversionError, match=r"quantized already.*not both"):
        mxlab.apply(toy, recipe(LINEARS, KV))
    assert description(toy) == before
    assert torch.equal(run(toy, ids), expected)


def test_an_unknown_recipe(toy):
    with pytest.raises(SpecError, match=r"no recipe 'ex3'.*did you mean"):
        mxlab.apply(toy, "ex3")


def test_a_model_with_another_layer_behind_the_name():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(8, 8))
    with pytest.raises(ConversionError, match="0 is a Scaled"):
        mxlab.apply(model, recipe(mxlab.Rule("0", weight=FP4)))


# ---- what is done


def test_linear_layers_and_kv_are_quantized(toy, ids):
    raw = copy.deepcopy(toy)
    conversion = mxlab.apply(toy, recipe(LINEARS, KV))
    assert [type(m) for m in toy.modules()].count(MxLinear) == 6
    for site in conversion.linears:
        original = raw.get_submodule(site.name).weight
        assert torch.equal(site.module.weight, mxlab.quantize(original, FP4))
    expected = 0
    x = raw.embed(ids)
    for block, converted in zip(raw.blocks, toy.blocks, strict=True):
        a, b = block["self_attn"], converted["self_attn"]
        q, k, v = (
            nn.functional.linear(mxlab.quantize(x, FP6), getattr(b, n).weight, getattr(a, n).bias)
            for n in ("q_proj", "k_proj", "v_proj")
        )
        q = q.unflatten(-1, (2, 24)).transpose(1, 2)
        k, v = mxlab.quantize(k, FP4)[:, None], mxlab.quantize(v, FP6)[:, None]
        expected = expected + ((q @ k.mT).softmax(-1) @ v).mean(1)
    assert torch.allclose(run(toy, ids), expected, atol=1e-6)


def test_a_recipe_without_rules_changes_nothing(toy):
    before = description(toy)
    conversion = mxlab.apply(toy, "baseline")
    assert description(toy) == before
    assert conversion.summary() == "recipe baseline: nothing is quantized"
    assert conversion.bits_per_parameter == 32


def test_prepare_touches_no_weight(toy):
    before = {n: v.clone() for n, v in toy.state_dict().items()}
    conversion = prepare(toy, recipe(LINEARS))
    assert all(torch.equal(p, before[n]) for n, p in toy.named_parameters())
    assert not any(site.module.is_frozen for site in conversion.linears)


def test_bits_per_parameter(toy):
    conversion = mxlab.apply(toy, recipe(LINEARS, KV))
    rows = 2 * (48 + 24 + 24)
    quantized = rows * (40 * 4 + 2 * 8)  # an axis of 40 has two blocks of 32, the second not full
    # embed, which lm_head shares, the biases of k and v, the convolution: float32
    others = (10 * 40 + 2 * 2 * 24 + 4 * 4 + 4) * 32
    parameters = rows * 40 + others // 32
    assert conversion.bits_per_parameter == pytest.approx((quantized + others) / parameters, rel=1e-12)


@pytest.mark.parametrize(
    ("fmt", "bits_per_row"),
    [
        ("int8@16", 40 * 8 + 3 * 8),
        ("int8@0", 40 * 8 + 8),
        ("fp6_e2m3@8,scale_bits=6", 40 * 6 + 5 * 6),
        ("fp4@32,scale_rule=none", 40 * (4 + 8)),
    ],
)
def test_bits_per_parameter_of_other_formats(fmt, bits_per_row):
    model = nn.Sequential(nn.Linear(40, 3, bias=False))
    conversion = mxlab.apply(model, recipe(mxlab.Rule("0", weight=mxlab.MXFormat.parse(fmt))))
    assert conversion.bits_per_parameter == pytest.approx(bits_per_row / 40)


def test_summary(toy):
    uneven = "{} of {}: the axis of {} is not a multiple of the block size 32; its last block has {} elements"
    assert mxlab.apply(toy, recipe(LINEARS, KV)).summary() == "; ".join(
        [
            "recipe test: 6 linear layers (weight fp4_e2m1@32, activation fp6_e2m3@32)",
            "2 attentions (k fp4_e2m1@32, v fp6_e2m3@32)",
            "exact numerics",
            "left in high precision: lm_head",
            uneven.format("k", "2 attentions", 24, 24),
            uneven.format("v", "2 attentions", 24, 24),
            uneven.format("weight", "6 linears", 40, 8),
            uneven.format("activation", "6 linears", 40, 8),
        ]
    )


def test_the_summary_of_several_formats(toy):
    first = mxlab.Rule(r"blocks\.0\..*\.q_proj", weight=mxlab.MXFormat("int8", 8))
    conversion = mxlab.apply(toy, recipe(first, LINEARS, numerics="microxcaling"))
    assert "1 linear layer (weight int8@8); 5 linear layers (weight fp4_e2m1@32" in conversion.summary()
    assert "KV not quantized; microxcaling numerics" in conversion.summary()


def test_inventory(toy):
    inventory = mxlab.apply(toy, recipe(LINEARS, KV)).inventory()
    assert json.loads(json.dumps(inventory)) == inventory
    assert mxlab.Recipe.from_dict(inventory["recipe"]) == recipe(LINEARS, KV)
    assert inventory["hash"] == recipe(LINEARS, KV).hash
    assert (inventory["linear_layers"], inventory["attentions"]) == (6, 2)
    assert inventory["linear_layers_in_high_precision"] == ["lm_head"]
    assert inventory["sites"][0] == {
        "module": "blocks.0.self_attn",
        "kind": "attention",
        "shape": [1, 24],
        "formats": {"k": "fp4_e2m1@32", "v": "fp6_e2m3@32"},
        "bits_per_element": {"k": 4.25, "v": 6.25},
        "acted": [],
    }
    assert inventory["sites"][1] == {
        "module": "blocks.0.self_attn.q_proj",
        "kind": "linear",
        "shape": [48, 40],
        "formats": {"weight": "fp4_e2m1@32", "activation": "fp6_e2m3@32"},
        "bits_per_element": {"weight": 4.25, "activation": 6.25},
        "acted": [],
    }


def test_clamped_scales_are_counted_before_the_weights_are_quantized():
    """On the grid, a clamped block may be all zeros, and one that overflowed is NaN."""
    linear = nn.Linear(64, 3, bias=False).eval()
    with torch.no_grad():
        linear.weight.fill_(1.0)
        linear.weight[0, :32] = 2.0**-20  # wants 2^-22, gets 2^-7
        linear.weight[1, :32] = 2.0**20
        linear.weight[2] = 0.0
    fmt = mxlab.MXFormat("fp4", scale_bits=4)
    conversion = mxlab.apply(nn.Sequential(linear), recipe(mxlab.Rule("0", weight=fmt)))
    assert conversion.weight_clamps == {"blocks": 4, "clamped": 1, "overflowed": 1}
    assert not linear.weight[0, :32].any()
    assert linear.weight[1, :32].isnan().all()


def test_a_model_in_training_keeps_its_weights(toy, ids):
    before = {n: v.clone() for n, v in toy.state_dict().items()}
    mxlab.apply(toy.train(), recipe(LINEARS))
    toy(ids).sum().backward()
    assert all(torch.equal(p, before[n]) for n, p in toy.named_parameters())


# ---- layers that other code has hooked


def hooked(model: nn.Module, how: str) -> nn.Module:
    """The model as accelerate leaves it in various situations."""
    from accelerate import cpu_offload
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    if how == "offloaded":
        return cpu_offload(model, execution_device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
            if how == "two hooks":
                add_hook_to_module(module, AlignDevicesHook("cpu"), append=True)
            elif how == "hook removed":
                remove_hook_from_module(module)
    return model


@pytest.mark.parametrize("numerics", ["exact", "microxcaling"])
@pytest.mark.parametrize("how", ["hook", "two hooks", "hook removed", "offloaded"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_layers_that_accelerate_has_hooked(toy, ids, how, numerics, order):
    rules = recipe(LINEARS, KV, numerics=numerics, elementwise=Elementwise(bfloat=12))
    toy.lm_head.weight = nn.Parameter(toy.embed.weight.detach().clone())
    expected, unquantized = copy.deepcopy(toy), copy.deepcopy(toy)
    mxlab.apply(expected, rules)
    if order == "before":
        conversion = mxlab.apply(hooked(toy, how), rules)
    else:
        conversion = prepare(toy, rules)
        hooked(toy, how)
    for _ in range(3):
        assert torch.equal(run(toy, ids), run(expected, ids))
    assert not torch.allclose(run(toy, ids), run(unquantized, ids))
    assert "6 linear layers" in conversion.summary()
    if how != "offloaded":
        hook = getattr(toy.blocks[0]["self_attn"].q_proj, "_hf_hook", None)
        assert (hook is not None) is (how != "hook removed")
        for name, value in toy.state_dict().items():
            assert torch.equal(value, expected.state_dict()[name])


def test_hooks_come_off_a_converted_layer(toy, ids):
    from accelerate.hooks import remove_hook_from_module

    mxlab.apply(hooked(toy, "hook"), recipe(LINEARS))
    expected = run(toy, ids)
    remove_hook_from_module(toy, recurse=True)
    assert torch.equal(run(toy, ids), expected)
    assert torch.equal(run(copy.deepcopy(toy), ids), expected)


def test_torch_hooks_stay(toy, ids):
    seen = []
    toy.blocks[0]["self_attn"].q_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    mxlab.apply(toy, recipe(LINEARS))
    run(toy, ids)
    assert len(seen) == 1


def test_a_forward_that_other_code_replaced_is_refused(toy):
    layer = toy.blocks[1]["self_attn"].v_proj
    layer.forward = MethodType(lambda self, x: nn.Linear.forward(self, x) * 2, layer)
    before = description(toy)
    with pytest.raises(ConversionError, match=r"the forward of blocks\.1\.self_attn\.v_proj was replaced"):
        mxlab.apply(toy, recipe(LINEARS))
    assert description(toy) == before


# ---- a Llama


@in_patched
def test_every_shipped_recipe_fits_a_llama():
    from mxlab import shipped
    from mxlab.recipe import load_recipe

    for path in shipped.files("recipe").values():
        model, recipe = tiny(), load_recipe(path.stem)
        plain = tuple(replace(rule, transform=None, k_offset=False) for rule in recipe.rules)  # nothing to calibrate
        conversion = mxlab.apply(model, replace(recipe, rules=plain, algorithms={}))
        assert model(tokens()).logits.isfinite().all()
        assert bool(conversion.sites) is (path.stem not in ("baseline", "injected"))
        left = conversion.inventory()["linear_layers_in_high_precision"]
        assert ("lm_head" in left) is (path.stem not in ("all_linears", "injected"))


@in_patched
def test_a_device_map_with_offloading(tmp_path):
    """MX_SPECS_JSON, and apply, on a model that accelerate spreads over the CPU and the disk."""
    from transformers import LlamaForCausalLM

    tiny().save_pretrained(tmp_path)
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    devices |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    options = {"device_map": devices, "offload_folder": f"{tmp_path}/offload"}
    with specs(kv_elem_format="fp4"):
        whole, spread = tiny(), LlamaForCausalLM.from_pretrained(tmp_path, **options)
    applied = LlamaForCausalLM.from_pretrained(tmp_path, **options)
    assert applied.model.layers[1].mlp.up_proj.weight.is_meta
    mxlab.apply(applied, "ex2")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            expected = whole(tokens()).logits
            for model in (spread, applied, spread, applied):
                assert torch.equal(model(tokens()).logits, expected)


def steps(model, ids, count):
    """A few steps of gradient descent, in whatever mode the model is."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(count):
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()


def test_training_in_evaluation_mode_is_not_undone(toy, ids):
    mxlab.apply(toy, recipe(LINEARS))
    weight = toy.blocks[0]["self_attn"].v_proj.weight
    before = weight.detach().clone()
    steps(toy, ids, 1)
    after_one = weight.detach().clone()
    steps(toy, ids, 4)
    assert not torch.equal(after_one, before)
    assert not torch.equal(weight, after_one)
    assert not torch.equal(weight, mxlab.quantize(weight, FP4))  # the master, not its image


def test_frozen_weights_of_a_model_in_training_are_put_on_the_grid(toy, ids):
    mxlab.apply(toy.train().requires_grad_(False), recipe(LINEARS))
    run(toy, ids)
    weight = toy.blocks[0]["self_attn"].v_proj.weight
    assert torch.equal(weight, mxlab.quantize(weight, FP4))


def test_what_is_saved_is_on_the_grid_after_a_write_that_torch_does_not_count(toy, ids):
    mxlab.apply(toy, recipe(LINEARS))
    run(toy, ids)
    weight = toy.blocks[0]["self_attn"].v_proj.weight
    weight.data.add_(1e-3)
    saved = toy.state_dict()["blocks.0.self_attn.v_proj.weight"]
    assert torch.equal(saved, mxlab.quantize(saved, FP4))


def test_an_attention_without_k_proj(toy, ids):
    attention = toy.blocks[0]["self_attn"]
    attention.qkv_proj = attention.k_proj
    del attention.k_proj
    assert mxlab.apply(toy, recipe(KV)).attentions[0].shape == ()


def test_apply_writes_the_inventory_that_mxlab_run_asks_for(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("MXLAB_INVENTORY", str(tmp_path / "inventory.json"))
    mxlab.apply(toy, recipe(LINEARS))
    assert json.loads((tmp_path / "inventory.json").read_text())["linear_layers"] == 6
