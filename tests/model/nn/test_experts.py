"""Mixtures of experts whose weights are 3-D parameters, and routers, against a loop over the experts written here."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack

import mxlab
from mxlab.errors import ConversionError
from mxlab.formats import parse_format
from mxlab.model.nn.forward import override_of
from mxlab.recipe import Elementwise

from support.architectures import EXPERTS, HIDDEN, IS_OLD, build, run, tokens
from support.llama import checkpointed

pytestmark = pytest.mark.skipif(IS_OLD, reason="experts are modules with linear layers there")

# Blocks of which several fit into every axis: 32 and 48 elements.
GATE_UP = {"weight": mxlab.MXFormat("fp4_e2m1", 8), "activation": mxlab.MXFormat("fp6_e2m3", 4)}
DOWN = {"weight": mxlab.MXFormat("int4", 16), "activation": mxlab.MXFormat("fp4_e2m1", 16)}
ROUTER = {"weight": mxlab.MXFormat("int8", 8), "activation": mxlab.MXFormat("int8", 4)}
NOTHING = {"weight": None, "activation": None}
RULES = (
    mxlab.Rule(r".*\.gate_up_proj", **GATE_UP),
    mxlab.Rule(r".*\.down_proj", **DOWN),
    mxlab.Rule(part="router", **ROUTER),
)
RECIPE = mxlab.Recipe("test", RULES)
ARCHITECTURES = ["mixtral", "gpt_oss"]
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm", "grouped_mm_fallback"]


def make(architecture: str, **more):
    """``mixtral``, or ``gpt_oss``: transposed weights, biases, gates and values in turns, router with a bias."""
    if architecture == "mixtral":
        return build("mixtral", **more)
    from transformers import AutoModelForCausalLM, GptOssConfig

    sizes = {"vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GptOssConfig(**sizes, **heads, pad_token_id=0, eos_token_id=None))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model.eval()


def quantized(x: Tensor, fmt: mxlab.MXFormat | None, axis: int = -1) -> Tensor:
    return x if fmt is None else mxlab.quantize(x, fmt, axis=axis)


def mixture(experts: nn.Module, x: Tensor, index: Tensor, weight: Tensor, first: dict, second: dict) -> Tensor:
    """One token, one expert at a time; x (tokens, hidden)."""
    is_gpt_oss = type(experts).__name__ == "GptOssExperts"
    axis = -2 if is_gpt_oss else -1
    up, down = (
        quantized(experts.gate_up_proj, first["weight"], axis),
        quantized(experts.down_proj, second["weight"], axis),
    )
    rows = []
    for token, chosen, shares in zip(x, index, weight, strict=True):
        total = torch.zeros(HIDDEN)
        for e, share in zip(chosen, shares, strict=True):
            both = quantized(token, first["activation"])
            if is_gpt_oss:
                both = both @ up[e] + experts.gate_up_proj_bias[e]
                gate, value = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
                inner = quantized((value + 1) * gate * torch.sigmoid(1.702 * gate), second["activation"])
                out = inner @ down[e] + experts.down_proj_bias[e]
            else:
                gate, value = (up[e] @ both).chunk(2)
                out = down[e] @ quantized(F.silu(gate) * value, second["activation"])
            total = total + share * out
        rows.append(total)
    return torch.stack(rows)


def experts_of(model, layer: int = 1) -> nn.Module:
    return model.model.layers[layer].mlp.experts


def call(model, ids: Tensor | None = None) -> tuple[tuple, Tensor]:
    """The arguments and the output of the last layer's experts in one forward pass."""
    seen = []
    handle = experts_of(model).register_forward_hook(
        lambda module, args, kwargs, output: seen.append(((*args, *kwargs.values()), output)), with_kwargs=True
    )
    run(model, ids)
    handle.remove()
    return seen[0]


def implement(model, implementation: str, monkeypatch) -> None:
    if implementation == "grouped_mm_fallback":
        monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *args: False)
    model.set_experts_implementation(implementation.removesuffix("_fallback"))


# ---- what is computed


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_implementation_computes_with_quantized_operands(architecture, implementation, monkeypatch):
    raw = make(architecture)
    model = copy.deepcopy(raw)
    mxlab.apply(model, RECIPE)
    implement(model, implementation, monkeypatch)
    (x, index, weight), output = call(model)
    expected = mixture(experts_of(raw), x, index, weight, GATE_UP, DOWN)
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(output, mixture(experts_of(raw), x, index, weight, NOTHING, NOTHING), atol=1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rule", "first", "second"), [(0, GATE_UP, NOTHING), (1, NOTHING, DOWN)])
def test_one_projection_alone(rule, first, second, implementation, monkeypatch):
    raw = make("mixtral")
    model = copy.deepcopy(raw)
    conversion = mxlab.apply(model, mxlab.Recipe("test", (RULES[rule],)))
    implement(model, implementation, monkeypatch)
    (x, index, weight), output = call(model)
    torch.testing.assert_close(output, mixture(experts_of(raw), x, index, weight, first, second), atol=1e-4, rtol=1e-4)
    assert len(conversion.linears) == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_router(architecture):
    raw = make(architecture)
    model = copy.deepcopy(raw)
    mxlab.apply(model, mxlab.Recipe("test", (RULES[2],)))
    name = "gate" if architecture == "mixtral" else "router"
    original = getattr(raw.model.layers[0].mlp, name)
    router = getattr(model.model.layers[0].mlp, name)
    x = torch.randn(5, HIDDEN)
    logits = F.linear(mxlab.quantize(x, ROUTER["activation"]), mxlab.quantize(original.weight, ROUTER["weight"]))
    logits = logits + (original.bias if architecture == "gpt_oss" else 0)
    torch.testing.assert_close(router(x)[0], logits)
    assert not torch.allclose(original(x)[0], logits)


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ({"type": "MixtralExperts"}, ["gate_up_proj", "down_proj"]),
        ({"modules": r".*\.experts"}, ["gate_up_proj", "down_proj"]),
        ({"modules": r".*\.down_proj"}, ["down_proj"]),
        ({"name": "model.layers.0.mlp.experts"}, ["gate_up_proj", "down_proj"]),
        ({"name": "model.layers.0.mlp.experts.gate_up_proj"}, ["gate_up_proj"]),
        ({"part": "mlp", "layers": "0"}, ["gate_up_proj", "down_proj"]),
    ],
)
def test_experts_are_chosen_by_module_or_by_parameter(selector, names):
    rule = mxlab.Rule(weight=GATE_UP["weight"], **selector)
    conversion = mxlab.apply(make("mixtral"), mxlab.Recipe("test", (rule,)))
    in_first = [site.name for site in conversion.linears if site.layer == 0]
    assert in_first == [f"model.layers.0.mlp.experts.{name}" for name in names]


# ---- weights


def test_weights_are_put_on_the_grid_once(monkeypatch):
    raw = make("mixtral")
    model = copy.deepcopy(raw)
    mxlab.apply(model, RECIPE)
    assert torch.equal(experts_of(model).down_proj, mxlab.quantize(experts_of(raw).down_proj, DOWN["weight"]))
    count = quantizations_of(model, DOWN["weight"], monkeypatch)
    assert count(model) == 0
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).to(torch.bfloat16)):
        assert count(twin) == 0
        assert torch.equal(experts_of(twin).down_proj, experts_of(model).down_proj)


def quantizations_of(model, fmt: mxlab.MXFormat, monkeypatch):
    """A function that counts how often a forward pass quantizes to ``fmt``."""
    from mxlab.model.nn import operands

    calls = []

    def counted(x, to, **more):
        calls.append(to)
        return mxlab.quantize(x, to, **more)

    monkeypatch.setattr(operands, "quantize", counted)

    def count(model) -> int:
        calls.clear()
        run(model)
        return calls.count(fmt)

    return count


@pytest.mark.parametrize("how", ["copied into", "assigned", "state dict", "loaded copy"])
def test_weights_that_change_are_quantized(how):
    other = make("mixtral")
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    model = make("mixtral")
    mxlab.apply(model, RECIPE)
    if how == "loaded copy":
        model = copy.deepcopy(model)
    if how in ("state dict", "loaded copy"):
        model.load_state_dict(other.state_dict())
    else:
        with torch.no_grad():
            for experts, source in ((experts_of(model, n), experts_of(other, n)) for n in (0, 1)):
                for name in ("gate_up_proj", "down_proj"):
                    if how == "assigned":
                        setattr(experts, name, nn.Parameter(getattr(source, name).clone()))
                    else:
                        getattr(experts, name).copy_(getattr(source, name))
    (x, index, weight), output = call(model)
    expected = mixture(experts_of(other), x, index, weight, GATE_UP, DOWN)
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


def test_training_keeps_the_master_and_gradients_pass_straight_through():
    gradients = []
    for is_checkpointed in (False, True):
        model = make("mixtral").train()
        before = experts_of(model).down_proj.detach().clone()
        mxlab.apply(model, RECIPE)
        assert torch.equal(experts_of(model).down_proj, before)
        model = checkpointed(model) if is_checkpointed else model
        model(tokens()).logits.square().mean().backward()
        assert _len_torch_function_stack() == 0
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.1 * p.grad)
    model.eval()
    trained = experts_of(model).down_proj.detach().clone()
    (x, index, weight), output = call(model)
    assert torch.equal(experts_of(model).down_proj, trained)
    expected = mixture(experts_of(model), x, index, weight, GATE_UP, DOWN)
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


def test_the_gradient_of_an_activation_is_that_of_the_quantized_product():
    model = make("mixtral").train()
    mxlab.apply(model, RECIPE)
    experts, x = experts_of(model), torch.randn(3, HIDDEN, requires_grad=True)
    index, weight = torch.tensor([[0, 1], [2, 3], [1, 0]]), torch.full((3, 2), 0.5)
    experts(x, index, weight).square().sum().backward()
    found, x.grad = x.grad, None
    straight_through = lambda t, fmt, axis=-1: t + (mxlab.quantize(t, fmt, axis=axis) - t).detach()  # noqa: E731
    first, second = (
        straight_through(experts.gate_up_proj, GATE_UP["weight"]),
        straight_through(experts.down_proj, DOWN["weight"]),
    )
    total = 0
    for n in range(3):
        row = 0
        for e in index[n]:
            gate, value = (first[e] @ straight_through(x[n], GATE_UP["activation"])).chunk(2)
            row = row + 0.5 * second[e] @ straight_through(F.silu(gate) * value, DOWN["activation"])
        total = total + row.square().sum()
    total.backward()
    torch.testing.assert_close(found, x.grad, atol=1e-4, rtol=1e-4)


def test_bits_per_parameter_of_transposed_experts():
    model = make("gpt_oss")
    conversion = mxlab.apply(model, mxlab.Recipe("test", (mxlab.Rule(r".*\.down_proj", weight=DOWN["weight"]),)))
    count = 2 * EXPERTS * 48 * HIDDEN
    total = sum(p.numel() for p in model.parameters())
    assert conversion.bits_per_parameter == pytest.approx((count * (4 + 8 / 16) + (total - count) * 32) / total)


# ---- compilers, errors


def test_they_compile_to_one_graph_and_export():
    torch.compiler.reset()  # what other tests compiled counts against the limit of versions of one function
    model, ids = make("mixtral"), tokens()
    mxlab.apply(model, RECIPE)
    expected = run(model, use_cache=False)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
        other = make("mixtral")
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1.1)
        model.load_state_dict(other.state_dict())
        expected = run(model, use_cache=False)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
        program = torch.export.export(model, (ids,), {"use_cache": False})
        torch.testing.assert_close(program.module()(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)


def test_nothing_is_seen_any_more_after_an_interrupt(monkeypatch):
    model = make("mixtral")
    mxlab.apply(model, RECIPE)
    expected = run(model)

    def stop(x):
        raise KeyboardInterrupt

    monkeypatch.setattr(experts_of(model).act_fn, "forward", stop)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    assert _len_torch_function_stack() == 0
    monkeypatch.undo()
    assert torch.equal(run(model), expected)


def test_products_that_cannot_be_seen(monkeypatch):
    model = make("mixtral")
    mxlab.apply(model, RECIPE)
    monkeypatch.setattr(type(experts_of(model)), "forward", lambda self, x, index, weight: torch.einsum("ti->ti", x))
    with pytest.raises(ConversionError, match=r"mlp\.experts computes its products where mxlab cannot see them.*eager"):
        run(model)


@pytest.mark.parametrize("role", ["bias", "output"])
def test_roles_that_experts_lack(role):
    model = make("mixtral")
    with pytest.raises(ConversionError, match=r"mlp\.experts: bias and output of experts and routers cannot"):
        mxlab.apply(model, mxlab.Recipe("test", (mxlab.Rule(part="mlp", **{role: GATE_UP["weight"]}),)))
    assert override_of(experts_of(model)) is None


def test_element_wise_rounding_of_experts():
    rules = mxlab.Recipe("test", RULES, elementwise=Elementwise(bfloat=12))
    with pytest.raises(ConversionError, match=r"experts have no element-wise rounding of torch\.float32.*bfloat = 0"):
        mxlab.apply(make("mixtral"), rules)


def test_experts_that_mxlab_does_not_know():
    class OtherExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(4, 64, 32))

    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.experts = OtherExperts()
    mlp = mxlab.Rule(part="mlp", weight=GATE_UP["weight"])
    reason = r"0\.mlp\.experts is a OtherExperts \(mxlab does not know its products"
    with pytest.raises(ConversionError, match=rf"{reason}.*type = 'OtherExperts' and skip = true"):
        mxlab.apply(model, mxlab.Recipe("test", (mlp,)))
    conversion = mxlab.apply(model, mxlab.Recipe("test", (mxlab.Rule(type="OtherExperts", skip=True), mlp)))
    assert len(conversion.linears) == 6
    left = [name for name in conversion.linears_in_high_precision if ".mlp." in name]
    assert left == [f"model.layers.{n}.mlp.experts.gate_up_proj" for n in range(2)]


# ---- one scale of a whole tensor


NVFP4 = parse_format("nvfp4")


def uneven():
    """Experts of different magnitude: a scale of all together is another than that of each."""
    model = build("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            for expert in range(EXPERTS):
                layer.mlp.experts.gate_up_proj[expert] *= 0.37**expert
                layer.mlp.experts.down_proj[expert] *= 0.37 ** (3 - expert)
    return model


def by_expert(model):
    """The same model with the weights of each expert quantized alone."""
    with torch.no_grad():
        for layer in model.model.layers:
            for weights in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                for expert in range(EXPERTS):
                    weights[expert] = mxlab.quantize(weights[expert].clone(), NVFP4)
    return model


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_training", [False, True], ids=["frozen", "on the fly"])
def test_a_scale_of_a_tensor_is_that_of_one_expert(implementation, is_training, monkeypatch):
    model = uneven()
    implement(model, implementation, monkeypatch)
    expected = run(by_expert(copy.deepcopy(model)))
    model.train(is_training)  # it has no dropout
    conversion = mxlab.apply(model, mxlab.Recipe("test", (mxlab.Rule(part="mlp", weight=NVFP4),)))
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-4)
    elements = sum(site.weight.numel() for site in conversion.sites)
    assert sum(site.storage_bits() for site in conversion.sites) == elements * 4.5 + 2 * 2 * EXPERTS * 32


def test_the_tokens_of_one_expert_are_a_tensor(monkeypatch):
    """Whichever way transformers computes them, and as where each expert is a layer of its own."""
    outputs = []
    for implementation in IMPLEMENTATIONS:
        model = uneven()
        implement(model, implementation, monkeypatch)
        mxlab.apply(model, mxlab.Recipe("test", (mxlab.Rule(part="mlp", activation=NVFP4),)))
        outputs.append(run(model))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=1e-4)
    model = uneven()
    assert not torch.allclose(run(model), outputs[0], atol=1e-3)
    experts = experts_of(model)
    x, index, weight = torch.randn(6, HIDDEN), torch.tensor([[0, 1]] * 3 + [[1, 2]] * 3), torch.ones(6, 2) / 2
    mxlab.apply(model, mxlab.Recipe("test", (mxlab.Rule(part="mlp", activation=NVFP4),)))
    expected = torch.zeros_like(x)
    for expert in range(3):
        rows = (index == expert).any(-1)
        hidden = mxlab.quantize(x[rows], NVFP4) @ experts.gate_up_proj[expert].T
        gate, up = hidden.chunk(2, -1)
        expected[rows] += mxlab.quantize(nn.functional.silu(gate) * up, NVFP4) @ experts.down_proj[expert].T / 2
    with torch.no_grad():
        torch.testing.assert_close(experts(x, index, weight), expected.detach(), atol=1e-5, rtol=1e-4)
