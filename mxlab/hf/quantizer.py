"""mxlab as a quantization method of transformers.

``from_pretrained(name, quantization_config=MXConfig("ex1"))`` quantizes a model while it is loaded, a tensor at a time,
so that its weights are never all in memory in high precision; ``save_pretrained`` writes what is packed, and
``from_pretrained`` reads it back. This module is imported when the registry of transformers is, and registers the
method there (:mod:`mxlab._registration`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mxlab.errors import ConversionError, MxlabError
from mxlab.recipe import Recipe
from mxlab.recipe.carried import METHOD, carried_recipe


class MXConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a model that mxlab converts, or has converted.

    Args:
        recipe: a Recipe, the name of a shipped one, or a TOML file; as plain values in what :mod:`mxlab.model.saved`
            writes.
        storage: how the weights of linear layers are kept; see :func:`mxlab.apply`. Where none is given, ``packed`` for
            a model that is to be converted, and what a saved model has.
        frozen: of a saved model, the weights that are on the grid.
        packed: of a saved model, what its packed weights are.
    """

    def __init__(
        self,
        recipe: Recipe | str | Path | Mapping[str, Any],
        storage: str | None = None,
        frozen: Mapping[str, Any] | None = None,
        packed: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        from mxlab.compat.recipes import load_any_recipe
        from mxlab.model.apply import check_storage

        is_new = frozen is None and packed is None
        self.quant_method: Any = METHOD
        self.recipe = dict(recipe) if isinstance(recipe, Mapping) else load_any_recipe(recipe).to_dict()
        self.storage: Any = storage or ("packed" if is_new or packed else "grid")
        check_storage(self.storage)
        self.frozen, self.packed = dict(frozen or {}), dict(packed or {})


class MxlabQuantizer(HfQuantizer):
    """Converts a model while its weights are loaded; it is then like one that ``mxlab.apply`` converted."""

    requires_calibration = False
    quantization_config: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._failures: list[MxlabError] = []  # that transformers would only count

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Give the modules room for what a saved model has, or is to have."""
        from mxlab.model.apply import make_room, prepare, refuse_calibrated
        from mxlab.model.saved import make_packed_room

        recipe = self._recipe
        if not self._is_packed:
            make_room(model, recipe)
        elif self.pre_quantized:
            model.config.quantization_config = self.quantization_config.to_dict()
            make_packed_room(prepare(model, recipe), self.quantization_config.packed)
        else:
            refuse_calibrated(recipe)
            prepare(model.eval(), recipe)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from mxlab.model.apply import apply
        from mxlab.model.saved import check_packed

        if self._failures:
            raise self._failures[0]
        if self.pre_quantized:
            model.config.quantization_config = self.quantization_config.to_dict()
        elif hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        conversion = apply(model.eval(), self._recipe, self.quantization_config.storage)
        check_packed(conversion, self.quantization_config.packed)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        return model

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Convert ``model``, and leave nothing that would have transformers treat it as another kind of model."""
        self._process_model_after_weight_loading(model, **kwargs)
        for name in ("is_quantized", "quantization_method", "hf_quantizer"):
            vars(model).pop(name, None)
        return model

    @property
    def _recipe(self) -> Recipe:
        return carried_recipe(self.quantization_config.to_dict())

    @property
    def _is_packed(self) -> bool:
        return self.quantization_config.storage == "packed"

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a weight is packed as soon as it is loaded."""
        if self.pre_quantized or not self._is_packed:
            return False
        from mxlab.model.nn.linear import QuantizedLayer

        module, _, parameter = param_name.rpartition(".")
        layer = model.get_submodule(module)
        if parameter != "weight" or not isinstance(layer, QuantizedLayer):
            return False
        return layer.operands["prefill"].weight is not None

    def get_quantize_ops(self) -> Any:
        """Return what packs a weight (transformers 5)."""
        from transformers.core_model_loading import ConversionOps

        failures = self._failures

        class Pack(ConversionOps):
            def convert(self, input_dict: Any, *_: Any, model: Any = None, missing_keys: Any = None, **__: Any) -> Any:
                for name, value in input_dict.items():
                    try:
                        _pack(model, name, value[0] if isinstance(value, list) else value)
                    except MxlabError as e:
                        failures.append(e)
                    if missing_keys is not None:
                        missing_keys.discard(name)
                return {}

        return Pack()

    def create_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, target_device: Any, *_: Any, **__: Any
    ) -> None:
        """Pack a weight (transformers 4.57)."""
        _pack(model, param_name, param_value.to(target_device))

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Say that the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained."""
        return True


@torch.no_grad()
def _pack(model: Any, name: str, weight: Tensor) -> None:
    """Quantize the weight of a prepared linear layer, and keep it packed."""
    from mxlab.model.nn.packed import pack

    module = name.rpartition(".")[0]
    layer = model.get_submodule(module)
    if not weight.isfinite().all():
        raise ConversionError(f"the weight of {module} holds values that are NaN or infinite: repair the checkpoint")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    pack(layer, module)


auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = MXConfig
auto.AUTO_QUANTIZER_MAPPING[METHOD] = MxlabQuantizer
