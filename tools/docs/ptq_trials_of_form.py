"""Trials that change the form of SmolLM2, not what it computes, before it is quantized: see try_ptq.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from ptq_trial import Setting
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mxlab.numerics import hadamard
from mxlab.ptq.divergence import logits_of, mean_divergence
from mxlab.ptq.pipeline import quantize_model
from mxlab.recipe import Recipe

_NOTHING = 1e-6  # nats that rounding in float32 may cost


def permutation(setting: Setting, _: float) -> dict[str, float]:
    """Spread the large inputs of down_proj over its blocks before it is transformed and quantized (PeRQ's MassDiff)."""
    masses: dict[int, Tensor] = {}
    layers = setting.original.model.layers
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, args, n=n: masses.update({n: masses.get(n, 0) + args[0].abs().mean((0, 1))})
        )
        for n, layer in enumerate(layers)
    ]
    _observe(setting, hooks)

    @torch.no_grad()
    def permute(model: Any) -> None:
        for n, layer in enumerate(model.model.layers):
            order, mlp = _spread(masses[n], 32), layer.mlp
            for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
                weight.copy_(weight[order].clone())
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order].clone())

    return _quantized_after(setting, permute)


def _observe(setting: Setting, hooks: Sequence[RemovableHandle]) -> None:
    """Have the hooks see the unquantized model read the calibration text, and remove them."""
    setting.calibrate(setting.original)
    for hook in hooks:
        hook.remove()


def _spread(mass: Tensor, size: int) -> Tensor:
    """Return an order in which blocks of ``size`` have masses as equal as taking the largest first makes them."""
    blocks: list[list[int]] = [[] for _ in range(len(mass) // size)]
    totals = [0.0] * len(blocks)
    for channel in mass.argsort(descending=True).tolist():
        least = min((n for n in range(len(blocks)) if len(blocks[n]) < size), key=lambda n: totals[n])
        blocks[least].append(channel)
        totals[least] += float(mass[channel])
    return torch.tensor([channel for block in blocks for channel in block])


def smoothing(setting: Setting, power: float) -> dict[str, float]:
    """Move a power of the inputs' sizes from behind the norms into the weights that read them (SmoothQuant)."""
    largest: dict[str, Tensor] = {}
    norms = [
        (f"{n}.{name}", getattr(layer, name))
        for n, layer in enumerate(setting.original.model.layers)
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    hooks = [
        norm.register_forward_hook(
            lambda _, __, y, key=key: largest.update(
                {key: torch.maximum(largest.get(key, torch.zeros(())), y.abs().amax((0, 1)))}
            )
        )
        for key, norm in norms
    ]
    _observe(setting, hooks)

    @torch.no_grad()
    def smooth(model: Any) -> None:
        for n, layer in enumerate(model.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            for name, readers in (
                ("input_layernorm", (attention.q_proj, attention.k_proj, attention.v_proj)),
                ("post_attention_layernorm", (mlp.gate_proj, mlp.up_proj)),
            ):
                weights = torch.cat([reader.weight for reader in readers]).abs().amax(0).clamp(min=1e-5)
                scale = largest[f"{n}.{name}"].clamp(min=1e-5).pow(power) / weights.pow(1 - power)
                getattr(layer, name).weight.div_(scale)
                for reader in readers:
                    reader.weight.mul_(scale)

    return _quantized_after(setting, smooth)


def residual_rotation(setting: Setting, transform: str) -> dict[str, float]:
    """Rotate the hidden states between the layers, fused into all weights around them (QuaRot).

    The gains of the norms are folded into what reads them, and the head gets a weight of its own. ``transform`` is what
    the linear layers do with their inputs besides.
    """
    signs = torch.randint(0, 2, (setting.original.config.hidden_size,), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def rotate(weight: nn.Parameter, axis: int) -> None:
        shape = [1, 1]
        shape[axis] = -1
        signed = weight.detach() * (signs * 2.0 - 1).view(shape)
        weight.copy_(hadamard.transform(signed, len(signs), axis))

    @torch.no_grad()
    def fold(norm: Any, *readers: Any) -> None:
        for reader in readers:
            reader.weight.mul_(norm.weight)
            rotate(reader.weight, 1)
        norm.weight.fill_(1)

    def rotate_all(model: Any) -> None:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
        rotate(model.model.embed_tokens.weight, 1)
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            fold(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
            fold(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
            for writer in (attention.o_proj, mlp.down_proj):
                rotate(writer.weight, 0)
        fold(model.model.norm, model.lm_head)

    linear = ({**rule, "transform": transform} if "weight" in rule else rule for rule in setting.rules)
    kept = [{key: value for key, value in rule.items() if value != "none"} for rule in linear]
    return _quantized_after(setting, rotate_all, kept)


def _quantized_after(
    setting: Setting, change: Callable[[Any], None], rules: list[dict[str, Any]] | None = None
) -> dict[str, float]:
    """Quantize the model, under other rules if any are given, after a change that leaves what it computes as it was."""
    model, original = setting.original_again(), setting.original_again()
    for one in (model, original):
        change(one)
    if (lost := mean_divergence(*(logits_of(m, setting.test[:1]) for m in (setting.original, model)))) > _NOTHING:
        raise AssertionError(f"the change is not one of form alone: it moves the predictions by {lost} nats")
    algorithms = {name: table for name, table in setting.recipe.algorithms.items() if name != "distillation"}
    changes = {"algorithms": algorithms, "rules": rules or setting.rules}
    recipe = Recipe.from_dict({**setting.recipe.to_dict(), **changes})
    quantize_model(model, original, recipe, setting.windows)
    return setting.score(model)
