"""Factored layers from their forms, without memory, and the forms of the layers that a model has.

m = out_features, n = in_features, r = rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pifa_compile.factors import PairFactors, PifaFactors
from pifa_compile.hf.config import TENSORS, LayerForm, config_error
from pifa_compile.layers import LinearWeight, layout_of
from pifa_compile.modules import FactoredLinear, PairLinear, PifaLinear, factored_layers


def describe(model: nn.Module) -> dict[str, LayerForm]:
    """The forms of all factored layers of a model by name; of layers that share a tensor the first one owns it."""
    owners: dict[int, str] = {}
    found = {}
    for name, module in factored_layers(model):
        tensors = {key: getattr(module, key) for key in TENSORS[module.factors().form]}
        shares = {key: owners[id(t)] for key, t in tensors.items() if id(t) in owners}
        owners |= {id(t): name for key, t in tensors.items() if isinstance(t, nn.Parameter) and key not in shares}
        found[name] = form_of(module, shares)
    return found


def form_of(module: FactoredLinear, shares: Mapping[str, str]) -> LayerForm:
    """The form of one layer, which has the tensors ``shares`` from others."""
    bias = module.bias is not None
    if isinstance(module, PairLinear):
        return LayerForm("pair", module.rank, bias, shares=shares)
    mixed = module.coefficients.dtype != module.pivot_rows.dtype
    return LayerForm(
        "pifa",
        module.rank,
        bias,
        order=None if module.rows is None else module.row_order.shape[0],
        coefficients=str(module.coefficients.dtype).removeprefix("torch.") if mixed else None,
        y_exponent=module.y_exponent,
        shares=shares,
    )


def build(name: str, form: LayerForm, module: nn.Module) -> FactoredLinear:
    """A layer of this form, on the meta device, for the linear layer ``module``; raises InputError if it does not fit.

    Its dtype is that of the layer's weight. The layer may be on the meta device too.
    """
    layout, weight = layout_of(module), module._parameters.get("weight")
    if layout is None or weight is None:
        raise config_error(f"{name} is a {type(module).__name__}, not a linear layer")
    place = LinearWeight(name, weight, layout)
    (m, n), r, dtype = place.shape, form.rank, weight.dtype
    rows = m if form.order is None else form.order
    if r > min(rows, n) or rows < m:
        raise config_error(f"{name} is {m} x {n}, and its form is {form.to_json()}")
    bias = _meta(m, dtype=dtype) if form.bias else None
    settings: dict[str, Any] = {"layout": layout, "channel": place.channel, "requires_grad": True}
    if form.form == "pair":
        return PairLinear(PairFactors(_meta(m, r, dtype=dtype), _meta(r, n, dtype=dtype)), bias, **settings)
    mixed = dtype.itemsize == 2 and form.coefficients is not None  # as in PifaFactors.to: only in 16 bit
    coefficients = _meta(rows - r, r, dtype=getattr(torch, str(form.coefficients)) if mixed else dtype)
    pivot_rows, order = _meta(r, n, dtype=dtype), _meta(rows, dtype=torch.int32)
    factors = PifaFactors(pivot_rows, coefficients, order, 2.0**form.y_exponent)
    return PifaLinear(factors, bias, rows=None if form.order is None else m, **settings)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
