"""What a saved model's own file of code needs, for users who load with ``trust_remote_code=True``.

The file imports this package, which is all that has to happen. transformers also wants a class from it, and changes the
class it gets; so it is given a stand-in that loads transformers' own.
"""

from __future__ import annotations

from typing import Any

from pifa_compile.errors import InputError

MODULE = "pifa_model"
TEXT = '''"""Loads this model with trust_remote_code=True: importing pifa_compile makes transformers know its layers."""

from pifa_compile.hf.remote import loader


def __getattr__(name):
    return loader(name)
'''


class Loader:
    """The part of a model class that transformers' auto classes use."""

    from_pretrained: Any
    _from_config: Any

    @staticmethod
    def register_for_auto_class(auto_class: Any = "AutoModel") -> None:
        """Nothing: a model that is saved again is one of transformers' own, and no code goes with it."""


def loader(name: str) -> type[Loader]:
    """The stand-in for transformers' model class of this name."""
    import transformers

    kind: Any = getattr(transformers, name, None)
    if kind is None:
        raise InputError(f"this transformers release has no class {name}")
    return type(name, (Loader,), {"from_pretrained": kind.from_pretrained, "_from_config": kind._from_config})


def auto_map(model: Any) -> dict[str, str]:
    """For config.json: which of the names in the file the auto classes ask for that can make this model or its base."""
    from transformers.models.auto import modeling_auto

    found = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and type(model.config) in mapping:
            kinds = mapping[type(model.config)]
            kind = next((k for k in (kinds if isinstance(kinds, tuple) else (kinds,)) if k is type(model)), None)
            if kind is not None or name == "AutoModel":
                found[name] = f"{MODULE}.{type(model).__name__ if kind is not None else _first(kinds).__name__}"
    return found


def _first(kinds: Any) -> Any:
    return kinds[0] if isinstance(kinds, tuple) else kinds
