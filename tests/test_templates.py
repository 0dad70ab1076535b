"""Every template of one layer with every tile of the shipped tables: compiled for sm_90, and interpreted."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from pretend_h200.codegen import fake, generate, launches, tails
from pretend_h200.cubin import compile_kernel
from pretend_h200.interpreter import Launch, interpret
from pretend_h200.shipped import TABLES, ids, tiles_of

from pifa_compile.kernels import few, lowering
from pifa_compile.kernels import tile_tables as tiles
from pifa_compile.kernels.kernel_forms import KERNELS
from pifa_compile.kernels.op import linear
from pifa_compile.kernels.triton_templates import GRIDS

TAIL_FORMS = {template: form for form in ("relay", "tail") for templates in KERNELS[form] for template in templates}
OF_A_LAYER = tuple(TAIL_FORMS)  # the first half for few tokens, and several layers at once: test_siblings.py
TILES = tiles_of(OF_A_LAYER)
TOKENS = (1, 3, 17, 128, 1000)
SHAPES = [(100, 70, 16), (257, 130, 33), (320, 192, 192), (129, 200, 128), (90, 90, 61)]  # m, n, r
ALIGNED = [(320, 192, 192), (129, 200, 128), (100, 70, 16), (260, 130, 40)]  # r in whole 16 bytes, as TMA wants
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6}


def only(tile):
    """A table that leaves no choice but ``tile``, in the form that its template belongs to."""
    always = tiles.Span(("float16", "bfloat16", "float32"), 1, None)
    row = tiles.FormRow(TAIL_FORMS[tile.template], always, (0.0, 1.0), "")
    return tiles.use_table(replace(TABLES["safe"], tiles=(replace(tile, span=always),), forms=(row,)))


def kernel_of(tile, tokens, m, n, r, dtype, coefficients=None, scale=1.0, epilogue=False, aligned=1):
    """The generated kernel of a tile for one call, by itself or with bias, SiLU and a product behind it."""

    def given():
        lowering.register()
        factors = [fake(r, n, dtype=dtype), fake(m - r, r, dtype=coefficients or dtype), fake(m, dtype=torch.int32)]
        extra = [fake(m, dtype=dtype), fake(tokens, m, dtype=dtype)] if epilogue else []
        return [fake(tokens, n, dtype=dtype), *factors, *extra]

    def plain(x, p, c, o):
        return linear(x, p, c, o, None, scale, aligned)

    def fused(x, p, c, o, bias, other):
        return F.silu(linear(x, p, c, o, bias, scale, aligned)) * other

    with only(tile):
        program = generate(fused if epilogue else plain, given)
    (kernel,) = tails(program)
    return kernel


# Tiles of 64 rows or more multiply on the wide matrix unit (wgmma), smaller ones on mma, that for one token on neither.
@pytest.mark.parametrize(("table", "tile"), TILES, ids=ids(TILES))
def test_every_tile_compiles_for_sm_90_without_spills(table, tile, tf32):
    dtype = getattr(torch, tile.span.dtypes[-1])
    kernel = kernel_of(tile, tile.span.last or 2048, 4096, 4096, 1200, dtype, epilogue=True)
    cubin = compile_kernel(kernel)
    assert cubin.spills == 0
    assert cubin.registers <= 65536 // (32 * tile.warps)
    assert cubin.shared_bytes <= (100 << 10 if table == "safe" else 227 << 10)
    assert (cubin.waits > 0) == kernel.early == tile.early
    if tile.constants["BLOCK_M"] == 1:
        assert cubin.wgmma == cubin.mma == 0
        assert len(re.findall(r"LDG\.E\S*\.128", cubin.sass)) >= 4  # 16-byte loads, several under way
        return
    if tile.constants["BLOCK_M"] >= 64:
        assert cubin.wgmma > 0 and cubin.mma == 0
    else:
        assert cubin.mma > 0
    if tile.template == "tail_tma":
        assert cubin.tma_loads >= 2 and cubin.async_copies == 0
    else:
        assert cubin.async_copies > 0  # the pipeline is there, on 16-byte copies:
    assert not [line for line in cubin.sass.splitlines() if "LDGSTS" in line and ".128" not in line]
    # Scattered columns, one number per store; but pivots and others ascend, and lanes of a warp take them side by side.
    lanes = min(32, tile.constants["BLOCK_N"])
    assert cubin.lanes == [32 // lanes, lanes]
    of_y = {"STG.E.U16"} if dtype.itemsize == 2 else {"STG.E"}
    assert set(cubin.stores) == of_y if tile.template != "relay" else set(cubin.stores) > of_y  # and partial sums


@dataclass
class Case:
    """A launch on random numbers, and what it must give: ``inputs`` are y_p, or x and the pivot rows."""

    tile: tiles.Tile
    inputs: list
    coefficients: torch.Tensor
    row_order: torch.Tensor
    scale: float
    dtype: torch.dtype
    fused: list = field(default_factory=list)  # a bias and a factor, for the epilogue of kernel_of
    aligned: int = 1

    @functools.cached_property
    def launch(self):
        (tokens, n), r, m = self.inputs[0].shape, self.coefficients.shape[1], self.row_order.shape[0]
        call = (tokens, m, n, r, self.dtype, self.coefficients.dtype, self.scale)
        kernel = kernel_of(self.tile, *call, epilogue=bool(self.fused), aligned=self.aligned)
        more = {"min": min} if self.tile.template == "tail_tma" else {}
        meta = {**self.tile.constants, "RANK": r, "PROGRAMS": 5}  # few, so that a persistent program takes many tiles
        if self.tile.template == few.TAIL:
            meta["TILES"] = sum(-(-rows // meta["BLOCK_N"]) for rows in (r, m - r))
        grid = GRIDS[self.tile.template](tokens, m, meta, cdiv=lambda a, b: -(-a // b), **more)
        given = [*self.inputs, self.coefficients, self.row_order]
        if self.tile.template == "relay":
            partial = torch.full((self.tile.constants["SPLIT"] * tokens * r,), torch.nan)
            counters = torch.zeros(3, dtype=torch.int32)
            return Launch(kernel, [*given, counters, *self.fused, self.poisoned(), partial], grid)
        return Launch(kernel, [*given, *self.fused, self.poisoned()], grid)

    def poisoned(self):
        return torch.full((self.inputs[0].shape[0], self.row_order.shape[0]), torch.nan, dtype=self.dtype)

    def found(self, arguments):
        """The output among the arguments that the kernel left; what else it wrote is checked here."""
        if self.tile.template != "relay":
            return arguments[-1]
        assert not arguments[4].any()  # the counters, ready for the next launch
        return arguments[-2]

    def exact(self):
        y_p, *rows = (t.double() for t in self.inputs)
        y_p = y_p @ rows[0].T if rows else y_p / self.scale
        y = torch.empty(y_p.shape[0], self.row_order.shape[0], dtype=torch.float64)
        y[:, self.row_order.long()] = torch.cat([y_p, y_p @ self.coefficients.double().T], -1)
        if self.fused:
            bias, other = (t.double() for t in self.fused)
            return F.silu(y + bias) * other
        return y


def make_case(tile, tokens, shape, dtype, coefficients=None, scale=1.0):
    m, n, r = shape
    inner = coefficients or dtype
    generator = torch.Generator().manual_seed(tokens + m)
    first = torch.randn(tokens, r, generator=generator).to(inner)
    inputs = [first]
    if tile.template == "relay":
        inputs = [torch.randn(*size, generator=generator).to(dtype) for size in ((tokens, n), (r, n))]
    c = torch.randn(m - r, r, generator=generator).div(2).to(inner)
    return Case(tile, inputs, c, torch.randperm(m, generator=generator).int(), scale, dtype)


def numeric_cases():
    """Every tile with the token counts that it is for, on shapes that do not fit it, in turn; one of each template with
    an epilogue."""
    for template in OF_A_LAYER:
        tile = next(t for _, t in TILES if t.template == template)
        case = make_case(tile, max(tile.span.first, 2), ALIGNED[0], torch.float16)
        case.fused = [torch.randn(*size).half() for size in ((320,), (case.inputs[0].shape[0], 320))]
        yield case
    for i, (_, tile) in enumerate(TILES):
        shapes = ALIGNED if tile.template == "tail_tma" else SHAPES
        for j, tokens in enumerate(t for t in TOKENS if tile.span.holds(tile.span.dtypes[0], t)):
            for k, dtype in enumerate(tile.span.dtypes):
                yield make_case(tile, tokens, shapes[(i + j + k) % len(shapes)], getattr(torch, dtype))
        if "bfloat16" in tile.span.dtypes:
            mixed = (torch.bfloat16, torch.float16, 0.125)
            yield make_case(tile, max(tile.span.first, 2), shapes[i % len(shapes)], *mixed)


def test_every_tile_computes_the_whole_output_on_odd_shapes(relative):
    cases = list(numeric_cases())
    results = interpret([[case.launch] for case in cases])
    for case, (arguments,) in zip(cases, results, strict=True):
        error = relative(case.found(arguments), case.exact())
        assert error < TOLERANCE[case.dtype], (case.tile, case.inputs[0].shape, case.row_order.shape, case.dtype)


IN_GROUPS = [tile for name, tile in TILES if name != "safe" and tile.template in ("tail", "tail_tma")]


@pytest.mark.parametrize("tile", IN_GROUPS, ids=lambda t: f"{t.template}-{'x'.join(map(str, t.constants.values()))}")
def test_rows_in_aligned_groups_are_stored_16_bytes_at_once(tile, tf32):
    dtype = getattr(torch, tile.span.dtypes[-1])
    cubin = compile_kernel(kernel_of(tile, tile.span.last or 2048, 4096, 4096, 1200, dtype, aligned=8))
    free = compile_kernel(kernel_of(tile, tile.span.last or 2048, 4096, 4096, 1200, dtype))
    assert max(int((re.search(r"\d+$", name) or [32])[0]) for name in cubin.stores) >= 32  # bits
    assert sum(cubin.stores.values()) < sum(free.stores.values()) and cubin.spills == 0


def test_rows_in_aligned_groups_end_where_the_order_says(relative):
    cases = []
    for tile in IN_GROUPS:
        case = make_case(tile, max(tile.span.first, 2), (328, 200, 72), getattr(torch, tile.span.dtypes[-1]))
        groups = torch.randperm(328 // 8, generator=torch.Generator().manual_seed(0))
        case.row_order, case.aligned = (8 * groups[:, None] + torch.arange(8)).flatten().int(), 8
        cases.append(case)
    for case, (arguments,) in zip(cases, interpret([[case.launch] for case in cases]), strict=True):
        assert relative(case.found(arguments), case.exact()) < TOLERANCE[case.dtype], case.tile


def test_tma_is_for_rows_that_begin_at_whole_16_bytes():
    (tile, *_) = (t for _, t in TILES if t.template == "tail_tma")
    assert "tensor_descriptor" in kernel_of(tile, 512, 200, 64, 40, torch.float16).source
    with pytest.raises(ValueError):  # no kernel of ours: the library serves
        kernel_of(tile, 512, 200, 64, 41, torch.float16)


def test_one_set_of_counters_serves_all_relays_of_a_graph_and_is_cleared_once():
    (tile, *_) = (t for _, t in TILES if t.template == "relay")

    def given():
        lowering.register()
        half = {"dtype": torch.float16}
        return [fake(4, 64, **half), fake(32, 64, **half), fake(32, 32, **half), fake(64, dtype=torch.int32)]

    with only(tile):
        program = generate(lambda x, p, c, o: linear(linear(x, p, c, o), p, c, o), given)
    counters = re.findall(r"(buf\d+) = empty_strided_cuda\(\(3, \)", program)
    assert len(counters) == 1
    assert len(re.findall(rf"\.run\(.*{counters[0]}.*workspace", program)) == 2
    assert len(launches(program)) == 3  # with the kernel that clears the counters
