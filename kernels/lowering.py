"""How Inductor compiles ``pifa::linear`` where it meets the operator itself.

On CPU the graph passes decompose the operator before Inductor sees it; what comes here is the operator in a graph of
somebody else (the stock backend on a prepared model, an exported program): two matrix multiplications that Inductor
tunes as its own, and one gather that fuses into whatever reads the output.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from pifa_compile._torch import inductor
from pifa_compile.kernels.op import linear

aten = torch.ops.aten


@functools.cache
def register() -> None:
    """Give Inductor the lowering; safe to call often."""
    inductor().register(linear, lower_linear)


def lower_linear(
    x: Any, pivot_rows: Any, coefficients: Any, row_order: Any, bias: Any = None, y_scale: float = 1.0
) -> Any:
    """Inductor IR of ``pifa::linear``; the arguments are TensorBoxes, x may have any number of leading dimensions."""
    call = inductor().call
    *lead, n = x.get_size()
    dtype, tokens = x.get_dtype(), math.prod(lead)
    rows = call(aten.view, x, [tokens, n])
    if coefficients.get_dtype() == pivot_rows.get_dtype():
        y_p = _times_transposed(rows, pivot_rows)
        y_np = _times_transposed(y_p, coefficients)
    else:
        y_p = _times_transposed(_cast(rows, torch.float32), _cast(pivot_rows, torch.float32))
        rounded = _cast(_cast(call(aten.mul, y_p, y_scale), coefficients.get_dtype()), torch.float32)
        y_np = call(aten.mul, _times_transposed(rounded, _cast(coefficients, torch.float32)), 1 / y_scale)
    y = _gather(y_p, y_np, _positions(row_order), dtype)
    y = call(aten.view, y, [*lead, row_order.get_size()[0]])
    return y if bias is None else call(aten.add, y, bias)


def _times_transposed(a: Any, b: Any) -> Any:
    call = inductor().call
    return call(aten.mm, a, call(aten.permute, b, [1, 0]))


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return inductor().to_dtype(x, dtype)


def _positions(row_order: Any) -> Any:
    """m: entry j is the position in [pivots, others] of output row j."""
    call = inductor().call
    (m,) = row_order.get_size()
    positions = inductor().iota(m, row_order.get_device())
    empty = call(aten.full, [m], 0, dtype=torch.int64, device=row_order.get_device())
    return call(aten.index_put, empty, [_cast(row_order, torch.int64)], positions)


def _gather(y_p: Any, y_np: Any, positions: Any, dtype: torch.dtype) -> Any:
    """[y_p, y_np] with its columns in output order, without the concatenation in memory."""
    ir, ops = inductor().ir, inductor().ops
    for part in (y_p, y_np, positions):
        part.realize()
    tokens, r = y_p.get_size()
    _, others = y_np.get_size()
    load_p, load_np, load_position = y_p.make_loader(), y_np.make_loader(), positions.make_loader()

    def at(index: Any) -> Any:
        token, column = index
        position = load_position([column])
        if not others:
            return ops.to_dtype(load_p([token, ops.indirect_indexing(position, r, check=False, wrap_neg=False)]), dtype)
        # Both parts are read, at places that exist, and one is kept: on CPU no masked read can hold an indirect index.
        first_other, zero = ops.index_expr(r, torch.int64), ops.constant(0, torch.int64)
        in_pivots = ops.lt(position, first_other)
        in_p = ops.where(in_pivots, position, zero)
        in_np = ops.where(in_pivots, zero, ops.sub(position, first_other))
        from_p = load_p([token, ops.indirect_indexing(in_p, r, check=False, wrap_neg=False)])
        from_np = load_np([token, ops.indirect_indexing(in_np, others, check=False, wrap_neg=False)])
        return ops.to_dtype(ops.where(in_pivots, from_p, from_np), dtype)

    return ir.Pointwise.create(device=y_p.get_device(), dtype=dtype, inner_fn=at, ranges=[tokens, r + others])
