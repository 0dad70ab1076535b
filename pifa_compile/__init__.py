"""Low-rank models through torch.compile: ``torch.compile(model, backend="pifa")``.

compress(model, recipe) factors a model's linear layers into the store; the backend finds them there by the content of
the weights. dry_run(model, *inputs) says what the backend would do with each layer, and why.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pifa_compile.hf.on_import import register_with_transformers

if TYPE_CHECKING:
    from pifa_compile.backend import pifa
    from pifa_compile.compression import CompressionReport, compress
    from pifa_compile.dryrun import DryRun, dry_run
    from pifa_compile.errors import PifaError
    from pifa_compile.factors import PairFactors, PifaFactors
    from pifa_compile.hf.folder import export
    from pifa_compile.importing import ImportReport, import_pairs
    from pifa_compile.modules import PifaLinear
    from pifa_compile.prepare import apply_, load, restore_
    from pifa_compile.recipes import Joint, Mpifa, Recipe, Svd, SvdLlm, recipe_from_json
    from pifa_compile.store import Store
    from pifa_compile.tuning import Tuning, TuningReport, tune

_HOME = {
    "CompressionReport": "compression",
    "DryRun": "dryrun",
    "Joint": "recipes",
    "PairFactors": "factors",
    "PifaError": "errors",
    "PifaFactors": "factors",
    "Recipe": "recipes",
    "Store": "store",
    "Svd": "recipes",
    "SvdLlm": "recipes",
    "Mpifa": "recipes",
    "compress": "compression",
    "apply_": "prepare",
    "dry_run": "dryrun",
    "export": "hf.folder",
    "ImportReport": "importing",
    "import_pairs": "importing",
    "load": "prepare",
    "pifa": "backend",
    "recipe_from_json": "recipes",
    "restore_": "prepare",
    "PifaLinear": "modules",
    "Tuning": "tuning",
    "TuningReport": "tuning",
    "tune": "tuning",
}

__all__ = [
    "CompressionReport",
    "DryRun",
    "ImportReport",
    "Joint",
    "Mpifa",
    "PairFactors",
    "PifaError",
    "PifaFactors",
    "PifaLinear",
    "Recipe",
    "Store",
    "Svd",
    "SvdLlm",
    "Tuning",
    "TuningReport",
    "apply_",
    "compress",
    "dry_run",
    "export",
    "import_pairs",
    "load",
    "pifa",
    "recipe_from_json",
    "restore_",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that importing the package costs next to nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'pifa_compile' has no attribute {name!r}")
    return getattr(import_module(f"pifa_compile.{_HOME[name]}"), name)


register_with_transformers()
