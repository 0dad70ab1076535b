"""What only a card can tell: that the forms launch, are right, and survive CUDA graphs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pretend_h200.shipped import LAUNCHES_EARLY
from torch import nn
from torch._inductor import config

import pifa_compile
from pifa_compile.kernels import kernel_forms as forms
from pifa_compile.kernels import lowering, tile_tables
from pifa_compile.kernels.op import linear
from pifa_compile.kernels.siblings import siblings
from pifa_compile.kernels.tile_tables import EARLY
from pifa_compile.modules import PifaLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).resolve().parents[1]
BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float32: 1e-5}
SHAPES = [(512, 256, 160), (257, 130, 33), (1024, 2048, 1008)]


def factors(m, n, r, dtype, coefficients=None):
    torch.manual_seed(m + r)
    rows, c = torch.randn(r, n) / n**0.5, torch.randn(m - r, r) / r**0.5
    order = torch.cat([part.sort().values for part in torch.randperm(m).split([r, m - r])])
    return [t.cuda() for t in (rows.to(dtype), c.to(coefficients or dtype), order.int())]


def oracle(x, rows, c, order):
    y_p = x.double() @ rows.double().T
    y = y_p.new_empty(*x.shape[:-1], order.shape[0])
    y[..., order.long()] = torch.cat([y_p, y_p @ c.double().T], -1)
    return y


@pytest.fixture
def in_form():
    """Has every layer run in one form, without caches, which do not know of forced tables."""
    table = tile_tables.table_for(torch.cuda.get_device_name())
    always = tile_tables.Span(("float16", "bfloat16", "float32"), 1, None)
    with config.patch(force_disable_caches=True):
        yield lambda form: tile_tables.use_table(
            replace(table, forms=(tile_tables.FormRow(form, always, (0.0, 1.0), "the test's"),), untried=(EARLY,))
        )


@pytest.mark.parametrize("form", [form for form in forms.KERNELS if form != "relay"])
@pytest.mark.parametrize("dtypes", [(torch.float16,), (torch.bfloat16,), (torch.bfloat16, torch.float16)])
@pytest.mark.parametrize(("tokens", "shape"), list(zip((1, 3, 300), SHAPES, strict=True)))
def test_every_form_is_right_with_what_reads_it(form, dtypes, tokens, shape, in_form, relative):
    lowering.register()
    compiled = torch.compile(lambda x, p, c, o, b, z: F.silu(linear(x, p, c, o, b, 0.5)) * z, fullgraph=True)
    m, n, r = shape
    p, c, order = factors(m, n, r, *dtypes)
    x, bias, other = (torch.randn(*s, device="cuda").to(dtypes[0]) for s in ((tokens, n), (m,), (tokens, m)))
    with in_form(form), torch.no_grad():
        y = compiled(x, p, c, order, bias, other)
    exact = F.silu(oracle(x, p, c, order) + bias.double()) * other.double()
    assert relative(y, exact) < BOUNDS[dtypes[0]]


def test_rows_in_aligned_groups_end_where_the_order_says(in_form, relative):
    lowering.register()
    compiled = torch.compile(lambda *a: linear(*a, aligned=8), fullgraph=True)
    p, c, _ = factors(512, 256, 160, torch.bfloat16)
    order = (8 * torch.randperm(64)[:, None] + torch.arange(8)).flatten().int().cuda()
    for tokens in (1, 300):
        x = torch.randn(tokens, 256, device="cuda").bfloat16()
        with in_form("tail"), torch.no_grad():
            assert relative(compiled(x, p, c, order), oracle(x, p, c, order)) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_siblings_are_right_with_what_reads_them(tokens, dtype, relative):
    lowering.register()
    sizes = [(512, 160), (300, 33), (1024, 208)]
    layers = [factors(m, 256, r, dtype) for m, r in sizes]
    lists = [list(tensors) for tensors in zip(*layers, strict=True)]
    compiled = torch.compile(lambda x, *lists: F.silu(siblings(x, *lists)), fullgraph=True)
    x = torch.randn(tokens, 256, device="cuda").to(dtype)
    with torch.no_grad():
        y = compiled(x, *lists)
    assert relative(y, F.silu(torch.cat([oracle(x, *layer) for layer in layers], -1))) < BOUNDS[dtype]


EARLY_TILES = """
import sys
import torch
from torch._inductor import config
from dataclasses import replace
from pifa_compile.kernels import lowering, tile_tables
from pifa_compile.kernels.op import linear
from pifa_compile.kernels.siblings import siblings
sys.path.insert(0, "tests")
from test_gpu import BOUNDS, factors, oracle

lowering.register()
table = replace(tile_tables.table_for(torch.cuda.get_device_name()), untried=())
sizes = [(512, 160), (300, 33), (4096, 1392)]
layers = [factors(m, 4096, r, torch.bfloat16) for m, r in sizes]
lists = [list(tensors) for tensors in zip(*layers, strict=True)]


def model(x):
    return linear(torch.relu(siblings(x, *lists))[..., -4096:], *layers[-1])


def exact(x):
    return oracle(oracle(x, *layers[-1]).relu(), *layers[-1])


for tokens, mode in ((1, "reduce-overhead"), (16, None)):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with tile_tables.use_table(table), config.patch(force_disable_caches=True), torch.no_grad():
        for _ in range(100):
            x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
            y, wanted = compiled(x).double(), exact(x)
            error = float((y - wanted).norm() / wanted.norm())
            assert error < 2 * BOUNDS[torch.bfloat16], (tokens, mode, error)
print("right")
"""


@pytest.mark.skipif(not LAUNCHES_EARLY, reason="this torch launches no template early")
def test_tiles_that_start_early_are_right_also_in_cuda_graphs():
    """In a process of its own: a launch that fails leaves no usable device behind."""
    done = subprocess.run([sys.executable, "-c", EARLY_TILES], capture_output=True, text=True, timeout=90, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["right"]


RELAY = """
import sys
import torch
from torch._inductor import config
from dataclasses import replace
from pifa_compile.kernels import lowering, tile_tables
from pifa_compile.kernels.op import linear
sys.path.insert(0, "tests")
from test_gpu import SHAPES, BOUNDS, factors, oracle

lowering.register()
table = tile_tables.table_for(torch.cuda.get_device_name())
always = tile_tables.Span(("float16", "bfloat16", "float32"), 1, None)
forced = replace(table, forms=(tile_tables.FormRow("relay", always, (0.0, 1.0), ""),), untried=())
kinds = ((torch.float16,), (torch.bfloat16,), (torch.bfloat16, torch.float16))
for dtypes, tokens, (m, n, r) in zip(kinds, (1, 5, 16), SHAPES):
    torch.compiler.reset()
    p, c, order = factors(m, n, r, *dtypes)
    twice = lambda x: linear(x, p, c, order, None, 0.5) + linear(2 * x, p, c, order, None, 0.5)
    compiled = torch.compile(twice, fullgraph=True)
    with tile_tables.use_table(forced), config.patch(force_disable_caches=True), torch.no_grad():
        for _ in range(100):
            x = torch.randn(tokens, n, device="cuda").to(dtypes[0])
            y, exact = compiled(x), 3 * oracle(x, p, c, order)
            error = float((y.double() - exact).norm() / exact.norm())
            assert error < BOUNDS[dtypes[0]], (dtypes, tokens, m, n, r, error)
print("right")
"""


def test_the_relay_is_right_and_ends():
    """In a process of its own: were its programs to wait for each other for ever, only that one would hang."""
    done = subprocess.run([sys.executable, "-c", RELAY], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["right"]


def test_float32_is_exact_where_tf32_is_not_allowed(in_form, relative):
    lowering.register()
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        p, c, order = factors(512, 256, 160, torch.float32)
        x = torch.randn(70, 256, device="cuda")
        for form in ("gather", "tail"):
            torch.compiler.reset()
            with in_form(form), torch.no_grad():
                y = torch.compile(linear, fullgraph=True)(x, p, c, order)
            assert relative(y, oracle(x, p, c, order)) < BOUNDS[torch.float32]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_the_backend_serves_a_model_on_the_card_from_the_store(mode, relative):
    model = nn.Sequential(nn.Linear(256, 768), nn.GELU(), nn.Linear(768, 256)).half().cuda().eval()
    pifa_compile.compress(model, pifa_compile.Svd(density=0.6))
    dense = torch.compile(model, backend=pifa_compile.pifa, options={"inner": "eager"})
    compiled = torch.compile(model, backend=pifa_compile.pifa, mode=mode)
    with torch.no_grad():
        for tokens in (1, 64):
            for _ in range(3):  # the third call of a CUDA graph replays it
                x = torch.randn(tokens, 256, device="cuda", dtype=torch.half)
                assert relative(compiled(x).clone(), dense(x)) < 5e-3


def test_dynamic_token_counts_share_one_compilation(relative):
    from pifa_compile.factors import PifaFactors

    layer = PifaLinear(PifaFactors(*factors(512, 256, 160, torch.bfloat16)))
    compiled = torch.compile(layer, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for tokens in (70, 128, 1000, 65):
            x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
            exact = oracle(x, layer.pivot_rows, layer.coefficients, layer.row_order)
            assert relative(compiled(x), exact) < BOUNDS[torch.bfloat16]


def test_max_autotune_measures_and_stays_right(relative):
    lowering.register()
    p, c, order = factors(1024, 2048, 1008, torch.bfloat16)
    x = torch.randn(256, 2048, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        y = torch.compile(linear, fullgraph=True, options={"max_autotune": True})(x, p, c, order)
    assert relative(y, oracle(x, p, c, order)) < BOUNDS[torch.bfloat16]
