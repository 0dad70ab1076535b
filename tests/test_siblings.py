"""Layers that read the same few tokens on CUDA: the operator, its two kernels, and the pass that makes it."""

from __future__ import annotations

import copy
import itertools
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import triton
from pretend_h200.codegen import fake, generate, kernels, launches, tails
from pretend_h200.cubin import compile_kernel
from pretend_h200.interpreter import Launch, interpret
from pretend_h200.model import graph_on_cuda, program_of
from pretend_h200.shipped import LAUNCHES_EARLY, TABLES, ids, tiles_of
from torch import nn

import pifa_compile
from pifa_compile.kernels import few, lowering
from pifa_compile.kernels import tile_tables as tiles
from pifa_compile.kernels.op import linear
from pifa_compile.kernels.siblings import MOST, siblings
from pifa_compile.kernels.triton_templates import GRIDS

TEMPLATES = (few.HEAD, few.TAIL)
TILES = tiles_of(TEMPLATES)
SPILLS = 0 if triton.__version__ >= "3.7" else 4
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6}
SHAPES = [  # n, then m and r of each layer
    (70, [(100, 16), (90, 33)]),
    (520, [(129, 128), (40, 16), (64, 1)]),
    (64, [(33, 32)] * MOST),
]


def random_layers(n, sizes, dtype, tokens=2):
    """x and the factors of each layer: pivot rows, coefficients, row order."""
    generator = torch.Generator().manual_seed(n + tokens)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    orders = [torch.randperm(m, generator=generator).int() for m, _ in sizes]
    layers = [(numbers(r, n) / n**0.5, numbers(m - r, r), order) for (m, r), order in zip(sizes, orders, strict=True)]
    return numbers(tokens, n), layers


def in_lists(layers):
    return [list(tensors) for tensors in zip(*layers, strict=True)]


def exact(x, layers):
    """The output of the operator in float64."""
    found = []
    for p, c, order in layers:
        y_p = x.double() @ p.double().T
        y = torch.empty(*x.shape[:-1], len(order), dtype=torch.float64)
        y[..., order.long()] = torch.cat([y_p, y_p @ c.double().T], -1)
        found.append(y)
    return torch.cat(found, -1)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("n", "sizes"), SHAPES)
def test_the_operator_is_its_layers_side_by_side(n, sizes, dtype, relative):
    x, layers = random_layers(n, sizes, dtype)
    assert relative(siblings(x, *in_lists(layers)), exact(x, layers)) < TOLERANCE[dtype]
    torch.library.opcheck(siblings, (x, *in_lists(layers)), test_utils=("test_schema", "test_faketensor"))


def only(tile):
    """A table with ``tile`` alone of its template, for every call, and some tile of the other one."""
    always = tiles.Span(("float16", "bfloat16", "float32"), 1, None)
    (other,) = {*TEMPLATES} - {tile.template}
    rows = (tile, next(t for _, t in TILES if t.template == other))
    return tiles.use_table(replace(TABLES["safe"], tiles=tuple(replace(row, span=always) for row in rows)))


def program_for(tokens, n, sizes, dtype, then=lambda y: y, **settings):
    k = len(sizes)

    def given():
        lowering.register()
        rows, others = [(r, n) for _, r in sizes], [(m - r, r) for m, r in sizes]
        orders = [fake(m, dtype=torch.int32) for m, _ in sizes]
        return [*(fake(*shape, dtype=dtype) for shape in [(tokens, n), *rows, *others]), *orders]

    def applied(x, *f):
        return then(siblings(x, list(f[:k]), list(f[k : 2 * k]), list(f[2 * k :])))

    return generate(applied, given, **settings)


@pytest.mark.parametrize("slowest", [0, -1])
def test_the_tile_that_is_measured_to_be_the_fastest_is_taken(slowest):
    tile = next(t for _, t in TILES if t.template == "few_head")
    always = replace(tile, span=tiles.Span(("bfloat16",), 1, None))
    other = replace(always, warps=2 * tile.warps)
    tail = next(t for _, t in TILES if t.template == "few_tail")
    given = (always, other, replace(tail, span=always.span))

    def seconds(choice):
        return 2.0 if choice.bmreq.num_warps == given[:2][slowest].warps else 1.0

    with tiles.use_table(replace(TABLES["safe"], tiles=given)):
        program = program_for(2, 64, [(48, 16)] * 2, torch.bfloat16, max_autotune=True, seconds=seconds)
    assert kernels(program)[0].warps == given[:2][slowest - 1].warps


def test_more_tokens_than_any_tile_is_for_are_refused():
    """The graph pass asks first; a graph of somebody else may hold the operator."""
    with pytest.raises(Exception, match=r"no tile of few_head for torch\.bfloat16 and 4096 tokens"):
        program_for(4096, 64, [(48, 16)] * 2, torch.bfloat16)


@pytest.mark.parametrize(("table", "tile"), TILES, ids=ids(TILES))
def test_every_tile_compiles_for_sm_90_without_spills(table, tile, tf32):
    dtype = getattr(torch, tile.span.dtypes[-1])
    with only(tile):
        program = program_for(tile.span.last, 4096, [(4096, 1392)] * 3, dtype, then=F.silu)
    kernel = kernels(program)[TEMPLATES.index(tile.template)]
    cubin = compile_kernel(kernel)
    assert cubin.spills <= SPILLS
    assert cubin.registers <= 65536 // (32 * tile.warps)
    assert cubin.shared_bytes <= (100 << 10 if table == "safe" else 227 << 10)
    # A head starts when all before it is done: its weights may just have been written. It lets the tail start early.
    head = tile.template == "few_head"
    assert (cubin.triggers > 0) == (tile.early and head)
    assert (cubin.waits > 0) == kernel.early == (tile.early and not head)
    if tile.constants["BLOCK_M"] == 1:
        assert cubin.mma == cubin.wgmma == 0
        assert len(re.findall(r"LDG\.E\S*\.128", cubin.sass)) >= 12  # 16-byte loads, several under way in each layer
    else:
        assert cubin.mma > 0 and cubin.async_copies > 0
        assert not [line for line in cubin.sass.splitlines() if "LDGSTS" in line and ".128" not in line]


@pytest.mark.skipif(not LAUNCHES_EARLY, reason="this torch launches no template early")
@pytest.mark.parametrize("tokens", [1, 16])
def test_once_tried_the_second_halves_start_early_and_the_first_ones_let_them(tokens):
    def program(then=lambda c: c):
        def given():
            lowering.register()
            sizes = [(tokens, 512), (96, 512), (80, 512), (416, 96), (432, 80), (96, 512), (416, 96)]
            return [*(fake(*s, dtype=torch.bfloat16) for s in sizes), *(fake(512, dtype=torch.int32) for _ in range(3))]

        def applied(x, p, q, c, d, rows, coefficients, o, u, order):
            y = F.silu(siblings(x, [p, q], [then(c), d], [o, u]))
            return linear(torch.narrow(y, 1, 0, 512), rows, then(coefficients), order)

        return generate(applied, given)

    def early(program):
        found = [k for k in kernels(program) if {"arg_P0", "arg_O0"} & {*k.signature}]
        return [(k.early, "gdc_wait" in k.source, "gdc_launch" in k.source) for k in found]

    head, tail = (False, False, True), (True, True, False)
    with tiles.use_table(replace(TABLES["nvidia-h200"], untried=())):
        assert sorted(early(program())) == sorted([head, tail, tail])
        # Coefficients that a kernel of the program writes: nothing reads them before that one is done.
        assert sorted(early(program(lambda c: 2 * c))) == sorted([head, (False, False, False), (False, False, False)])
    assert early(program()) == [(False, False, False)] * 3  # as shipped


def launch_of(tile, x, layers):
    """The launch of one of the two kernels on random numbers, its output poisoned, and what it must give."""
    (tokens, n), sizes = x.shape, [(len(order), len(p)) for p, _, order in layers]
    with only(tile):
        kernel = kernels(program_for(tokens, n, sizes, x.dtype))[TEMPLATES.index(tile.template)]
    rows, coefficients, orders = in_lists(layers)
    y_p = torch.cat([x @ p.T for p in rows], -1)
    block, features = tile.constants["BLOCK_N"], sum(m for m, _ in sizes)
    count = sum(-(-r // block) for _, r in sizes)
    if tile.template == "few_head":
        given, wanted = [x, *rows], torch.cat([x.double() @ p.double().T for p in rows], -1)
    else:
        count += sum(-(-(m - r) // block) for m, r in sizes)
        given, wanted = [y_p, *coefficients, *orders], torch.empty(tokens, features, dtype=torch.float64)
        left = right = 0
        for c, order in zip(coefficients, orders, strict=True):
            own = y_p[:, left : left + c.shape[1]].double()
            wanted[:, right + order.long()] = torch.cat([own, own @ c.double().T], -1)
            left, right = left + c.shape[1], right + len(order)
    meta = {**tile.constants, "TILES": count}
    grid = GRIDS[tile.template](tokens, features, meta, cdiv=lambda a, b: -(-a // b))
    return Launch(kernel, [*given, torch.full(wanted.shape, torch.nan, dtype=x.dtype)], grid), wanted


def test_every_tile_computes_the_whole_output_on_odd_shapes(relative):
    cases = []
    for (i, (_, tile)), tokens in itertools.product(enumerate(TILES), (1, 2, 3, 11, 16)):
        if tile.span.holds(tile.span.dtypes[0], tokens):
            dtype = getattr(torch, tile.span.dtypes[tokens % len(tile.span.dtypes)])
            cases.append((tile, dtype, *launch_of(tile, *random_layers(*SHAPES[(i + tokens) % 3], dtype, tokens))))
    assert {tile.template for tile, *_ in cases} == set(TEMPLATES)
    for (tile, dtype, _, wanted), (arguments,) in zip(cases, interpret([[c[2]] for c in cases]), strict=True):
        assert relative(arguments[-1], wanted) < TOLERANCE[dtype], (tile, wanted.shape)


@pytest.mark.parametrize("tokens", [1, 2, 3, 16])
@pytest.mark.parametrize("dtypes", [("float16", None), ("bfloat16", None), ("bfloat16", "float16")])
def test_the_same_kernels_run_one_layer_also_with_coefficients_of_another_dtype(tokens, dtypes, relative):
    dtype, inner = (getattr(torch, name or dtypes[0]) for name in dtypes)
    x, [(p, c, order)] = random_layers(130, [(257, 33)], dtype, tokens)
    c = c.to(inner)
    few_tokens = tiles.FormRow("few", tiles.Span(("float16", "bfloat16"), 1, 16), (0.0, 1.0), "")

    def given():
        lowering.register()
        return [*(fake(*t.shape, dtype=t.dtype) for t in (x, p, c, order))]

    with tiles.use_table(replace(TABLES["nvidia-h200"], forms=(few_tokens,))):
        program = generate(lambda *a: linear(*a, y_scale=0.25), given)
    head, tail = kernels(program)
    scales = ("0.25", "4.0") if dtypes[1] else ("1.0", "1.0")
    assert f" SCALE : tl.constexpr = {scales[0]}" in head.source
    assert f"OUT_SCALE : tl.constexpr = {scales[1]}" in tail.source
    y_p = torch.full((tokens, 33), torch.nan, dtype=inner)
    y = torch.full((tokens, 257), torch.nan, dtype=dtype)
    (block,) = {8, 32} & {int(v) for v in re.findall(r"BLOCK_N : tl.constexpr = (\d+)", head.source)}
    head_grid, tail_grid = -(-33 // block), -(-33 // block) + -(-(257 - 33) // block)
    rows = 1 if tokens > 2 else tokens  # programs side by side: of 16 tokens, or of one
    launches = [
        Launch(head, [x, p, y_p], (rows * head_grid, 1, 1)),
        Launch(tail, [y_p, c, order, y], (rows * tail_grid, 1, 1)),
    ]
    (_, (*_, found)) = interpret([launches])[0]
    assert relative(found, exact(x, [(p, c, order)])) < TOLERANCE[dtype]


# --- the pass --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=512, num_hidden_layers=2, use_cache=False, attn_implementation="sdpa", **sizes)
    torch.manual_seed(0)
    return LlamaForCausalLM(config).bfloat16().eval()


@pytest.mark.parametrize("prepared", [False, True])
def test_a_decoding_llama_has_nine_launches_a_block_for_its_linear_layers(llama, prepared, tmp_path):
    words = torch.randint(512, (1, 1))
    with torch.no_grad():
        options = {"density": 0.6, "calibrate": "none", "store": tmp_path}
        if prepared:
            options, llama = {}, copy.deepcopy(llama)
            pifa_compile.compress(llama, pifa_compile.Svd(density=0.6), store=tmp_path, progress=False)
            pifa_compile.apply_(llama, store=tmp_path)
        gm, given = graph_on_cuda(llama, [words], **options)
    targets = Counter(node.target for node in gm.graph.nodes)
    assert targets[siblings] == 4 and targets[linear] == 4  # q, k, v; gate, up; and o, down
    program = program_of(gm, given)
    heads = [k.name for k in kernels(program) if "arg_P0" in k.signature]
    ends = [k.name for k in tails(program)]
    count = Counter(launches(program))
    assert sum(count[name] for name in heads) == 4
    assert sum(count[name] for name in ends) == 8
    assert not re.search(r"^\s+buf.* = torch.ops.pifa", program, re.M)


class Three(nn.Module):
    """Layers of different sizes over one input; with ``change``, that is written in between."""

    def __init__(self, number=3, bias=True, change=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(48, 40 + 8 * i, bias) for i in range(number))
        self.change = change

    def forward(self, x):
        x = x * 1.0
        first = self.layers[0](x)
        if self.change:
            x.add_(1.0)
        return [first, *(layer(x) for layer in self.layers[1:])]


def grouped(model, x, tmp_path, **options):
    """The graph on CUDA, and its outputs by the operators' own reference."""
    with torch.no_grad():
        gm, given = graph_on_cuda(model, [x], density=0.6, calibrate="none", store=tmp_path, **options)
        return gm, gm(*given)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 4, 48)])
def test_siblings_become_one_operator_that_gives_what_they_gave(shape, bias, tmp_path, relative):
    model, x = Three(bias=bias).bfloat16(), torch.randn(shape).bfloat16()
    gm, found = grouped(model, x, tmp_path)
    assert [node.target for node in gm.graph.nodes].count(siblings) == 1
    wanted = pifa_compile.restore_(pifa_compile.apply_(model, store=tmp_path)).double()(x.double())
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and relative(one, other) < 2e-2


def operators(gm):
    return Counter(node.target for node in gm.graph.nodes if node.target in (siblings, linear))


def test_what_cannot_be_together_stays_apart(tmp_path):
    x = torch.randn(1, 48).bfloat16()
    many, _ = grouped(Three().bfloat16(), torch.randn(64, 48).bfloat16(), tmp_path)
    assert operators(many) == {linear: 3}  # for many tokens
    written, _ = grouped(Three(change=True).bfloat16(), x, tmp_path)
    assert operators(written) == {linear: 3}  # what they read is written in between
    exact_float, _ = grouped(Three(), x.float(), tmp_path)
    assert operators(exact_float) == {linear: 3}  # no tiles for float32 without TF32
    eager, _ = grouped(Three().bfloat16(), x, tmp_path, inner="eager")
    assert operators(eager) == {linear: 3}  # without a compiler
    same = Three(number=1).bfloat16()
    same.layers.append(same.layers[0])
    twice, _ = grouped(same, x, tmp_path)
    assert operators(twice) == {linear: 2}  # a kernel takes a tensor once
    five, _ = grouped(Three(number=5).bfloat16(), x, tmp_path)
    assert operators(five) == {siblings: 1, linear: 1}  # four at most
