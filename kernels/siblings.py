"""On CUDA, layers that read the same few tokens as one operator, two launches in all: ``pifa::siblings``.

    pifa::siblings(x, pivot_rows, coefficients, row_orders) -> y

y = [y_1, y_2, ...] side by side, N x (m_1 + m_2 + ...); each part is what ``pifa::linear`` computes of the factors of
one layer, without a bias. Factors come in lists, one tensor per layer; ``few.py`` has the kernels. m = out_features,
n = in_features, r = rank, N = number of tokens (all leading dimensions of x together). No gradients: the graph pass
makes this operator where none are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pifa_compile._torch import inductor, tf32_allowed
from pifa_compile.kernels import few, op
from pifa_compile.kernels.kernel_forms import available

SCHEMA = "siblings(Tensor x, Tensor[] pivot_rows, Tensor[] coefficients, Tensor[] row_orders) -> Tensor"

#: Layers in one operator at most: each adds its code to both kernels.
MOST = 4


def serves(device: torch.device, dtype: torch.dtype, tokens: int) -> bool:
    """Whether the device's table has tiles for layers of a dtype and so many tokens."""
    exact = dtype == torch.float32 and not tf32_allowed()
    return not exact and "few" in available(device, dtype, tokens)


def reference(
    x: Tensor, pivot_rows: Sequence[Tensor], coefficients: Sequence[Tensor], row_orders: Sequence[Tensor]
) -> Tensor:
    """The operator in plain PyTorch, on any device."""
    layers = zip(pivot_rows, coefficients, row_orders, strict=True)
    return torch.cat([op.reference(x, *factors) for factors in layers], -1)


def _fake(x: Tensor, pivot_rows: Any, coefficients: Any, row_orders: Sequence[Tensor]) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(order.shape[0] for order in row_orders)))


def lower(x: Any, pivot_rows: Sequence[Any], coefficients: Sequence[Any], row_orders: Sequence[Any]) -> Any:
    """Inductor IR of the operator; raises ValueError where no tile can be rendered."""
    call = inductor().call
    *lead, n = x.get_size()
    rows = call(torch.ops.aten.view, x, [math.prod(lead), n])
    y = few.lower(rows, pivot_rows, coefficients, row_orders)
    return call(torch.ops.aten.view, y, [*lead, y.get_size()[1]])


def _register() -> Any:
    """Define the operator once per process, also when this module is loaded again."""
    if not hasattr(torch.ops.pifa, "siblings"):
        library = torch.library.Library("pifa", "FRAGMENT")
        library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl("siblings", reference, "CompositeExplicitAutograd")
        torch.library.register_fake("pifa::siblings", _fake, lib=library)
        _LIBRARIES.append(library)
    return torch.ops.pifa.siblings.default


_LIBRARIES: list[Any] = []  # a library unregisters its operators when it is collected
siblings = _register()
