"""pifa::linear: the operator, its gradient, autocast, and its lowering."""

from __future__ import annotations

import runpy

import pytest
import torch
import torch.nn.functional as F
from torch._inductor import config as inductor_config

from pifa_compile.kernels import few_tokens, lowering, merge, op, siblings
from pifa_compile.kernels.op import SCHEMA, gather_order, linear

FROZEN = (
    "pifa::linear(Tensor x, Tensor pivot_rows, Tensor coefficients, Tensor row_order, Tensor? bias=None, "
    "float y_scale=1.0, int aligned=1) -> Tensor"
)
SHAPES = [(20, 12, 6), (12, 20, 12), (20, 12, 12), (9, 7, 1), (16, 16, 8)]


def factors(m, n, r, dtype=torch.float32, coefficients=None):
    torch.manual_seed(m * n + r)
    rows, c = torch.randn(r, n, dtype=torch.float64), torch.randn(m - r, r, dtype=torch.float64) / 2
    return rows.to(dtype), c.to(coefficients or dtype), torch.randperm(m).to(torch.int32)


def oracle(x, rows, c, order, bias=None):
    weight = torch.cat([rows.double(), c.double() @ rows.double()])
    placed = torch.empty_like(weight)
    placed[order.long()] = weight
    return F.linear(x.double(), placed, None if bias is None else bias.double())


def relative(a, b):
    return float((a.double() - b).norm() / b.norm())


def test_the_schema_is_the_frozen_one_and_has_no_layout_tag():
    assert str(linear._schema).replace("1.,", "1.0,") == f"pifa::{SCHEMA}" == FROZEN
    tags = {torch.Tag.needs_fixed_stride_order, torch.Tag.needs_exact_strides, torch.Tag.flexible_layout}
    assert not tags & set(linear.tags)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lead", [(3,), (2, 5), (), (0,), (2, 0, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_reference_is_the_linear_layer_that_the_factors_stand_for(shape, lead, bias):
    m, n, _ = shape
    rows, c, order = factors(*shape)
    x, b = torch.randn(*lead, n), torch.randn(m) if bias else None
    y = linear(x, rows, c, order, b)
    exact = oracle(x, rows, c, order, b)
    assert y.shape == exact.shape
    assert y.numel() == 0 or relative(y, exact) < 1e-6


@pytest.mark.parametrize("scale", [1.0, 0.25, 8.0])
def test_coefficients_in_another_dtype_and_a_scale_that_cancels(scale):
    rows, c, order = factors(48, 32, 16, torch.bfloat16, torch.float16)
    x = torch.randn(7, 32, dtype=torch.bfloat16)
    y = linear(x, rows, c, order, None, scale)
    assert y.dtype == torch.bfloat16
    assert relative(y, oracle(x, rows, c, order)) < 4e-3


def test_the_scale_keeps_large_sums_inside_float16():
    rows, c, order = factors(8, 64, 4, torch.bfloat16, torch.float16)
    x = torch.full((1, 64), 3e4, dtype=torch.bfloat16) * rows[:1].sign()  # y_p beyond the largest float16
    exact = oracle(x, rows, c, order)
    assert exact.abs().max() > 65504
    assert not torch.isfinite(linear(x, rows, c, order, None, 1.0)).all()
    assert relative(linear(x, rows, c, order, None, 2.0**-10), exact) < 4e-3


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(mixed, bias):
    dtypes = (torch.bfloat16, torch.float16) if mixed else (torch.float32,)
    rows, c, order = factors(20, 12, 6, *dtypes)
    b = torch.randn(20, dtype=dtypes[0]) if bias else None
    torch.library.opcheck(linear, (torch.randn(3, 12, dtype=dtypes[0]), rows, c, order, b, 0.5))
    if not mixed:
        leaves = [t.requires_grad_() for t in (torch.randn(3, 12), rows, c)]
        torch.library.opcheck(linear, (*leaves, order, None if b is None else b.requires_grad_()))


@pytest.mark.parametrize("shape", [(5, 3, 2), (3, 5, 3), (7, 4, 4), (4, 4, 1)])
@pytest.mark.parametrize("lead", [(2, 3), (1,), (), (0,), (2, 0)])
@pytest.mark.parametrize(("bias", "scale"), [(True, 1.0), (True, 0.25), (False, 8.0)])
def test_gradients_of_input_factors_and_bias_and_gradients_of_those(shape, lead, bias, scale):
    """Rank of all rows (3 x 5: no coefficients at all), of all columns, and 1; no token, one, and several."""
    m, n, _ = shape
    rows, c, order = factors(*shape, torch.float64)
    x = torch.randn(*lead, n, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, rows, c, *([torch.randn(m, dtype=torch.float64)] if bias else []))]

    def apply(x, rows, c, b=None):
        return linear(x, rows, c, order, b, scale)

    assert torch.autograd.gradcheck(apply, leaves)
    assert torch.autograd.gradgradcheck(apply, leaves)


@pytest.mark.parametrize("wanted", range(4))
def test_the_gradient_of_one_argument_alone(wanted):
    rows, c, order = factors(20, 12, 6, torch.float64)
    leaves = [torch.randn(2, 3, 12, dtype=torch.float64), rows, c, torch.randn(20, dtype=torch.float64)]
    leaves[wanted].requires_grad_()
    linear(*leaves[:3], order, leaves[3]).square().sum().backward()
    dense = [t.detach().clone().requires_grad_(t.requires_grad) for t in leaves]
    oracle(*dense[:3], order, dense[3]).square().sum().backward()
    for found, exact in zip(leaves, dense, strict=True):
        assert (found.grad is None) == (exact.grad is None)
        assert found.grad is None or torch.allclose(found.grad, exact.grad)


def test_gradients_of_coefficients_in_another_dtype_are_in_theirs():
    rows, c, order = factors(48, 32, 16, torch.bfloat16, torch.float16)
    leaves = [t.requires_grad_() for t in (torch.randn(7, 32, dtype=torch.bfloat16), rows, c)]
    linear(*leaves, order, None, 0.25).float().square().sum().backward()
    exact = [t.detach().double().requires_grad_() for t in leaves]
    oracle(*exact, order).square().sum().backward()
    for found, wanted in zip(leaves, exact, strict=True):
        assert found.grad.dtype == found.dtype
        assert relative(found.grad, wanted.grad) < 2e-2


def test_autocast_is_that_of_a_linear_layer():
    rows, c, order = factors(20, 12, 6)
    x, bias = torch.randn(3, 12), torch.randn(20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, rows, c, order, bias)
        assert y.dtype == F.linear(x, torch.randn(20, 12), bias).dtype == torch.bfloat16
    assert relative(y, oracle(x, rows, c, order, bias)) < 3e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 11)}, "n=12"),
        ({"c": torch.randn(13, 6)}, "coefficients"),
        ({"x": torch.randn(3, 12, dtype=torch.float64)}, "float64"),
        ({"b": torch.randn(19)}, "bias"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(change, message):
    rows, c, order = factors(20, 12, 6)
    given = {"x": torch.randn(3, 12), "c": c, "b": torch.randn(20)} | change
    with pytest.raises(RuntimeError, match=message):
        linear(given["x"], rows, given["c"], order, given["b"])


def test_gather_order_is_the_inverse():
    order = torch.randperm(50).to(torch.int32)
    assert torch.equal(torch.arange(50)[order.long()][gather_order(order)], torch.arange(50))


@pytest.mark.parametrize(("module", "name"), [
    (op, "linear"), (siblings, "siblings"), (few_tokens, "few_tokens"), (merge, "merge"),
])  # fmt: skip
def test_a_module_that_is_loaded_again_finds_its_operator(module, name):
    """An operator can be defined once in a process."""
    assert runpy.run_path(module.__file__)[name] is getattr(module, name)


@inductor_config.patch(fx_graph_cache=False)  # else code of an earlier lowering may be found
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.bfloat16, torch.float16)])
def test_the_lowering_compiles_the_bare_operator(shape, dtypes):
    """In a graph of the stock backend: fused with what reads it, nothing falls back, numbers as the reference."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import run_and_get_code

    lowering.register()
    torch._dynamo.reset()
    counters.clear()
    rows, c, order = factors(*shape, *dtypes)
    x, bias = torch.randn(2, 5, shape[1], dtype=dtypes[0]), torch.randn(shape[0], dtype=dtypes[0])
    compiled = torch.compile(lambda *args: linear(*args).relu(), fullgraph=True)
    with torch.no_grad():
        y, (code,) = run_and_get_code(compiled, x, rows, c, order, bias)
    assert "torch.ops.pifa" not in code
    bound = 1e-6 if dtypes[0] == torch.float32 else 2e-2
    assert relative(y, oracle(x, rows, c, order, bias).relu()) < bound
