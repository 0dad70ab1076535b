"""``PifaLinear``: a linear layer that owns its factors and has no dense weight.

m = out_features, n = in_features, r = rank. Importing this module registers the lowering of ``pifa::linear`` with
Inductor and adds the fingerprint of our sources to the key of the compile caches, so that a prepared model also
compiles well with torch's own backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pifa_compile import _torch
from pifa_compile.factors import Factors, PairFactors, PifaFactors
from pifa_compile.fingerprint import cache_tag
from pifa_compile.implied_weight import ImpliedWeight
from pifa_compile.kernels.op import gather_order, linear, two_linears
from pifa_compile.layers import Layout

_torch.add_cache_key_tag(cache_tag())


class _Factored(nn.Module):
    """What both factored layers share: the kind of layer they stand for, their sizes, and a convolution's channels.

    rows  how many of the factors' rows are the layer's outputs; the others are pivot rows of layers that it shares them
          with, see ``PifaFactors.part``
    """

    bias: nn.Parameter | None

    def __init__(
        self, bias: Tensor | None, layout: Layout, channel: int, requires_grad: bool, rows: int | None = None
    ) -> None:
        super().__init__()
        self.layout: Layout = layout
        self.channel = channel
        self.rows = rows
        self.bias = _parameter(bias, requires_grad)

    def factors(self) -> Factors:
        """The layer's factors, sharing memory with it."""
        raise NotImplementedError

    def _apply_factors(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def in_features(self) -> int:
        return self.factors().shape[1]

    @property
    def out_features(self) -> int:
        return self.rows or self.factors().shape[0]

    @property
    def rank(self) -> int:
        return self.factors().rank

    @property
    def weight(self) -> Tensor:
        """For models that look at it: the dense weight, as the layer that was replaced held it, but without memory.

        Its content is computed from the factors wherever it is used, with gradients into them. It cannot be written to.
        """
        if torch.compiler.is_compiling():  # where nobody uses more than its facts, the compiler drops the computation
            return self._dense()
        m, n = self.out_features, self.in_features
        shape = (n, m) if self.layout == "in_out" else (m, n, *[1] * (-1 - self.channel))
        return ImpliedWeight.of(shape, next(self.parameters()), self._dense)

    def _dense(self) -> Tensor:
        """The dense weight in the shape in which the layer that was replaced held it."""
        matrix = self._matrix()[: self.rows]
        return matrix.T if self.layout == "in_out" else matrix.reshape(*matrix.shape, *[1] * (-1 - self.channel))

    def _matrix(self) -> Tensor:
        """The product of the factors, rows in their places, differentiable, in their dtype; at least in float32."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m); a convolution's (N, n, *spatial) to (N, m, *spatial)."""
        if self.channel == -1:
            return self._apply_factors(x)
        y = self._apply_factors(x.movedim(self.channel, -1)).movedim(-1, self.channel)
        return y.contiguous() if x.is_contiguous() else y

    def weight_matrix(self) -> Tensor:
        """The m x n weight that the factors stand for (C P), in their dtype."""
        factors = self.factors()
        return factors.weight()[: self.rows].to(factors.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class PifaLinear(_Factored):
    """y = x W^T + b for a weight W (m x n) of rank r kept as pivot rows, coefficients and row order.

    pivot_rows    parameter, r x n
    coefficients  parameter, (m-r) x r
    row_order     buffer, m int32: entry i is the output row of position i in [pivots, others]
    bias          parameter, m, or None
    rows          how many of the m rows are outputs, where the pivot rows are shared with other layers; None: all
    channel       the dimension of x that holds the features, from the end: -1, or that of a convolution's channels
    """

    pivot_rows: nn.Parameter
    coefficients: nn.Parameter
    row_order: Tensor
    gather_order: Tensor

    def __init__(
        self,
        factors: PifaFactors,
        bias: Tensor | None = None,
        *,
        layout: Layout = "out_in",
        channel: int = -1,
        requires_grad: bool = False,
        rows: int | None = None,
    ) -> None:
        super().__init__(factors.bias if factors.bias is not None else bias, layout, channel, requires_grad, rows)
        self.y_exponent = round(math.log2(factors.y_scale))  # Dynamo takes an int as a constant, a float as an input
        self.pivot_rows = _own_parameter(factors.pivot_rows, requires_grad)
        self.coefficients = _own_parameter(factors.coefficients, requires_grad)
        self.register_buffer("row_order", factors.row_order)
        self.register_buffer("gather_order", factors.gather_order, persistent=False)
        self.register_load_state_dict_post_hook(_refresh)  # type: ignore[no-untyped-call]

    @property
    def y_scale(self) -> float:
        return 2.0**self.y_exponent

    def refresh(self) -> None:
        """Make the gather order follow a row order that was replaced."""
        if not self.row_order.is_meta:
            self.gather_order = gather_order(self.row_order)

    def factors(self) -> PifaFactors:
        """The layer's factors, sharing memory with it."""
        return PifaFactors(self.pivot_rows.data, self.coefficients.data, self.row_order, self.y_scale)

    def _apply_factors(self, x: Tensor) -> Tensor:
        plain = x.dtype == self.pivot_rows.dtype and not torch.is_autocast_enabled(x.device.type)
        compiling = torch.compiler.is_compiling() and not _torch.in_function_transform()
        if (compiling or not plain) and not _torch.exporting():
            # One node for passes and lowerings; and under autocast, or for a wrong dtype, the operator's own rules.
            # The operator has no rules for vmap and torch.func.grad: what it is made of has. What is exported must run
            # without this package, so it has operators of torch alone.
            bias = self.bias if self.rows is None else None
            y: Tensor = linear(x, self.pivot_rows, self.coefficients, self.row_order, bias, self.y_scale)
            if self.rows is None:
                return y
            y = y.narrow(-1, 0, self.rows)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        order = self.gather_order if self.rows is None else self.gather_order[: self.rows]
        y = two_linears(x, self.pivot_rows, self.coefficients, self.y_scale).index_select(-1, order)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _matrix(self) -> Tensor:
        wide = torch.promote_types(self.pivot_rows.dtype, torch.float32)
        rows = self.pivot_rows.to(wide)
        stacked = torch.cat([rows, self.coefficients.to(wide) @ rows])
        return stacked.index_select(0, self.gather_order).to(self.pivot_rows.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> PifaLinear:
        """As nn.Module does for to(), half() and cuda(); between 16-bit dtypes a mixed form keeps its coefficients."""
        mixed, coefficients = self.coefficients.dtype != self.pivot_rows.dtype, self.coefficients.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if mixed and self.pivot_rows.dtype.itemsize == 2:
            self.coefficients.data = coefficients.to(self.pivot_rows.device)
        return self


class PairLinear(_Factored):
    """y = x (left right)^T + b, a layer that is kept as a plain low-rank pair: left m x r, right r x n."""

    def __init__(
        self,
        factors: PairFactors,
        bias: Tensor | None = None,
        *,
        layout: Layout = "out_in",
        channel: int = -1,
        requires_grad: bool = False,
    ) -> None:
        super().__init__(factors.bias if factors.bias is not None else bias, layout, channel, requires_grad)
        self.left = _own_parameter(factors.left, requires_grad)
        self.right = _own_parameter(factors.right, requires_grad)

    def factors(self) -> PairFactors:
        """The layer's factors, sharing memory with it."""
        return PairFactors(self.left.data, self.right.data)

    def _apply_factors(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.right), self.left, self.bias)

    def _matrix(self) -> Tensor:
        wide = torch.promote_types(self.right.dtype, torch.float32)
        return (self.left.to(wide) @ self.right.to(wide)).to(self.right.dtype)


FactoredLinear = PifaLinear | PairLinear


def factored_layers(model: nn.Module) -> Iterator[tuple[str, FactoredLinear]]:
    """The factored layers of a model with their names, each once."""
    for name, module in model.named_modules():
        if isinstance(module, PifaLinear | PairLinear):
            yield name, module


def factored_module(
    factors: Factors,
    bias: Tensor | None,
    *,
    rows: tuple[int, int] | None = None,
    layout: Layout = "out_in",
    channel: int = -1,
    requires_grad: bool = False,
) -> FactoredLinear:
    """The module for factors of either form, or for the ``rows`` of them that are one layer's.

    Modules made of the same factors share the parameters that they have in common.
    """
    settings: dict[str, Any] = {"layout": layout, "channel": channel, "requires_grad": requires_grad}
    part = factors if rows is None else factors.part(*rows)
    if isinstance(part, PairFactors):
        return PairLinear(part, bias, **settings)
    return PifaLinear(part, bias, rows=None if rows is None else rows[1] - rows[0], **settings)


def as_parameters(factors: Factors, requires_grad: bool = False) -> Factors:
    """The factors with parameters for matrices, so that all modules made of them share these."""
    matrices = {name: t for name, t in factors.tensors().items() if t.dim() == 2}
    made: dict[str, Any] = {name: nn.Parameter(t, requires_grad) for name, t in matrices.items()}
    return replace(factors, **made)


def _parameter(tensor: Tensor | None, requires_grad: bool) -> nn.Parameter | None:
    return None if tensor is None else _own_parameter(tensor, requires_grad)


def _own_parameter(tensor: Tensor, requires_grad: bool) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad)


def _refresh(module: nn.Module, _: Any) -> None:
    if isinstance(module, PifaLinear):
        module.refresh()
