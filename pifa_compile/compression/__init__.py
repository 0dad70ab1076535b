"""Compression: from a model and a recipe to factors in the store."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from pifa_compile.compression.walk import compress_weights
from pifa_compile.errors import WeightError
from pifa_compile.layers import linear_weights
from pifa_compile.recipes import Recipe
from pifa_compile.reports import CompressionReport
from pifa_compile.store import Store

__all__ = ["CompressionReport", "compress", "compress_weights"]


def compress(
    model: nn.Module,
    recipe: Recipe,
    *,
    store: Store | str | os.PathLike[str] | None = None,
    name: str | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> CompressionReport:
    """Factor the linear layers of a model into the store; the model itself stays as it is.

    model     any module; its linear layers are found by type, its output embedding is left dense
    recipe    method, density and settings, e.g. ``Svd(density=0.6)``
    store     a Store or its directory; default: PIFA_CACHE_DIR, else the Hugging Face assets cache
    name      a label for reports; default: the name the model was loaded by, else its class
    revision  a label for the model's revision

    The same model and recipe are never computed twice: a second call returns the finished run, and one that was
    interrupted goes on where it stopped. Raises WeightError for a model without a linear layer or with a weight that
    is not finite.
    """
    weights = list(linear_weights(model))
    if not weights:
        raise WeightError(type(model).__name__, "the model has no linear layer", "nothing can be compressed")
    opened = store if isinstance(store, Store) else Store(None if store is None else Path(store))
    label = name or model_label(model)
    run = compress_weights(weights, recipe, opened, model=label, revision=revision, progress=progress)
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    return CompressionReport(run, opened.root, total)


def model_label(model: nn.Module) -> str:
    """The name a Hugging Face model was loaded by, else the class."""
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", "") or type(model).__name__
