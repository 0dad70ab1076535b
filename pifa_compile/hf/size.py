"""How many numbers a prepared model keeps, and how many it would have dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from pifa_compile.hf.config import LayerForm
from pifa_compile.modules import FactoredLinear, factored_layers


@dataclass(frozen=True)
class Size:
    """Numbers of the factored layers (``dense`` if they were dense, ``kept`` as they are), and of the whole model."""

    dense: int
    kept: int
    whole_dense: int
    whole_kept: int

    @property
    def density(self) -> float:
        """Of the factored layers."""
        return self.kept / self.dense

    @property
    def model_density(self) -> float:
        """Of the whole model."""
        return self.whole_kept / self.whole_dense


def size_of(model: nn.Module, forms: Mapping[str, LayerForm]) -> Size:
    """The size of a model whose factored layers have these forms (``describe`` tells them); one layer at least."""
    layers = dict(factored_layers(model))
    dense = sum(layer.out_features * layer.in_features for layer in layers.values())
    kept = sum(numbers(layers[place], form) for place, form in forms.items())
    every = sum(p.numel() for p in model.parameters())
    every += sum(_pivots(layers[place], form) for place, form in forms.items())
    return Size(dense, kept, every - kept + dense, every)


def numbers(layer: FactoredLinear, form: LayerForm) -> int:
    """Numbers that the layer keeps by itself: its matrices, and one per pivot for the row order; bias excluded."""
    own = [getattr(layer, key) for key in form.tensors if key != "bias" and key not in form.shares]
    found: int = sum(t.numel() for t in own if t.dim() == 2)
    return found + _pivots(layer, form)


def _pivots(layer: FactoredLinear, form: LayerForm) -> int:
    return layer.rank if form.form == "pifa" and "pivot_rows" not in form.shares else 0
