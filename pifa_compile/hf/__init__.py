"""At home in transformers: prepared models that are saved, shared and loaded by its own means.

``import pifa_compile`` makes ``from_pretrained`` know a folder that ``export`` or ``save_pretrained`` wrote, in
whatever order the two packages are imported. Without it transformers refuses such a folder: see ``config``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pifa_compile.hf.adapters import lora
    from pifa_compile.hf.config import PifaConfig
    from pifa_compile.hf.folder import export
    from pifa_compile.hf.quantizer import PifaQuantizer

_HOME = {"PifaConfig": "config", "PifaQuantizer": "quantizer", "export": "folder", "lora": "adapters"}

__all__ = ["PifaConfig", "PifaQuantizer", "export", "lora"]


def __getattr__(name: str) -> Any:
    """Names are imported on first use: this package is imported by ``pifa_compile``, transformers is not."""
    if name not in _HOME:
        raise AttributeError(f"module 'pifa_compile.hf' has no attribute {name!r}")
    return getattr(import_module(f"pifa_compile.hf.{_HOME[name]}"), name)
