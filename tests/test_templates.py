"""Every template with every tile of the shipped tables: compiled for sm_90, and its arithmetic interpreted."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
import triton
from pretend_h200.codegen import fake, generate, kernels
from pretend_h200.cubin import compile_kernel
from pretend_h200.interpreter import Launch, interpret

from pifa_compile.kernels import lowering
from pifa_compile.kernels import tile_tables as tiles
from pifa_compile.kernels.op import linear
from pifa_compile.kernels.triton_templates import GRIDS

TABLES = {path.stem: tiles.read(path) for path in sorted(tiles.FOLDER.glob("*.json"))}
TILES = [(name, tile) for name, table in TABLES.items() for tile in table.tiles]
IDS = [f"{name}-{t.template}-{'x'.join(map(str, t.constants.values()))}-{t.span.dtypes[0]}" for name, t in TILES]
TOKENS = (1, 3, 17, 128, 1000)
SHAPES = [(100, 70, 16), (257, 130, 33), (320, 192, 192), (129, 200, 128), (90, 90, 61)]  # m, n, r
SPILLS = 0 if triton.__version__ >= "3.7" else 20  # 3.6 keeps a few numbers of the widest tiles, outside the loop
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 5e-3, torch.float32: 2e-6}


def only(tile, form="tail"):
    """A table that leaves no choice but ``tile``."""
    always = tiles.Span(("float16", "bfloat16", "float32"), 1, None)
    row = tiles.FormRow(form, always, (0.0, 1.0), "")
    return tiles.use_table(replace(TABLES["safe"], tiles=(replace(tile, span=always),), forms=(row,)))


def tail_kernel(tile, tokens, m, n, r, dtype, coefficients=None, scale=1.0, epilogue=False):
    """The generated kernel of the tail for one call, by itself or with bias, SiLU and a product behind it."""

    def given():
        lowering.register()
        factors = [fake(r, n, dtype=dtype), fake(m - r, r, dtype=coefficients or dtype), fake(m, dtype=torch.int32)]
        extra = [fake(m, dtype=dtype), fake(tokens, m, dtype=dtype)] if epilogue else []
        return [fake(tokens, n, dtype=dtype), *factors, *extra]

    def plain(x, p, c, o):
        return linear(x, p, c, o, None, scale)

    def fused(x, p, c, o, bias, other):
        return F.silu(linear(x, p, c, o, bias, scale)) * other

    with only(tile):
        program = generate(fused if epilogue else plain, given)
    (kernel,) = (k for k in kernels(program) if "arg_ROW_ORDER" in k.signature)
    return kernel


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


# Which tiles multiply on the wide matrix unit: those with 64 rows or more. The others have mma.
@pytest.mark.parametrize(("table", "tile"), TILES, ids=IDS)
def test_every_tile_compiles_for_sm_90_without_spills(table, tile, tf32):
    dtype = getattr(torch, tile.span.dtypes[-1])
    kernel = tail_kernel(tile, tile.span.last or 2048, 4096, 4096, 1200, dtype, epilogue=True)
    cubin = compile_kernel(kernel)
    assert cubin.spills <= SPILLS
    assert cubin.registers <= 65536 // (32 * tile.warps)
    assert cubin.shared_bytes <= (100 << 10 if table == "safe" else 227 << 10)
    if tile.constants["BLOCK_M"] >= 64:
        assert cubin.wgmma > 0 and cubin.mma == 0
    else:
        assert cubin.mma > 0
    assert cubin.async_copies > 0  # the pipeline is there, on 16-byte copies:
    assert not [line for line in cubin.sass.splitlines() if "LDGSTS" in line and ".128" not in line]
    assert set(cubin.stores) == {"STG.E.U16" if dtype.itemsize == 2 else "STG.E"}


@dataclass
class Case:
    """A launch of a tail on random numbers, and what it must give."""

    kernel: object
    grid: tuple
    y_p: torch.Tensor
    coefficients: torch.Tensor
    row_order: torch.Tensor
    scale: float
    dtype: torch.dtype

    @functools.cached_property
    def launch(self):
        m, tokens = self.row_order.shape[0], self.y_p.shape[0]
        poisoned = torch.full((tokens, m), torch.nan, dtype=self.dtype)
        return Launch(self.kernel, [self.y_p, self.coefficients, self.row_order, poisoned], self.grid)

    def exact(self):
        y_p = self.y_p.double() / self.scale
        y = torch.empty(self.y_p.shape[0], self.row_order.shape[0], dtype=torch.float64)
        y[:, self.row_order.long()] = torch.cat([y_p, y_p @ self.coefficients.double().T], -1)
        return y


def make_case(tile, tokens, shape, dtype, coefficients=None, scale=1.0):
    m, n, r = shape
    inner = coefficients or dtype
    kernel = tail_kernel(tile, tokens, m, n, r, dtype, coefficients, scale)
    grid = GRIDS[tile.template](tokens, m, {**tile.constants, "RANK": r}, cdiv=lambda a, b: -(-a // b))
    generator = torch.Generator().manual_seed(tokens + m)
    y_p = torch.randn(tokens, r, generator=generator).to(inner)
    c = torch.randn(m - r, r, generator=generator).div(2).to(inner)
    return Case(kernel, grid, y_p, c, torch.randperm(m, generator=generator).int(), scale, dtype)


def numeric_cases():
    """Every tile with the token counts that it is for, on shapes that do not fit it, in turn."""
    for i, (_, tile) in enumerate(TILES):
        for j, tokens in enumerate(t for t in TOKENS if tile.span.holds(tile.span.dtypes[0], t)):
            for k, dtype in enumerate(tile.span.dtypes):
                yield make_case(tile, tokens, SHAPES[(i + j + k) % len(SHAPES)], getattr(torch, dtype))
        if "bfloat16" in tile.span.dtypes:
            mixed = (torch.bfloat16, torch.float16, 0.125)
            yield make_case(tile, max(tile.span.first, 3), SHAPES[i % len(SHAPES)], *mixed)


def test_every_tile_computes_the_whole_output_on_odd_shapes(relative):
    cases = list(numeric_cases())
    results = interpret([[case.launch] for case in cases])
    for case, ((arguments,),) in zip(cases, ([r] for r in results), strict=True):
        error = relative(arguments[3], case.exact())
        assert error < TOLERANCE[case.dtype], (case.kernel.name, case.y_p.shape, case.row_order.shape, case.dtype)
