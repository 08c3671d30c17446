"""mxlab as a quantization method of transformers: ``from_pretrained`` of a saved converted model converts it.

:func:`register` is called when transformers' own registry is imported (:mod:`mxlab._registration`).
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mxlab.recipe.carried import METHOD, carried_recipe


class MxlabConfig(QuantizationConfigMixin):
    """The ``quantization_config`` that :mod:`mxlab.model.saved` writes."""

    def __init__(self, recipe: dict[str, Any], frozen: dict[str, Any] | None = None, **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.recipe, self.frozen = recipe, frozen or {}


class MxlabQuantizer(HfQuantizer):
    """Converts a model once its weights are loaded; it is then like one that ``mxlab.apply`` converted."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Give the modules room for what was fitted, which is part of the checkpoint."""
        from mxlab.model.apply import make_room

        make_room(model, carried_recipe(self.quantization_config.to_dict()))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from mxlab.model.apply import apply

        config = self.quantization_config.to_dict()
        model.config.quantization_config = config
        apply(model.eval(), carried_recipe(config))
        del model.config.quantization_config
        return model

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Convert ``model``, and leave nothing that would have transformers treat it as another kind of model."""
        self._process_model_after_weight_loading(model, **kwargs)
        for name in ("is_quantized", "quantization_method", "hf_quantizer"):
            vars(model).pop(name, None)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Say that the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained."""
        return True


def register() -> None:
    """Tell transformers of the method."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = MxlabConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = MxlabQuantizer
