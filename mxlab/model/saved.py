"""What a saved model says of its quantization in ``config.json``, so that it is never quantized a second time.

``save_pretrained`` of a converted model adds a ``quantization_config``: the recipe, and by name the frozen weights with
their fingerprints. A model that is loaded with it is converted under that recipe (:mod:`mxlab.hf.quantizer`); weights
that have the fingerprint are on the grid already and stay, others are quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from mxlab.errors import ConversionError, SourceError
from mxlab.model.conversion import Conversion
from mxlab.model.nn.experts import QuantizedExperts
from mxlab.model.nn.forward import override_of
from mxlab.model.nn.linear import QuantizedLayer
from mxlab.model.nn.packed import check_numbers, make_packed, packable_format
from mxlab.model.nn.weights import FrozenWeight, QuantizedWeight, TensorVersion
from mxlab.model.plan import QuantizedSite
from mxlab.numerics.fingerprints import fingerprint
from mxlab.packed import MXTensor
from mxlab.recipe import Recipe
from mxlab.recipe.carried import METHOD


class SavePretrained:
    """Takes the place of a converted model's ``save_pretrained`` and adds what the model is to its configuration."""

    def __init__(self, conversion: Conversion) -> None:
        self.conversion = conversion

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Freeze the weights that can be, and save the model."""
        model: Any = self.conversion.model
        state = kwargs.get("state_dict") or model.state_dict()
        model.config.quantization_config = quantization_config(self.conversion, state)
        try:
            return type(model).save_pretrained(model, *args, **kwargs)
        finally:
            del model.config.quantization_config

    def install(self) -> None:
        """Save the model so, from now on, if it is one of transformers'."""
        model = self.conversion.model
        if hasattr(model, "save_pretrained") and hasattr(model, "config"):
            vars(model)["save_pretrained"] = self


def conversion_of(model: nn.Module) -> Conversion | None:
    """Return what was done to a model of transformers' that is converted; None where nothing was."""
    saver = vars(model).get("save_pretrained")
    return saver.conversion if isinstance(saver, SavePretrained) else None


def quantization_config(conversion: Conversion, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the ``quantization_config`` of a converted model whose weights are saved as ``state`` has them."""
    frozen = {}
    for site, name, weight in _weights(conversion):
        if site.is_in_place and name in state and weight.is_frozen(getattr(site.module, site.parameter)):
            frozen[name] = recorded(state[name])
    packed = {site.name: _described(site.module.packed) for site in conversion.linears if _is_packed(site)}
    found = {"quant_method": METHOD, "recipe": conversion.recipe.to_dict(), "frozen": frozen}
    return found | ({"packed": packed} if packed else {})


def recorded(weight: Tensor) -> list[Any]:
    """Return what recognises a weight, as it stands in the table ``frozen``."""
    version = TensorVersion(weight)
    return [str(version.dtype).removeprefix("torch."), version.fingerprint]


def carried_config(model: nn.Module) -> dict[str, Any] | None:
    """Return the ``quantization_config`` that mxlab wrote for a model; None where there is none, or another's."""
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    found = config.to_dict() if hasattr(config, "to_dict") else config
    return dict(found) if isinstance(found, Mapping) and found.get("quant_method") == METHOD else None


def frozen_versions(config: Mapping[str, Any] | None) -> dict[str, TensorVersion]:
    """Return, by parameter, what recognises the weights that were on the grid when the model was saved.

    Raises:
        ConversionError: they are not written as mxlab writes them.
    """
    try:
        return {
            name: TensorVersion.recorded(getattr(torch, dtype), int(number))
            for name, (dtype, number) in (config or {}).get("frozen", {}).items()
        }
    except (AttributeError, TypeError, ValueError):
        raise ConversionError("the model's quantization_config has a broken table frozen; convert it anew") from None


def expect_frozen(conversion: Conversion, versions: Mapping[str, TensorVersion]) -> None:
    """Take the weights that have these values, once they are there, for frozen ones."""
    for _, name, weight in _weights(conversion):
        if name in versions:
            weight.expect(versions[name])


def make_packed_room(conversion: Conversion, descriptions: Mapping[str, Any]) -> None:
    """Make the layers of a model on the meta device packed ones, for the weights that a saved model has.

    Args:
        conversion: of the model, before its weights are loaded.
        descriptions: what :meth:`mxlab.packed.MXTensor.description` gave, by the name of the layer.

    Raises:
        ConversionError: a layer that is not there, is not quantized, or has another format or shape by the recipe.
        SourceError: a layout that is not known.
    """
    sites = {site.name: site for site in conversion.linears if isinstance(site.module, QuantizedLayer)}
    for name, description in descriptions.items():
        empty = MXTensor.empty(description, f"{name}.weight", "meta")
        site = sites.get(name)
        if (
            site is None
            or site.shape != empty.shape
            or packable_format(site.by_phase.values(), name, "weight") != empty.fmt
        ):
            wanted = "no quantized layer" if site is None else f"{site.shape} of {site.formats.get('weight')}"
            raise ConversionError(
                f"{name} is packed as {empty.shape} of {empty.fmt}, and by the model and its recipe is {wanted}: "
                "config.json does not fit the model; save it anew"
            )
        make_packed(site.module, empty, name)


def check_packed(conversion: Conversion, descriptions: Mapping[str, Any]) -> None:
    """Raise SourceError where a packed weight that was loaded is not what was saved.

    Where a file lacks a tensor, transformers takes memory as it is; that is found here, too.
    """
    for site in conversion.linears:
        if site.name in descriptions and _is_packed(site):
            check_numbers(site.module.packed.fmt, site.module.packed.scales, site.name)
            if _described(site.module.packed) != dict(descriptions[site.name]):
                raise SourceError(
                    f"{site.name}: the packed weight in the files of the model is not what was saved: they are damaged "
                    "or incomplete; fetch or save it again"
                )


def _described(weight: MXTensor) -> dict[str, Any]:
    """Return what stands in the table ``packed`` of a weight: its description, and fingerprints of what is stored."""
    found = {part: fingerprint(tensor) for part, tensor in weight.tensors().items()}
    return {**weight.description(), "fingerprints": found}


def _is_packed(site: QuantizedSite) -> TypeGuard[Any]:
    return site.is_packed


def check_same(present: Recipe, wanted: Recipe) -> None:
    """Raise ConversionError unless ``wanted`` is the recipe under which a model is quantized already."""
    if present.hash == wanted.hash:
        return
    remedy = (
        "take its own recipe, or load the unquantized model for another"
        if wanted.quantizes
        else "for a baseline load the model that it was made from"
    )
    raise ConversionError(
        f"this model is quantized already, under a recipe {present.name} that is not the recipe {wanted.name} asked "
        f"for: {remedy}"
    )


def _weights(conversion: Conversion) -> Iterator[tuple[QuantizedSite, str, FrozenWeight]]:
    """Yield each site with a weight, the qualified name of its parameter, and what knows whether it is frozen."""
    for site in conversion.linears:
        name = f"{site.module_name}.{site.parameter}"
        if isinstance(site.module, QuantizedWeight):
            yield site, name, site.module.frozen
        elif isinstance(experts := override_of(site.module), QuantizedExperts):
            yield site, name, experts.frozen_weight(site.parameter)
