"""How Inductor compiles ``pifa::linear`` where it meets the operator itself: every form that it can be lowered to.

    gather   two matrix multiplications of Inductor's and one gather that fuses into whatever reads the output
    tail     CUDA: y_p by Inductor's own matrix multiplication, then one kernel that writes the whole of Y
    few      CUDA, few tokens: both by kernels that read the weights once
    relay    CUDA, few tokens: both in one kernel, whose second phase waits for the first

On CPU the graph passes decompose the operator before Inductor sees it; the operator comes here in a graph of somebody
else (the stock backend on a prepared model, an exported program), where the gather form serves. m = out_features,
n = in_features, r = rank, N = number of tokens.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from pifa_compile._torch import inductor, untraced
from pifa_compile.kernels import few, relay, siblings, tail
from pifa_compile.kernels.kernel_forms import Call, form_for
from pifa_compile.kernels.op import linear

aten = torch.ops.aten


@functools.cache
def register() -> None:
    """Give Inductor the lowerings; safe to call often, and while something is traced."""
    with untraced():
        inductor().register(linear, lower_linear)
        inductor().register(siblings.siblings, siblings.lower)
        tail.register()


def lower_linear(
    x: Any,
    pivot_rows: Any,
    coefficients: Any,
    row_order: Any,
    bias: Any = None,
    y_scale: float = 1.0,
    aligned: int = 1,
) -> Any:
    """Inductor IR of ``pifa::linear``; the arguments are TensorBoxes, x may have any number of leading dimensions."""
    call = inductor().call
    *lead, n = x.get_size()
    rows = call(aten.view, x, [math.prod(lead), n])
    seen = Call.of_ir(rows, pivot_rows, coefficients, row_order)
    y = FORMS[form_for(seen)](rows, pivot_rows, coefficients, row_order, y_scale, aligned)
    y = call(aten.view, y, [*lead, row_order.get_size()[0]])
    return y if bias is None else call(aten.add, y, bias)


def lower_to_tail(
    rows: Any, pivot_rows: Any, coefficients: Any, row_order: Any, y_scale: float, aligned: int
) -> Any:
    """y_p in the coefficients' dtype and scaled, then the whole of Y from it."""
    dtype = rows.get_dtype()
    if coefficients.get_dtype() == pivot_rows.get_dtype():
        return tail.lower(_times_transposed(rows, pivot_rows), coefficients, row_order, dtype, 1.0, aligned)
    y_p = _accumulated(rows, pivot_rows)
    scaled = _cast(inductor().call(aten.mul, y_p, y_scale), coefficients.get_dtype())
    return tail.lower(scaled, coefficients, row_order, dtype, 1 / y_scale, aligned)


def lower_to_gather(
    rows: Any, pivot_rows: Any, coefficients: Any, row_order: Any, y_scale: float, aligned: int
) -> Any:
    """Both products in their own order, and a gather that the consumer takes in."""
    dtype = rows.get_dtype()
    if coefficients.get_dtype() == pivot_rows.get_dtype():
        y_p = _times_transposed(rows, pivot_rows)
        y_np = _times_transposed(y_p, coefficients)
    else:
        y_p = _accumulated(rows, pivot_rows)
        rounded = _cast(inductor().call(aten.mul, y_p, y_scale), coefficients.get_dtype())
        y_np = inductor().call(aten.mul, _accumulated(rounded, coefficients), 1 / y_scale)
    return _gather(y_p, y_np, _positions(row_order), dtype)


def lower_to_few(rows: Any, pivot_rows: Any, coefficients: Any, row_order: Any, y_scale: float, aligned: int) -> Any:
    """The kernels for layers that read the same tokens, of which there is one."""
    same = coefficients.get_dtype() == pivot_rows.get_dtype()
    return few.lower(rows, [pivot_rows], [coefficients], [row_order], 1.0 if same else y_scale)


FORMS = {"few": lower_to_few, "gather": lower_to_gather, "relay": relay.lower, "tail": lower_to_tail}


def _times_transposed(a: Any, b: Any) -> Any:
    call = inductor().call
    return call(aten.mm, a, call(aten.permute, b, [1, 0]))


def _accumulated(a: Any, b: Any) -> Any:
    """a @ b.T in float32: on CUDA by a product that rounds nothing, elsewhere of inputs that were cast."""
    call = inductor().call
    half = a.get_dtype() == b.get_dtype() and a.get_dtype().itemsize == 2
    if half and a.get_device().type == "cuda":
        return call(aten.mm, a, call(aten.permute, b, [1, 0]), out_dtype=torch.float32)
    return _times_transposed(_cast(a, torch.float32), _cast(b, torch.float32))


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
