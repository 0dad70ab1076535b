"""Factored layers on few tokens, in one call of our own."""

import pytest
import torch

from pifa_compile import _torch
from pifa_compile.kernels.few_tokens import available, few_tokens, most_tokens, serves

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def layer(m, n, r, dtype, bias=True):
    """Factors with fresh random numbers, and the float64 weight and bias that they stand for."""
    rows, coefficients = torch.randn(r, n).div(n**0.5).to(dtype), torch.randn(m - r, r).div(r**0.5).to(dtype)
    order = torch.randperm(m).to(torch.int32)
    weight = torch.empty(m, n, dtype=torch.float64)
    weight[order.long()] = torch.cat([rows.double(), coefficients.double() @ rows.double()])
    return (rows, coefficients, order, torch.randn(m).to(dtype) if bias else None), weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(7, 5, 3), (64, 64, 32), (129, 67, 66), (300, 1000, 131), (40, 33, 33)])
def test_it_is_the_layer(sizes, dtype, relative):
    if not available(dtype):
        pytest.skip(f"no instructions for {dtype} here")
    for tokens in (1, 2, 3, 4, 5, 17):
        for bias in (True, False):
            (rows, coefficients, order, b), weight = layer(*sizes, dtype, bias)
            x = torch.randn(tokens, sizes[1]).to(dtype)
            wanted = x.double() @ weight.T + (0 if b is None else b.double())
            y = few_tokens(x, rows, coefficients, order, b)
            assert y.dtype == dtype and relative(y, wanted) < TOLERANCE[dtype]


def test_every_output_is_written(monkeypatch):
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args: new_empty(*args).fill_(torch.nan))
    factors, _ = layer(50, 33, 20, torch.float32)
    assert few_tokens(torch.randn(3, 33), *factors).isfinite().all()


def test_inputs_need_not_be_contiguous(relative):
    (rows, coefficients, order, bias), weight = layer(50, 33, 20, torch.float32)
    x = torch.randn(33, 2, 3).permute(2, 1, 0)
    y = few_tokens(x, rows.T.contiguous().T, coefficients, order, bias)
    assert y.shape == (3, 2, 50) and relative(y, x.double() @ weight.T + bias.double()) < 1e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(value, dtype):
    if not available(dtype):
        pytest.skip(f"no instructions for {dtype} here")
    factors, _ = layer(50, 64, 20, dtype)
    x = torch.randn(2, 64).to(dtype)
    x[1, 3] = value
    y = few_tokens(x, *factors)
    assert y[0].isfinite().all() and not y[1].isfinite().any()


def test_threads_share_the_rows(relative):
    factors, weight = layer(700, 515, 301, torch.float32)
    x, threads = torch.randn(2, 515), torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            assert relative(few_tokens(x, *factors), x.double() @ weight.T + factors[3].double()) < 1e-6
    finally:
        torch.set_num_threads(threads)


def test_what_does_not_fit_is_refused():
    (rows, coefficients, order, bias), _ = layer(50, 33, 20, torch.float32)
    x = torch.randn(2, 33)
    with pytest.raises(RuntimeError, match=r"x \(2, 32\), pivot rows \(20, 33\)"):
        few_tokens(x[:, :32], rows, coefficients, order, bias)
    with pytest.raises(RuntimeError, match="one dtype"):
        few_tokens(x.bfloat16(), rows, coefficients, order, bias)
    for wrong in (-1, 50):
        order = order.clone()
        order[7] = wrong
        with pytest.raises(IndexError, match="not in 0 to 49"):
            few_tokens(x, rows, coefficients, order, bias)


def test_it_is_a_proper_operator():
    factors, _ = layer(12, 9, 5, torch.float32)
    torch.library.opcheck(few_tokens, (torch.randn(3, 9), *factors))


@pytest.mark.parametrize(("flags", "most"), [
    ({"avx512f", "avx512_bf16", "amx_bf16", "avx512_fp16"}, (16, 3, 8)),
    ({"avx512f", "avx512_bf16"}, (96, 96, 512)),
    ({"avx512f"}, (96, 2, 512)),
    ({"avx2", "f16c"}, (8, 2, 2)),
    (set(), (8, 2, 0)),
])  # fmt: skip
def test_the_processor_decides_how_many_tokens_are_few(flags, most, monkeypatch):
    monkeypatch.setattr(_torch, "cpu_instructions", lambda: frozenset(flags))
    large = 4096, 4096, 2048
    assert tuple(most_tokens(*large, dtype) for dtype in DTYPES) == most
    assert all(most_tokens(*large, dtype, packed=True) <= most_tokens(*large, dtype) for dtype in DTYPES)
    assert most_tokens(*large, torch.float64) == 0
    for dtype in DTYPES:
        assert serves(1, *large, dtype) == available(dtype) and not serves(0, *large, dtype)


def test_layers_that_caches_hold_and_wide_ones_with_packed_weights_have_fewer(monkeypatch):
    monkeypatch.setattr(_torch, "cpu_instructions", lambda: frozenset({"avx512f", "avx512_bf16"}))
    for width, most in ((64, 16), (256, 16), (1024, 48), (2048, 96), (8192, 96)):
        assert most_tokens(width, width, width // 2, torch.float32) == most
        assert most_tokens(width, width, width // 2, torch.float32, packed=True) == most
        assert serves(most, width, width, width // 2, torch.float32)
        assert not serves(most + 1, width, width, width // 2, torch.float32)
    for n, most in ((64, 32), (1024, 32), (2048, 16), (4096, 8), (11008, 2)):
        assert most_tokens(512, n, 256, torch.bfloat16, packed=True) == most
        assert most_tokens(512, n, 256, torch.bfloat16) == 96
