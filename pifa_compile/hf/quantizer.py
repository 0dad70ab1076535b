"""``PifaQuantizer``: how transformers builds, fills, checks and saves a model with factored layers.

It is imported while transformers is, so what needs Inductor is imported where it is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from pifa_compile.errors import InputError
from pifa_compile.hf.config import GUARD, METHOD, VERSION, LayerForm, PifaConfig
from pifa_compile.hf.remote import MODULE


class PifaQuantizer(HfQuantizer):
    """Builds factored layers on the meta device before weights are read, and checks afterwards that all were there.

    The dense weight of a factored layer never exists. Factors are ordinary parameters: they train, cast and save.
    """

    quantization_config: PifaConfig
    requires_calibration = True  # a dense model is compressed by ``pifa_compile.compress``, not while it is loaded
    is_qat_trainable = True
    is_compileable = True
    is_trainable = True

    def __init__(self, quantization_config: PifaConfig, **settings: Any) -> None:
        super().__init__(quantization_config, **settings)
        self._places: dict[str, str] = {}  # where this model has the layers of the config

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        from pifa_compile.hf.layers import build

        modules = dict(model.named_modules())
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        forms = self.quantization_config.forms()
        for name in forms:  # a base model calls its layers by shorter names than the models around it
            candidates = (name, prefix + name, name.removeprefix(prefix))
            place = next((candidate for candidate in candidates if candidate in modules), None)
            if place is not None:
                self._places[name] = place
        if not self._places:
            first = next(iter(forms), "none")
            raise InputError(f"{type(model).__name__} has none of the {len(forms)} factored layers, e.g. {first}")
        for name, place in self._places.items():
            model.set_submodule(place, build(name, forms[name], modules[place]))
        self._share(model, forms)
        shared = [f"{self._places[name]}.{key}" for name in self._places for key in forms[name].shares]
        _ignore(model, "_keys_to_ignore_on_load_missing", [f"^{re.escape(key)}$" for key in shared])
        guards = [rf"(^|\.){re.escape(f'{name}.{GUARD}')}$" for name in self._places]
        _ignore(model, "_keys_to_ignore_on_load_unexpected", guards)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        from pifa_compile.modules import PifaLinear, factored_layers

        forms, layers = self.quantization_config.forms(), dict(factored_layers(model))
        fresh = []
        for name, place in self._places.items():
            own = {key: getattr(layers[place], key) for key in forms[name].tensors if key not in forms[name].shares}
            fresh += [f"{place}.{key}" for key, t in own.items() if not _was_read(t)]
        if fresh:
            listed = ", ".join(fresh[:5]) + (f" and {len(fresh) - 5} more" if len(fresh) > 5 else "")
            raise InputError(f"the checkpoint of {type(model).__name__} does not have {listed}; get or export it again")
        self._share(model, forms)
        for place in self._places.values():
            layer = layers[place]
            if not next(layer.parameters()).is_meta:
                layer.factors().validate(place)
            if isinstance(layer, PifaLinear):
                layer.refresh()
        model.is_quantized = False  # type: ignore[assignment]  # only refuses half() and float(), which factors can do
        _forget_remote_code(model)
        return model

    def _share(self, model: nn.Module, forms: Mapping[str, LayerForm]) -> None:
        """Layers that share a tensor get the owner's."""
        for name, place in self._places.items():
            for key, owner in forms[name].shares.items():
                if owner not in self._places:
                    raise InputError(f"{name} shares its {key} with {owner}, which the model has not")
                setattr(model.get_submodule(place), key, getattr(model.get_submodule(self._places[owner]), key))

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Dense again, from the factors."""
        from pifa_compile.prepare import restore_

        restored = restore_(model)
        return restored if dtype is None else restored.to(dtype)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What a checkpoint holds. The config that goes with it is of the layers that the model has now."""
        from pifa_compile.hf.layers import describe

        forms = describe(model)
        if not forms:
            self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
            return None, {}
        self.quantization_config = config_of(forms, like=self.quantization_config)
        model.config.quantization_config = self.quantization_config
        return checkpoint_tensors(model, forms), {}


def config_of(forms: Mapping[str, LayerForm], *, like: PifaConfig) -> PifaConfig:
    """The config of these layers, with the origin that another one names."""
    layers = {name: form.to_json() for name, form in forms.items()}
    return PifaConfig(layers, run=like.run, recipe=like.recipe, tuned=like.tuned, imported=like.imported)


def checkpoint_tensors(model: nn.Module, forms: Mapping[str, LayerForm]) -> dict[str, Tensor]:
    """The state of a model as a checkpoint holds it: what layers share once, and a guard for each."""
    state: dict[str, Tensor] = model.state_dict()
    seen: set[int] = set()
    for name, form in forms.items():
        for key in form.tensors:
            path = f"{name}.{key}"
            if key in form.shares:
                del state[path]
            elif not state[path].is_meta:
                storage = state[path].untyped_storage()
                if storage.nbytes() != state[path].nbytes or storage.data_ptr() in seen:
                    state[path] = state[path].clone()  # safetensors holds no views
                seen.add(storage.data_ptr())
        state[f"{name}.{GUARD}"] = torch.tensor([VERSION], dtype=torch.int32)
    return state


def attach(model: Any, config: PifaConfig) -> None:
    """Tell a prepared model what it is, as if it had been loaded with this config: ``save_pretrained`` asks for it."""
    model.hf_quantizer = PifaQuantizer(config)
    model.quantization_method = METHOD
    model.config.quantization_config = config


def register() -> None:
    """Make transformers know the method; does nothing the second time."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(PifaConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(PifaQuantizer)


def _was_read(tensor: Tensor) -> bool:
    """Whether transformers took the tensor from the checkpoint; what is offloaded to disk stays on the meta device."""
    return bool(getattr(tensor, "_is_hf_initialized", False)) or tensor.is_meta


def _ignore(model: nn.Module, attribute: str, patterns: list[str]) -> None:
    if patterns:
        setattr(model, attribute, {*(getattr(model, attribute, None) or ()), *patterns})


def _forget_remote_code(model: Any) -> None:
    """A model that is saved again has no file of code beside it, so its config must not name one."""
    named = getattr(model.config, "auto_map", None)
    if isinstance(named, dict):
        left = {key: value for key, value in named.items() if f"{MODULE}." not in str(value)}
        if left:
            model.config.auto_map = left
        else:
            del model.config.auto_map


register()
