"""Compression: from a model and a recipe to factors in the store."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pifa_compile.compression.calibrated import compress_calibrated
from pifa_compile.compression.calibration import SelfText, Text, calibrate_on
from pifa_compile.compression.devices import blocks_on_demand
from pifa_compile.compression.walk import compress_weights
from pifa_compile.errors import InputError, WeightError
from pifa_compile.layers import held_weights, linear_weights
from pifa_compile.recipes import Calibrated, Recipe
from pifa_compile.reports import CompressionReport
from pifa_compile.store import Store

#: Why a calibrated method leaves a weight dense that is no module's own.
HELD = "held by its attention, which is no linear layer: a method that needs no data takes it"

__all__ = ["CompressionReport", "compress", "compress_weights"]


def compress(
    model: nn.Module,
    recipe: Recipe,
    *,
    text: Text | None = None,
    tokenizer: Any = None,
    store: Store | str | os.PathLike[str] | None = None,
    name: str | None = None,
    revision: str | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> CompressionReport:
    """Factor the linear layers of a model into the store; the model itself stays as it is.

    model     any module; its linear layers are found by type, its output embedding is left dense
    recipe    method, density and settings, e.g. ``Svd(density=0.6)`` or ``Mpifa(density=0.6)``
    text      what a calibrated method looks at: a file (as a Path), a dataset (``datasets:NAME``), a text, a list of
              texts, token windows (count x length), batches, a DataLoader or a Dataset; None: a causal model samples
              its own text. See ``calibrate_on``
    tokenizer needed to read text
    store     a Store or its directory; default: PIFA_CACHE_DIR, else the Hugging Face assets cache
    name      a label for reports; default: the name the model was loaded by, else its class
    revision  a label for the model's revision
    device    where to compute, for a calibrated method; default: where the model is. Blocks of a model that is
              elsewhere go there one at a time, so that the model may be larger than the device

    The same model, recipe and text are never computed twice: a second call returns the finished run, and one that was
    interrupted goes on where it stopped. Raises WeightError for a model without a linear layer, with a weight that is
    not finite or with inputs to a layer that are not; InputError for a text that cannot be used, a device that is not
    there, and for tensors without content (on the meta device) where the model has to run.
    """
    weights = list(linear_weights(model))
    if not weights:
        raise WeightError(type(model).__name__, "the model has no linear layer", "nothing can be compressed")
    opened = store if isinstance(store, Store) else Store(None if store is None else Path(store))
    label = name or model_label(model)
    place = next(model.parameters()).device if device is None else _device(device)
    if isinstance(recipe, Calibrated):
        _check_content(model)
        size = {"windows": recipe.windows, "length": recipe.window_length, "seed": recipe.seed}
        calibration = SelfText(model, **size) if text is None else calibrate_on(model, text, tokenizer, **size)
        weights += [replace(w, reason=w.reason or HELD) for w in held_weights(model)]
        facts: dict[str, Any] = {"label": label, "revision": revision, "progress": progress, "device": place}
        with blocks_on_demand(model, place):
            run = compress_calibrated(model, weights, recipe, opened, calibration, **facts)
    else:
        if text is not None:
            raise InputError(f"method {recipe.method!r} uses no text; leave it out, or use 'mpifa'")
        if (there := next(model.parameters()).device) != place:
            cure = f"leave device={str(place)!r} out, or move the model there"
            raise InputError(f"method {recipe.method!r} computes where the weights are, on {there}; {cure}")
        weights += held_weights(model)
        run = compress_weights(weights, recipe, opened, model=label, revision=revision, progress=progress)
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    return CompressionReport(run, opened.root, total)


def _device(given: torch.device | str) -> torch.device:
    """The device, with its number if it has one; InputError where there is none or nothing can be computed on it."""
    try:
        found = torch.empty(0, device=given).device
    except (RuntimeError, AssertionError, TypeError) as error:  # the second: a build of torch without CUDA
        problem = (str(error).splitlines() or [""])[0]
        raise InputError(f"device {str(given)!r}: {problem}; leave it out to compute where the model is") from None
    if found.type == "meta":
        raise InputError("device 'meta': nothing can be computed there; leave it out to compute where the model is")
    return found


def _check_content(model: nn.Module) -> None:
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_meta:
            cure = "load the whole model into memory first, or use a method that needs no data"
            raise InputError(f"{name} is on the meta device and has no content, and the model has to run; {cure}")


def model_label(model: nn.Module) -> str:
    """The name a Hugging Face model was loaded by, else the class."""
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", "") or type(model).__name__
