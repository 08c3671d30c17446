"""Measure what was tried on calibrated models and left out of mxlab, a line of OUT/tried.jsonl each.

python tools/docs/try_ptq.py --data-dir DATA --folder FOLDER --out results/smollm2-135m/ptq TRIAL ...

FOLDER holds what ``mxlab quantize smollm2 --recipe R -o FOLDER`` saved under the recipe given by ``--recipe``, by which
those trials that change the model before it is quantized quantize it themselves. Each is evaluated on the first 8
windows of 512 tokens of WikiText-2's test split, beside the folder as it is (the trial ``nothing``).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mxlab.compat.recipes import load_any_recipe
from mxlab.eval.metrics import kl_divergence
from mxlab.experiments import provenance
from mxlab.model.conversion import Conversion
from mxlab.model.nn.attention import QuantizedAttention
from mxlab.model.observe import observe_inputs
from mxlab.model.saved import conversion_of
from mxlab.ptq.blocks import BlockStream, decoder_layers
from mxlab.ptq.calibration import Windows, sample
from mxlab.ptq.divergence import logits_of
from mxlab.ptq.pipeline import quantize_model
from mxlab.ptq.sites import layer_at, weight_in_basis
from mxlab.recipe import Recipe
from mxlab.recipe.algorithms import Calibration
from mxlab.sources.models import load_model
from mxlab.sources.texts import encode, load_text

ROWS = "tried.jsonl"
WINDOW, WINDOWS = 512, 8
CALIBRATED = 16  # windows of the calibration text from which a trial takes its own statistics

KeyValue = Callable[[str, str, Tensor, Callable[[Tensor], Tensor]], Tensor]  # attention, role, operand, its quantizing


class Setting:
    """The quantized model beside the unquantized one, and the texts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.recipe = options, load_any_recipe(options.recipe)
        loaded = load_model("smollm2", "float32", "cpu")
        self.original = loaded.model

        def ids(name: str) -> Tensor:
            return encode(loaded.tokenizer, load_text(name, options.data_dir))

        calibration = self.recipe.algorithm("calibration") or Calibration()
        self.windows: Windows = sample(ids(calibration.text), calibration)
        self.test = ids("wikitext2")[: WINDOW * WINDOWS].view(WINDOWS, WINDOW)

    def quantized(self) -> nn.Module:
        """Return the model in the folder, anew."""
        return load_model(str(self.options.folder), "float32", "cpu").model

    def original_again(self) -> Any:
        """Return one more copy of the unquantized model."""
        return load_model("smollm2", "float32", "cpu").model

    @torch.no_grad()
    def calibrate(self, model: Any) -> None:
        """Pass the windows through a model from which a trial takes its own statistics."""
        for window in self.windows.ids[:CALIBRATED].split(1):
            model(window, use_cache=False)

    @torch.no_grad()
    def score(self, model: Any) -> dict[str, float]:
        """Return the metrics of a model on the test text."""
        divergence = cross_entropy = 0.0
        for window in self.test.split(1):
            wanted, found = (logits_of(m, window)[0, :-1].float() for m in (self.original, model))
            divergence += kl_divergence(wanted, found).double().mean().item()
            cross_entropy += nn.functional.cross_entropy(found, window[0, 1:]).item()
        return {"kl_divergence": divergence / WINDOWS, "perplexity": math.exp(cross_entropy / WINDOWS)}


@contextmanager
def keys_and_values(quantizing: KeyValue) -> Iterator[None]:
    """Have every attention quantize K and V in another way, as long as the context is open."""
    on_grid = QuantizedAttention._on_grid

    def changed(self: QuantizedAttention, role: str, x: Tensor, fmt: Any, axis: int) -> Tensor:
        return quantizing(self._name, role, x, lambda y: on_grid(self, role, y, fmt, axis))

    QuantizedAttention._on_grid = changed
    try:
        yield
    finally:
        QuantizedAttention._on_grid = on_grid


def _seen(setting: Setting, model: Any, of: Callable[[Tensor], Tensor]) -> dict[tuple[str, str], Tensor]:
    """Return the sum of a statistic of K and V by attention and role."""
    sums: dict[tuple[str, str], Tensor] = {}

    def collect(name: str, role: str, x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        sums[name, role] = sums.get((name, role), torch.zeros(())) + of(x)
        return quantize(x)

    with keys_and_values(collect):
        setting.calibrate(model)
    return sums


def first_tokens(setting: Setting, count: int) -> dict[str, float]:
    """Leave K and V of the first tokens unquantized (PrefixQuant, KVQuant)."""

    def quantizing(_: str, __: str, x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([x[:, :, :count], quantize(x)[:, :, count:]], 2)

    with keys_and_values(quantizing):
        return setting.score(setting.quantized())


def pair_scale(setting: Setting, power: float) -> dict[str, float]:
    """Divide K by a power of the size of each rotary pair, which the query is multiplied by (KVSmooth)."""
    model = setting.quantized()
    squares = _seen(setting, model, lambda x: x.square().sum((0, 2)))

    def quantizing(name: str, role: str, x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        if role != "k":
            return quantize(x)
        pairs = squares[name, role].unflatten(-1, (2, -1)).sum(-2).sqrt()
        scale = (pairs / pairs.mean(-1, keepdim=True)).clamp(min=1e-2).pow(power).repeat(1, 2)[:, None]
        return quantize(x / scale) * scale

    with keys_and_values(quantizing):
        return setting.score(model)


def mean_of_values(setting: Setting, _: float) -> dict[str, float]:
    """Quantize V without its mean, which is added again behind the softmax (SageAttention)."""
    model = setting.quantized()
    means = _seen(setting, model, lambda x: x.mean((0, 2)) / CALIBRATED)

    def quantizing(name: str, role: str, x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        mean = means[name, role][:, None] if role == "v" else torch.zeros(())
        return quantize(x - mean) + mean

    with keys_and_values(quantizing):
        return setting.score(model)


@torch.no_grad()
def bias(setting: Setting, _: float) -> dict[str, float]:
    """Add to the hidden states after each layer what their mean has lost."""
    model = setting.quantized()
    names, ids = decoder_layers(model), setting.windows.ids[:CALIBRATED]
    ours, theirs = (BlockStream(m, names, ids) for m in (model, setting.original))
    for layer, name in enumerate(names):
        wanted, found = theirs.outputs(layer), ours.outputs(layer)
        lost = torch.stack([w - f for w, f in zip(wanted, found, strict=True)]).mean((0, 1, 2))
        model.get_submodule(name).register_forward_hook(lambda _, __, output, lost=lost: output + lost)
        ours.hidden, theirs.hidden = [f + lost for f in found], wanted
    return setting.score(model)


@torch.no_grad()
def low_rank(setting: Setting, rank: int) -> dict[str, float]:
    """Add a product of low rank to each weight, of what its rounding has lost (QERA, the approximate form)."""
    model = setting.quantized()
    conversion = conversion_of(model)
    assert conversion is not None
    bits = count = 0.0
    for site, size in _input_sizes(setting, model, conversion).items():
        layer = layer_at(site)
        weight = setting.original.get_submodule(site.name).weight.detach()
        wanted = weight_in_basis(weight, layer.operands["prefill"], layer.input_transform)
        u, s, v = torch.linalg.svd((wanted - layer.weight) * size, full_matrices=False)
        left, right = (u[:, :rank] * s[:rank]).bfloat16().float(), (v[:rank] / size).bfloat16().float()

        def add(module: Any, args: tuple, output: Tensor, left: Tensor = left, right: Tensor = right) -> Tensor:
            x = module.mx.on_activation(args[0], matrices=module.input_transform)
            return output + x @ right.t() @ left.t()

        layer.register_forward_hook(add)
        bits, count = bits + 16 * (left.numel() + right.numel()), count + weight.numel()
    return {**setting.score(model), "bits_more": bits / count}


def _input_sizes(setting: Setting, model: Any, conversion: Conversion) -> dict[Any, Tensor]:
    """Return the root of the mean square of each input of each linear layer, as it is multiplied."""
    sums: dict[Any, Tensor] = {}

    def see(site: Any, x: Tensor) -> None:
        layer = layer_at(site)
        seen = layer.operands["prefill"].on_activation(x, matrices=layer.input_transform)
        sums[site] = sums.get(site, torch.zeros(())) + seen.square().mean((0, 1)) / CALIBRATED

    with observe_inputs(conversion, see):
        setting.calibrate(model)
    return {site: total.sqrt().clamp(min=1e-6) for site, total in sums.items()}


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
    setting.calibrate(setting.original)
    for hook in hooks:
        hook.remove()

    @torch.no_grad()
    def permute(model: Any) -> None:
        for n, layer in enumerate(model.model.layers):
            order, mlp = _spread(masses[n], 32), layer.mlp
            for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
                weight.copy_(weight[order].clone())
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order].clone())

    return _quantized_after(setting, permute)


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
    setting.calibrate(setting.original)
    for hook in hooks:
        hook.remove()

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


def _quantized_after(setting: Setting, change: Callable[[Any], None]) -> dict[str, float]:
    """Quantize the model after a change that leaves what it computes as it was."""
    model, original = setting.original_again(), setting.original_again()
    for one in (model, original):
        change(one)
    algorithms = {name: table for name, table in setting.recipe.algorithms.items() if name != "distillation"}
    recipe = Recipe.from_dict({**setting.recipe.to_dict(), "algorithms": algorithms})
    quantize_model(model, original, recipe, setting.windows)
    return setting.score(model)


TRIALS: dict[str, tuple[Callable[[Setting, Any], dict[str, float]], tuple[Any, ...]]] = {
    "nothing": (lambda setting, _: setting.score(setting.quantized()), (None,)),
    "first_tokens": (first_tokens, (4,)),
    "pair_scale": (pair_scale, (0.5,)),
    "mean_of_values": (mean_of_values, (None,)),
    "bias": (bias, (None,)),
    "low_rank": (low_rank, (32,)),
    "permutation": (permutation, (None,)),
    "smoothing": (smoothing, (0.5,)),
}


def main() -> None:
    """Make the trials that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="+", choices=TRIALS)
    parser.add_argument("--recipe", default="mxfp4_w4a4kv4_best")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    setting = Setting(options)
    for name in options.trials:
        trial, values = TRIALS[name]
        for value in values:
            found = trial(setting, value)
            row = {"trial": name, "value": value, "recipe": setting.recipe.name, **found}
            print(json.dumps(row), flush=True)
            with (options.out / ROWS).open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({**row, "environment": provenance.describe()}) + "\n")


if __name__ == "__main__":
    main()
