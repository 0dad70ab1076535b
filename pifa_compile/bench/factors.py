"""Factors that nobody has to compute: as fast as any others, and in a store at once.

m = out_features, n = in_features, r = rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pifa_compile.compression.layer import Layer, Unit, distinct_layers, factored_record, run_header
from pifa_compile.factors import PifaFactors, rank_for_density
from pifa_compile.layers import linear_weights
from pifa_compile.pivoting import Factorized
from pifa_compile.recipes import Svd
from pifa_compile.store import Store


def random_factors(
    m: int, n: int, r: int, dtype: torch.dtype, order: Tensor | None = None, *, seed: int = 0
) -> PifaFactors:
    """Factors of an m x n weight at rank r whose outputs are as large as the inputs; pivots anywhere, or as given."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(r, n, generator=generator).div_(n**0.5).to(dtype)
    coefficients = torch.randn(m - r, r, generator=generator).div_(r**0.5).to(dtype)
    if order is None:
        free = torch.randperm(m, generator=generator)
        order = torch.cat([free[:r].sort().values, free[r:].sort().values])
    return PifaFactors(rows, coefficients, order.to(torch.int32))


def put_random_factors(model: nn.Module, density: float, store: Store) -> None:
    """A run with random factors of the density for every linear layer of the model."""

    seeds = itertools.count()

    def make(layer: Layer) -> PifaFactors | None:
        m, n = layer.weight.shape
        r = rank_for_density(m, n, density, 16)
        return random_factors(m, n, r, layer.matrix.dtype, seed=next(seeds)) if r else None

    put_factors(model, density, make, store)


def put_factors(model: nn.Module, density: float, make: Callable[[Layer], PifaFactors | None], store: Store) -> None:
    """A run with what ``make`` gives for each linear layer of the model; None leaves one dense."""
    recipe = Svd(density=density, skip=("*lm_head*", "*embed*"))
    layers = distinct_layers(list(linear_weights(model)), recipe)
    with store.write_run(run_header(recipe, layers, "random")) as writer:
        for layer in layers:
            unit = Unit((layer,))
            factors = make(layer) if layer.reason is None else None
            if factors is None:
                for record in unit.dense(layer.reason or "too small"):
                    writer.add(record)
            else:
                made = Factorized(factors, 0.0, "random")
                writer.add(factored_record(unit, made, store.put_factors(factors), seconds=0.0))
        writer.finish()
