"""On CUDA, layers that read the same few tokens as one operator, two launches in all: ``pifa::siblings``.

    pifa::siblings(x, pivot_rows, coefficients, row_orders) -> y

y = [y_1, y_2, ...] side by side, N x (m_1 + m_2 + ...); each part is what ``pifa::linear`` computes of the factors of
one layer, without a bias. Factors come in lists, one tensor per layer, and stay where they are: programs of one launch
pick the layer that they work for. m = out_features, n = in_features, r = rank, N = number of tokens (all leading
dimensions of x together).

With few tokens a layer is one read of its weights, and a launch costs as much as many kilobytes of them. No gradients:
the graph pass makes this operator where none are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pifa_compile._torch import autotuner, device_name, dtype_name, inductor, tf32_allowed
from pifa_compile.kernels import op
from pifa_compile.kernels.tail import some_order
from pifa_compile.kernels.tile_tables import table_for
from pifa_compile.kernels.triton_templates import settings, template

SCHEMA = "siblings(Tensor x, Tensor[] pivot_rows, Tensor[] coefficients, Tensor[] row_orders) -> Tensor"

#: The templates of the operator; a call needs a tile of each.
TEMPLATES = ("siblings_head", "siblings_tail")

#: Layers in one operator at most: each adds its code to both kernels.
MOST = 4


def serves(device: torch.device, dtype: torch.dtype, tokens: int) -> bool:
    """Whether the device's table has tiles for layers of a dtype and so many tokens."""
    if device.type != "cuda" or (dtype == torch.float32 and not tf32_allowed()):
        return False
    table = table_for(device_name(device))
    return all(table.candidates(name, dtype_name(dtype), tokens) for name in TEMPLATES)


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
    ranks = [int(p.get_size()[0]) for p in pivot_rows]
    others = [int(c.get_size()[0]) for c in coefficients]

    def head_tiles(block: int) -> int:
        return sum(-(-r // block) for r in ranks)

    def tail_tiles(block: int) -> int:
        return head_tiles(block) + sum(-(-o // block) for o in others)

    y_p = _launch("siblings_head", [rows, *pivot_rows], sum(ranks), len(ranks), head_tiles, {})
    orders = {1 + len(ranks) + i: some_order for i in range(len(ranks))}
    features = sum(ranks) + sum(others)
    y = _launch("siblings_tail", [y_p, *coefficients, *row_orders], features, len(ranks), tail_tiles, orders)
    return call(torch.ops.aten.view, y, [*lead, features])


def _launch(
    name: str, given: list[Any], features: int, siblings: int, tiles: Callable[[int], int], make: dict[int, Any]
) -> Any:
    """IR of one template's output, N x ``features`` in the dtype of the first input."""
    auto = autotuner()
    inputs = auto.realize(*given)
    tokens, dtype, device = inputs[0].get_size()[0], inputs[0].get_dtype(), inputs[0].get_device()
    layout = auto.layout(inputs[0], [tokens, features], dtype)
    choices: list[Any] = []
    for tile in table_for(device_name(device)).candidates(name, dtype_name(dtype), auto.expected(tokens)):
        own = settings(tile, SIBLINGS=siblings, TILES=tiles(tile.constants["BLOCK_N"]))
        # A head may be the first kernel of a program, right behind one that has changed the weights.
        early = inputs[1:] if tile.early and name == "siblings_tail" else None
        problem = auto.add(choices, template(name), inputs, layout, early=early, **own)
        if problem is None and not auto.measures():
            break  # the table decides
    if not choices:
        raise ValueError(f"pifa::siblings: no tile of {name} for {dtype} and {tokens} tokens")
    return auto.choose(f"pifa_{name}", choices, inputs, layout, make)


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
