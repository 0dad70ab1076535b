"""The one operator in which every way of using the factors ends: ``pifa::linear``.

    pifa::linear(x, pivot_rows, coefficients, row_order, bias=None, y_scale=1.0, aligned=1) -> y

m = out_features, n = in_features, r = rank, N = number of tokens (all leading dimensions of x together).

    y_p = x @ pivot_rows.T                    N x r
    y_np = y_p @ coefficients.T               N x (m-r)
    y[..., row_order] = [y_p, y_np]; y += bias

Where the coefficients have another dtype than x, y_p is accumulated in float32, multiplied by ``y_scale`` (a power of
two), rounded to the coefficients' dtype, and the scale is undone in the output. ``aligned`` promises kernels that the
row order moves aligned groups of so many rows: r and m are multiples of it, and so is every ``row_order[aligned * i]``,
which the next entries follow. The schema carries no layout tag, so that a fused or transposed x costs no copy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SCHEMA = (
    "linear(Tensor x, Tensor pivot_rows, Tensor coefficients, Tensor row_order, Tensor? bias=None, float y_scale=1.0,"
    " int aligned=1) -> Tensor"
)


def gather_order(row_order: Tensor) -> Tensor:
    """m, int64: entry j is the position in [pivots, others] of output row j, the inverse of ``row_order``."""
    positions = torch.arange(row_order.shape[0], device=row_order.device)
    return torch.empty_like(positions).scatter_(0, row_order.to(torch.int64), positions)


def two_linears(x: Tensor, pivot_rows: Tensor, coefficients: Tensor, y_scale: float = 1.0) -> Tensor:
    """[y_p, y_np] side by side (N x m, pivots first), in the dtype of x."""
    if coefficients.dtype == pivot_rows.dtype:
        y_p = F.linear(x, pivot_rows)
        return torch.cat([y_p, F.linear(y_p, coefficients)], -1)
    accumulated = F.linear(x.float(), pivot_rows.float())
    rounded = (accumulated * y_scale).to(coefficients.dtype)
    y_np = F.linear(rounded.float(), coefficients.float()) / y_scale
    return torch.cat([accumulated.to(x.dtype), y_np.to(x.dtype)], -1)


def reference(
    x: Tensor,
    pivot_rows: Tensor,
    coefficients: Tensor,
    row_order: Tensor,
    bias: Tensor | None = None,
    y_scale: float = 1.0,
    aligned: int = 1,
) -> Tensor:
    """The operator in plain PyTorch, on any device."""
    _check(x, pivot_rows, coefficients, row_order, bias)
    y = two_linears(x, pivot_rows, coefficients, y_scale).index_select(-1, gather_order(row_order))
    return y if bias is None else y.add_(bias)


def _check(x: Tensor, pivot_rows: Tensor, coefficients: Tensor, row_order: Tensor, bias: Tensor | None) -> None:
    (r, n), m = pivot_rows.shape, row_order.shape[0]
    torch._check(x.dim() >= 1 and x.shape[-1] == n, lambda: f"pifa::linear: x {tuple(x.shape)} has not n={n} features")
    torch._check(
        tuple(coefficients.shape) == (m - r, r),
        lambda: f"pifa::linear: coefficients {tuple(coefficients.shape)} are not (m-r, r) = ({m - r}, {r})",
    )
    torch._check(
        x.dtype == pivot_rows.dtype,
        lambda: f"pifa::linear: x is {x.dtype}, the pivot rows are {pivot_rows.dtype}; cast one of them",
    )
    torch._check(
        bias is None or (tuple(bias.shape) == (m,) and bias.dtype == x.dtype),
        lambda: f"pifa::linear: the bias must be {m} numbers of {x.dtype}",
    )


def _fake(
    x: Tensor,
    pivot_rows: Tensor,
    coefficients: Tensor,
    row_order: Tensor,
    bias: Tensor | None = None,
    y_scale: float = 1.0,
    aligned: int = 1,
) -> Tensor:
    _check(x, pivot_rows, coefficients, row_order, bias)
    # Whoever traces the operator may give the graph to Inductor. To import that takes seconds and 50 MB, which nobody
    # should pay who only loads a prepared model.
    from pifa_compile.kernels import lowering

    lowering.register()
    return x.new_empty((*x.shape[:-1], row_order.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, pivot_rows, coefficients, row_order, bias, y_scale, _ = inputs
    ctx.save_for_backward(x, pivot_rows, coefficients, row_order)
    ctx.has_bias = bias is not None
    ctx.y_scale = y_scale


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, pivot_rows, coefficients, row_order = ctx.saved_tensors
    r, m = pivot_rows.shape[0], row_order.shape[0]
    needs = ctx.needs_input_grad
    # The scale and the rounding of y_p cancel in exact arithmetic, so the gradient is that of the plain form.
    c = coefficients.to(grad.dtype)
    ordered = grad.index_select(-1, row_order)
    grad_np = ordered[..., r:]
    grad_p = ordered[..., :r] + grad_np @ c
    grad_x = grad_p @ pivot_rows if needs[0] else None
    grad_rows = grad_p.reshape(-1, r).T @ x.reshape(-1, x.shape[-1]) if needs[1] else None
    grad_c = None
    if needs[2]:
        y_p = F.linear(x, pivot_rows).reshape(-1, r)
        grad_c = (grad_np.reshape(y_p.shape[0], m - r).T @ y_p).to(coefficients.dtype)  # m - r may be 0
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias and needs[4] else None
    return grad_x, grad_rows, grad_c, None, grad_bias, None, None


def _autocast(
    x: Tensor,
    pivot_rows: Tensor,
    coefficients: Tensor,
    row_order: Tensor,
    bias: Tensor | None = None,
    y_scale: float = 1.0,
    aligned: int = 1,
) -> Tensor:
    """As autocast treats ``linear``: x, rows and bias in the autocast dtype; a mixed form keeps its coefficients."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device)
    mixed = coefficients.dtype != pivot_rows.dtype
    with torch.autocast(device, enabled=False):
        y: Tensor = linear(
            x.to(dtype),
            pivot_rows.to(dtype),
            coefficients if mixed else coefficients.to(dtype),
            row_order,
            None if bias is None else bias.to(dtype),
            y_scale,
            aligned,
        )
    return y


def _register() -> Any:
    """Define the operator once per process, also when this module is loaded again."""
    if hasattr(torch.ops.pifa, "linear"):
        return torch.ops.pifa.linear.default
    library = torch.library.Library("pifa", "DEF")
    library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("linear", reference, "CompositeExplicitAutograd")
    for device in ("CPU", "CUDA"):
        library.impl("linear", _autocast, f"Autocast{device}", with_keyset=False)
    torch.library.register_fake("pifa::linear", _fake, lib=library)
    torch.library.register_autograd("pifa::linear", _backward, setup_context=_setup_context, lib=library)
    _LIBRARIES.append(library)
    return torch.ops.pifa.linear.default


_LIBRARIES: list[Any] = []  # a library unregisters its operators when it is collected
linear = _register()
