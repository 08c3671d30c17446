"""Work is done once: weights at conversion, an activation for all projections that read it, K and V per token."""

import copy
import pickle
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mxlab
from mxlab.model.nn.linear import MxLinear
from mxlab.model.nn.shared_input import SharedInput
from mxlab.recipe import load_recipe
from mxlab.recipe.mx_specs import override

from support.llama import tiny, tokens


class Calls(TorchDispatchMode):
    """The shapes that mxlab's operators are called with, whether they write to new memory or not."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mxlab":
            name = func.__name__.partition(".")[0].removesuffix("_out")
            self.shapes.setdefault(name, []).append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def converted(recipe: str = "ex2", **options):
    model = tiny()
    mxlab.apply(model, override(load_recipe(recipe), options))
    return model


def layers(model) -> int:
    return model.config.num_hidden_layers


def test_a_forward_pass_quantizes_each_activation_once_and_no_weight():
    model = converted()
    with Calls() as calls, torch.no_grad():
        model(tokens(), use_cache=False)
    # The input of q, k, v; of o; of gate and up; of down; K; V.
    assert len(calls.shapes["quantize"]) == 6 * layers(model)
    assert "round_elementwise" not in calls.shapes or model.dtype != torch.bfloat16


def test_generation_quantizes_each_token_of_k_and_v_once():
    model = converted("kv_only")
    ids = tokens(batch=1, length=5)
    with Calls() as calls, torch.no_grad():
        model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=True)
    lengths = sorted(shape[2] for shape in calls.shapes["quantize"])
    assert lengths == sorted([5, 1, 1, 1] * 2 * layers(model))


@pytest.mark.parametrize("numerics", ["exact", "microxcaling"])
def test_sharing_moves_no_bit(numerics, monkeypatch):
    ids = tokens()
    model = converted(custom_cuda=numerics == "exact")
    with torch.no_grad():
        shared = model(ids).logits
        monkeypatch.setattr(SharedInput, "get", lambda self, x, kind, function: function(x, None))
        assert torch.equal(model(ids).logits, shared)


def test_gradients_are_those_of_separate_quantization(monkeypatch):
    ids = tokens()
    model = tiny().train()
    other = copy.deepcopy(model)
    for m in (model, other):
        mxlab.apply(m, "ex2")
    model(ids).logits.square().sum().backward()
    monkeypatch.setattr(SharedInput, "get", lambda self, x, kind, function: function(x, None))
    other(ids).logits.square().sum().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_dither_draws_for_each_projection():
    model = converted(round="dither")
    with Calls() as calls, torch.no_grad():
        model(tokens(), use_cache=False)
    assert len(calls.shapes["quantize"]) == 9 * layers(model)


def double(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return torch.mul(x, 2, out=out)


@pytest.fixture
def shared():
    """A SharedInput as it is during a call of its parent."""
    shared = SharedInput()
    shared._begin()
    return shared


def test_the_same_tensor_gives_the_same_result_until_it_changes(shared):
    x = torch.ones(3)
    first = shared.get(x, "a", double)
    assert shared.get(x, "a", double) is first
    assert shared.get(x, "b", double) is not first
    shared.get(x, "a", double)
    x.add_(1)
    assert torch.equal(shared.get(x, "a", double), torch.full((3,), 4.0))
    assert shared.get(x.clone(), "a", double) is not first
    x.data = torch.full((3,), 5.0)
    assert torch.equal(shared.get(x, "a", double), torch.full((3,), 10.0))


def test_a_result_without_a_graph_does_not_serve_training(shared):
    x = torch.ones(3)
    shared.get(x, "a", double)
    x.requires_grad_()
    with torch.no_grad():
        shared.get(x, "a", double)
    assert shared.get(x, "a", lambda t, out: t * 2).requires_grad


def test_inference_tensors_are_shared_too(shared):
    with torch.inference_mode():
        x = torch.ones(3)
        assert shared.get(x, "a", double) is shared.get(x, "a", double)


def test_a_workspace_that_another_has_borrowed_is_not_read(shared):
    other, x, y = SharedInput(), torch.ones(2**16), torch.full((2**16,), 7.0)
    other._begin()
    with torch.no_grad():
        first = shared.get(x, "a", double)
        assert shared.get(x, "a", double) is first
        assert other.get(y, "a", double).data_ptr() == first.data_ptr()
        assert torch.equal(shared.get(x, "a", double), torch.full((2**16,), 2.0))


def test_training_gets_memory_of_its_own(shared):
    x, y = torch.ones(2**16), torch.full((2**16,), 7.0)
    first = shared.get(x, "a", double)
    shared.get(y, "a", double)
    assert torch.equal(first, torch.full((2**16,), 2.0))


def test_nothing_outlives_the_call_of_the_parent(shared):
    x = torch.ones(3)
    first = weakref.ref(shared.get(x, "a", double))
    shared._end()
    assert first() is None
    assert shared.get(x, "a", double) is not shared.get(x, "a", double)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_buffer_that_is_written_again_is_quantized_again(mode):
    attention = converted().model.layers[0].self_attn
    layer = attention.q_proj
    with mode():
        buffer = torch.empty(4, layer.in_features, dtype=layer.weight.dtype)
        for seed in range(3):
            values = torch.randn(buffer.shape, generator=torch.Generator().manual_seed(seed)).to(buffer.dtype)
            buffer.copy_(values)
            assert torch.equal(layer(buffer), layer(values))


def test_a_parent_that_fails_leaves_nothing_behind():
    model = converted()
    mlp = model.model.layers[0].mlp
    with pytest.raises(RuntimeError):
        mlp(torch.ones(2, 3))
    assert mlp.gate_proj.shared._last is None
    assert not mlp.gate_proj.shared._is_open


def test_copies_share_among_themselves_only():
    model = converted()
    attention = model.model.layers[0].self_attn
    twin = copy.deepcopy(attention)
    assert twin.q_proj.shared is twin.k_proj.shared is not attention.q_proj.shared
    again = pickle.loads(pickle.dumps(attention.q_proj))
    assert isinstance(again, MxLinear)
    assert torch.equal(again.weight, attention.q_proj.weight)


def test_a_converted_model_compiles_to_one_graph_and_exports():
    model = converted()
    ids = tokens()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(ids, use_cache=False).logits, expected)
        program = torch.export.export(model, (ids,), {"use_cache": False})
        assert torch.equal(program.module()(ids, use_cache=False).logits, expected)


def test_compiled_code_sees_weights_that_are_loaded_later():
    model = converted()
    ids = tokens()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(ids, use_cache=False)
        model.load_state_dict(tiny(seed=5).state_dict())
        loaded = compiled(ids, use_cache=False).logits
        assert torch.equal(loaded, model(ids, use_cache=False).logits)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function:DeprecationWarning")  # torch's own tracing
def test_training_compiled_code_keeps_the_master():
    model, ids = converted().train(), tokens()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled(ids, use_cache=False).logits.square().mean().backward()
    optimizer.step()
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.eval()
    with torch.no_grad():
        assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())
