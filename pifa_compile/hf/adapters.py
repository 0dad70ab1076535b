"""LoRA adapters of PEFT on factored layers: ``lora(config)`` tells PEFT what to put there.

PEFT keeps a list of layer types that it knows, and takes others from the config of an adapter, which it calls
experimental. It does not save those, so a config that is read from a file needs the same call. Needs the package peft.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear

from pifa_compile.errors import InputError
from pifa_compile.modules import FactoredLinear, PairLinear, PifaLinear


def lora(config: LoraConfig) -> LoraConfig:
    """Let adapters of this config be put on factored layers; returns the config.

        model = get_peft_model(model, lora(LoraConfig(target_modules=["q_proj", "v_proj"])))
        model = PeftModel.from_pretrained(model, folder, config=lora(LoraConfig.from_pretrained(folder)))

    The adapter trains, the factors stay as they are. There is no dense weight to merge it into: to merge is an error,
    until ``pifa_compile.restore_(model)`` has made the layers below the adapters dense. Raises InputError for
    ``target_modules="all-linear"``, which means the types that PEFT knows.
    """
    if config.target_modules == "all-linear":
        raise InputError("all-linear does not mean factored layers to PEFT; name them in target_modules, e.g. q_proj")
    config._register_custom_module({PifaLinear: FactoredLora, PairLinear: FactoredLora})
    return config


class FactoredLora(Linear):
    """LoRA beside a factored layer: y = layer(x) + scaling B A x."""

    def __init__(self, base_layer: Any, adapter_name: str, config: LoraConfig, **settings: Any) -> None:
        factored: FactoredLinear = base_layer.get_base_layer() if hasattr(base_layer, "get_base_layer") else base_layer
        if factored.channel != -1:
            cure = "leave it out of target_modules"
            raise InputError(f"{settings.get('target_name', 'a layer')} is a 1x1 convolution in factors; {cure}")
        super().__init__(base_layer, adapter_name, config=config, **settings)
        self.fan_in_fan_out = factored.layout == "in_out"  # for the dense layer that restore_ makes

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        """n and m; of a layer whose type it does not know PEFT takes them with a warning."""
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As for a dense layer, once the layer is one; raises InputError while it is factored."""
        if isinstance(self.get_base_layer(), PifaLinear | PairLinear):
            cure = "make the layers dense first: pifa_compile.restore_(model)"
            raise InputError(f"an adapter cannot be merged into a factored layer, which has no dense weight; {cure}")
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
