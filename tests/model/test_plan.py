"""Which rule each site of a model comes under, and what is refused; tiny models, and classes nobody has seen."""

import copy

import pytest
import torch
from torch import nn

import mxlab
from mxlab.errors import ConversionError, SpecError
from mxlab.model import sites
from mxlab.model.nn.forward import override_of
from mxlab.model.nn.linear import MxLinear

from support.architectures import LAYERS, build, run, tokens

INT8, FP4, FP6 = mxlab.MXFormat("int8"), mxlab.MXFormat("fp4_e2m1"), mxlab.MXFormat("fp6_e2m3")
Rule = mxlab.Rule


def recipe(*rules: Rule, **more) -> mxlab.Recipe:
    return mxlab.Recipe("test", rules, **more)


def weights(conversion: mxlab.Conversion) -> dict[str, mxlab.MXFormat]:
    """The format of each layer's weight, by name without the leading ``model.layers``."""
    return {site.name.removeprefix("model.layers."): site.formats["weight"] for site in conversion.linears}


def state(model: nn.Module) -> list:
    """All that a conversion may change: classes, attributes, hooks, parameters, the kind of attention."""
    modules = [(n, type(m), sorted(vars(m)), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    kind = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return [repr(modules), kind, *((n, id(p), p._version) for n, p in model.named_parameters())]


def refused(model: nn.Module, asked: mxlab.Recipe, message: str) -> None:
    """Check that the recipe is refused, and that this leaves the model as it was."""
    before = state(model)
    with pytest.raises(ConversionError, match=message):
        mxlab.apply(model, asked)
    assert state(model) == before


# ---- which rule


def test_the_first_match_wins_layer_by_layer():
    rules = (
        Rule(name="model.layers.0.mlp.up_proj", weight=INT8),
        Rule(r".*\.up_proj", layers="-1", weight=FP6),
        Rule(part="mlp", layers="0", weight=FP4),
        Rule(type="Linear", layers="1", weight=mxlab.MXFormat("int4")),
    )
    found = weights(mxlab.apply(build("llama"), recipe(*rules)))
    assert found["0.mlp.up_proj"] == INT8
    assert found["1.mlp.up_proj"] == FP6
    assert found["0.mlp.down_proj"] == FP4
    assert found["1.mlp.down_proj"] == found["1.self_attn.q_proj"] == mxlab.MXFormat("int4")
    assert "0.self_attn.q_proj" not in found
    assert "lm_head" not in found


def test_mixed_precision_computes_with_each_layers_format():
    raw = build("llama")
    model = copy.deepcopy(raw)
    mxlab.apply(model, recipe(Rule(part="mlp", layers="0", weight=FP4), Rule(part="mlp", layers="1", weight=INT8)))
    for layer, fmt in enumerate((FP4, INT8)):
        name = f"model.layers.{layer}.mlp.down_proj"
        expected = mxlab.quantize(raw.get_submodule(name).weight, fmt)
        assert torch.equal(model.get_submodule(name).weight, expected)


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (Rule(part="mlp", skip=True), {"mlp"}),
        (Rule(r".*\.mlp\..*", skip=True), {"mlp"}),
        (Rule(part="head", skip=True), {"head"}),
        (Rule(part="attention", layers="0, 1", skip=True), {"attention"}),
    ],
)
def test_what_is_skipped_stays(skip, left):
    conversion = mxlab.apply(build("llama"), recipe(skip, Rule(part="all", weight=INT8)))
    parts = {site.name: site.part for site in sites.find_sites(build("llama")) if site.kind != "attention"}
    assert {parts[name] for name in conversion.linears_in_high_precision} == left
    assert {site.part for site in conversion.linears} == {"mlp", "attention", "head"} - left


def test_an_attention_can_be_skipped():
    conversion = mxlab.apply(
        build("llama"), recipe(Rule(part="attention", layers="0", skip=True), Rule(part="attention", k=FP4))
    )
    assert [site.name for site in conversion.attentions] == ["model.layers.1.self_attn"]


def test_roles_of_linear_layers_and_of_attentions_come_from_rules_of_their_own():
    both = recipe(Rule(part="attention", weight=INT8), Rule(part="attention", k=FP4, v=FP4))
    conversion = mxlab.apply(build("llama"), both)
    assert len(conversion.linears) == 4 * LAYERS
    assert len(conversion.attentions) == LAYERS


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("nothing", weight=INT8)], "modules = 'nothing' matches no module of LlamaForCausalLM"),
        ([Rule(part="router", weight=INT8)], "part = 'router' matches no module"),
        ([Rule(part="head", layers="0", weight=INT8)], "part = 'head', layers = '0' matches no module"),
        (
            [Rule(part="all", weight=INT8), Rule(part="mlp", weight=FP4)],
            "part = 'mlp' matches no .*an earlier rule took",
        ),
        (
            [Rule(part="all", weight=INT8), Rule(part="mlp", skip=True)],
            "'mlp' matches no module .* that could be quant",
        ),
        ([Rule(r"model\.layers\.0", skip=True), Rule(part="all", weight=INT8)], "that could be quantized"),
        ([Rule(part="mlp", layers="2", weight=INT8)], "names layer 2: the model has 2, numbered from 0"),
        ([Rule(type="LlamaMLP", weight=INT8)], r"layers\.0\.mlp is a LlamaMLP: only torch\.nn\.Linear"),
        ([Rule(type="LlamaAttention", weight=INT8)], "is a LlamaAttention: only torch.nn.Linear"),
        ([Rule(part="mlp", k=FP4)], "part = 'mlp' matches no module"),
        ([Rule(name="lm_head", k=FP4)], "lm_head is a Linear, whose forward hands no K and V to a past_key_values"),
        ([Rule(part="mlp", bias=INT8)], "no layer that .*part = 'mlp' matches has a bias"),
        ([Rule(part="mlp", weight=FP4), Rule(part="attention", p=FP4), Rule("x", k=FP4)], "'x' matches no module"),
    ],
)
def test_rules_that_do_not_fit(rules, message):
    refused(build("llama"), recipe(*rules), message)


def test_nothing_is_left_for_a_rule_of_one_phase():
    first = Rule(part="mlp", weight=INT8)
    refused(build("llama"), recipe(first, Rule(part="mlp", phase="decode", weight=FP4)), "phase = 'decode' matches no")


# ---- roles of linear layers


def test_bias_and_output():
    raw = build("phi")
    model = copy.deepcopy(raw)
    with torch.no_grad():
        for p in raw.parameters():
            p.uniform_(-1, 1)
    model.load_state_dict(raw.state_dict())
    mxlab.apply(model, recipe(Rule(part="mlp", bias=FP4, output=FP6)))
    x = torch.randn(3, 32)
    layer, converted = (m.model.layers[0].mlp.fc1 for m in (raw, model))
    expected = mxlab.quantize(nn.functional.linear(x, layer.weight, mxlab.quantize(layer.bias, FP4)), FP6)
    assert torch.equal(converted(x), expected)
    assert torch.equal(converted.bias, layer.bias)
    assert torch.equal(converted.weight, layer.weight)


# ---- classes nobody has seen


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class HomeMade(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks or [Block(), Block()])
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def test_a_home_made_model():
    torch.manual_seed(0)
    raw, x = HomeMade().eval(), torch.randn(2, 8)
    fmt = mxlab.MXFormat("fp4_e2m1", 4)
    model = copy.deepcopy(raw)
    conversion = mxlab.apply(
        model, recipe(Rule(part="mlp", weight=fmt, activation=fmt), Rule(part="head", weight=INT8))
    )
    assert [site.name for site in conversion.linears] == [
        "blocks.0.up",
        "blocks.0.down",
        "blocks.1.up",
        "blocks.1.down",
        "out",
    ]
    expected = x
    for block in raw.blocks:
        q = {n: mxlab.quantize(getattr(block, n).weight, fmt) for n in ("up", "down")}
        inner = nn.functional.linear(mxlab.quantize(expected, fmt), q["up"], block.up.bias).relu()
        expected = expected + nn.functional.linear(mxlab.quantize(inner, fmt), q["down"], block.down.bias)
    expected = nn.functional.linear(expected, mxlab.quantize(raw.out.weight, INT8), raw.out.bias)
    torch.testing.assert_close(model(x), expected)


def test_phases_of_a_home_made_model_are_all_prefill():
    model = HomeMade().eval()
    mxlab.apply(model, recipe(Rule(part="mlp", phase="decode", weight=FP4)))
    raw = copy.deepcopy(model)
    x = torch.randn(2, 8)
    assert torch.equal(model(x), raw(x))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def test_torchs_own_attention_multiplies_by_parameters_and_is_refused():
    model = HomeMade(Block(), Attending())
    message = r"blocks\.1\.attention is a MultiheadAttention .*cannot convert: .*type = 'MultiheadAttention' and skip"
    refused(model, recipe(Rule(part="all", weight=INT8)), message)
    message = r"blocks\.1\.attention\.out_proj is a NonDynamicallyQuantizableLinear \(its weight is read"
    refused(model, recipe(Rule(r".*out_proj", weight=INT8)), message)
    refused(model, recipe(Rule(type="MultiheadAttention", k=FP4)), "hands no K and V to a past_key_values")
    conversion = mxlab.apply(model, recipe(Rule(part="attention", skip=True), Rule(part="all", weight=INT8)))
    left = ["blocks.1.attention.in_proj_weight", "blocks.1.attention.out_proj"]
    assert conversion.linears_in_high_precision == left
    assert all(name in conversion.summary() for name in left)
    assert model(torch.randn(1, 3, 8)).shape == (1, 3, 4)


def test_a_class_derived_from_linear():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = HomeMade(Block(), Scaled(8, 8))
    for rule in (Rule(part="all", weight=INT8), Rule(type="Scaled", weight=INT8), Rule(name="blocks.1", weight=INT8)):
        refused(
            model, recipe(rule), r"blocks\.1 is a Scaled \(computes more than a linear layer does\), which mxlab cannot"
        )
    conversion = mxlab.apply(model, recipe(Rule(type="Scaled", skip=True), Rule(part="all", weight=INT8)))
    assert conversion.linears_in_high_precision == ["blocks.1"]


def test_a_linear_layer_by_another_name():
    """FalconLinear: its own class, its own forward, a linear layer all the same."""

    class Named(nn.Linear):
        def forward(self, x):
            y = x @ self.weight.T
            return y if self.bias is None else y + self.bias

    model = HomeMade(Block(), Named(8, 8)).eval()
    expected = mxlab.quantize(model.blocks[1].weight.detach(), INT8)
    conversion = mxlab.apply(model, recipe(Rule(name="blocks.1", weight=INT8)))
    assert [site.name for site in conversion.linears] == ["blocks.1"]
    assert torch.equal(model.blocks[1].weight, expected)


def test_a_layer_that_is_used_twice_is_converted_once():
    block = Block()
    model = HomeMade(block, block).eval()
    conversion = mxlab.apply(model, recipe(Rule(part="mlp", weight=INT8)))
    assert [site.name for site in conversion.linears] == ["blocks.0.up", "blocks.0.down"]
    assert type(model.blocks[1].up) is MxLinear


# ---- bad input


def test_converting_twice():
    for rule in (Rule(part="mlp", weight=INT8), Rule(part="attention", k=FP4), Rule(part="attention", p=FP4)):
        model = build("llama")
        mxlab.apply(model, recipe(rule))
        expected = run(model)
        refused(model, recipe(Rule(part="all", weight=INT8)), "quantized already, under a recipe test that is not")
        assert torch.equal(run(model), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("what", ["weight", "bias"])
def test_values_that_are_not_finite(value, what):
    model = build("phi")
    with torch.no_grad():
        getattr(model.model.layers[1].mlp.fc2, what).view(-1)[:2] = value
    rules = recipe(Rule(part="mlp", weight=INT8, bias=INT8), Rule(part="attention", p=FP4))
    refused(model, rules, rf"the {what} of model\.layers\.1\.mlp\.fc2 holds 2 values that are NaN or infinite")
    other = Rule(name="model.layers.1.mlp.fc2", activation=INT8)
    mxlab.apply(model, recipe(other, Rule(part="mlp", weight=INT8)))


def test_large_values_whose_sum_overflows_are_finite():
    model = build("llama", dtype=torch.float16)
    with torch.no_grad():
        model.lm_head.weight.fill_(60000.0)
    mxlab.apply(model, recipe(Rule(part="head", weight=INT8)))


def test_not_finite_experts():
    model = build("mixtral")
    layer = next(site for site in sites.find_sites(model) if site.part == "mlp")
    with torch.no_grad():
        getattr(layer.module, layer.parameter).view(-1)[5] = float("nan")
    refused(model, recipe(Rule(part="mlp", weight=INT8)), r"the weight of model\.layers\.0\..* holds 1 values")


@pytest.mark.parametrize("config", [{"quant_method": "gptq"}, type("Config", (), {"quant_method": "gptq"})()])
def test_a_quantized_checkpoint(config):
    model = build("llama")
    model.config.quantization_config = config
    refused(model, recipe(Rule(part="mlp", weight=INT8)), r"quantized already \(gptq\): .*load the unquantized model")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_weights_of_other_dtypes(dtype):
    model = build("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    message = rf"the weight of model\.layers\.0\.mlp\.up_proj is a Tensor of {dtype}: mxlab quantizes"
    refused(model, recipe(Rule(part="mlp", weight=INT8)), message)


def test_a_block_size_that_does_not_divide_is_noted():
    fmt = mxlab.MXFormat("int8", 5)
    rules = recipe(
        Rule(part="mlp", phase="decode", weight=fmt), Rule(part="attention", k=fmt), Rule(part="head", skip=True)
    )
    notes = mxlab.apply(build("gpt_neox"), rules).notes
    assert (
        "weight of 2 linears: the axis of 32 is not a multiple of the block size 5; its last block has 2 elements"
        in notes
    )
    assert (
        "weight of 2 linears: the axis of 48 is not a multiple of the block size 5; its last block has 3 elements"
        in notes
    )
    assert (
        "k of 2 attentions: the axis of 8 is not a multiple of the block size 5; its last block has 3 elements" in notes
    )


def test_an_inventory_tells_the_phases_apart():
    rules = recipe(
        Rule(part="mlp", phase="prefill", weight=INT8, activation=FP6),
        Rule(part="mlp", weight=FP4, activation=FP6),
        Rule(part="attention", phase="decode", weight=FP4),
    )
    sites_of = {s["module"]: s["formats"] for s in mxlab.apply(build("llama"), rules).inventory()["sites"]}
    both = {"activation": str(FP6), "prefill weight": str(INT8), "decode weight": str(FP4)}
    assert sites_of["model.layers.0.mlp.up_proj"] == both
    assert sites_of["model.layers.0.self_attn.q_proj"] == {"decode weight": str(FP4)}


# ---- meta tensors


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen2.5"])
@pytest.mark.parametrize("how", ["prepare", "apply"])
def test_meta_tensors_are_quantized_once_they_are_there(name, how):
    from mxlab.model.apply import prepare

    rules = recipe(
        Rule(part="mlp", weight=FP4, activation=FP6), Rule(part="head", weight=INT8), Rule(part="attention", k=FP4)
    )
    raw, expected = build(name), build(name)
    mxlab.apply(expected, rules)
    with torch.device("meta"):
        model = type(raw)(raw.config).eval()
    conversion = prepare(model, rules) if how == "prepare" else mxlab.apply(model, rules)
    assert ("on the meta device: they are quantized once they are there" in conversion.summary()) is (how == "apply")
    model.load_state_dict(raw.state_dict(), assign=True)
    model.tie_weights()
    for buffer_name, buffer in raw.named_buffers():  # not in the state: rotary frequencies, masks
        owner, _, last = buffer_name.rpartition(".")
        setattr(model.get_submodule(owner), last, buffer)
    torch.testing.assert_close(run(model), run(expected), atol=1e-6, rtol=1e-6)


def test_unknown_recipes_and_files(tmp_path):
    with pytest.raises(SpecError, match="no recipe"):
        mxlab.apply(build("llama"), "tier_e")
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\n[[rules]]\npart = "mlp"\nweight = "int8"\n', encoding="utf-8")
    conversion = mxlab.apply(build("llama"), file)
    assert len(conversion.linears) == 3 * LAYERS
    assert not any(override_of(m) for m in conversion.model.modules())
    assert run(conversion.model, tokens(1)).isfinite().all()
