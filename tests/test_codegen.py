"""What Inductor makes on an H200 of the very graph that our passes leave of a model; generated without a GPU."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pretend_h200.codegen import fake, generate, kernels, launches, tails
from pretend_h200.model import graph_on_cuda, program_of

from pifa_compile import _torch
from pifa_compile.kernels import lowering, tile_tables
from pifa_compile.kernels.op import linear

LINEARS = 14  # of a Llama with two layers, its head left out


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The graph of a two-layer Llama in bfloat16 with the factors of its weights, and its inputs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=512, num_hidden_layers=2, use_cache=False, attn_implementation="sdpa", **sizes)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16().eval()
    with torch.no_grad():
        options = {"density": 0.6, "calibrate": "none", "store": tmp_path_factory.mktemp("store")}
        return graph_on_cuda(model, [torch.randint(512, (2, 48))], **options)


@pytest.fixture(scope="module")
def program(llama):
    """What Inductor makes of it with the choices of the table."""
    return program_of(*llama)


def launched_tails(program):
    """The names of the tails that are launched."""
    names = {k.name for k in tails(program)}
    return [name for name in launches(program) if name in names]


def test_every_replaced_layer_of_a_llama_runs_one_product_and_one_tail(llama, program):
    gm, _ = llama
    assert sum(node.target is linear for node in gm.graph.nodes) == LINEARS
    assert len(launched_tails(program)) == LINEARS
    assert program.count("extern_kernels.mm(") == LINEARS + 1  # with the head
    assert not re.search(r"^\s+buf.* = torch.ops.pifa", program, re.M)
    assert "extern_kernels.pifa_tail_library(" not in program


def test_the_gate_fuses_into_a_tail_in_every_layer_of_a_llama(program):
    """silu(gate) * up is computed where up is stored; residuals go into the norms that follow."""
    sources = {k.name: k.source for k in kernels(program)}
    assert sum("libdevice.exp" in sources[name] for name in launched_tails(program)) == 2


def test_the_library_serves_every_layer_where_it_is_measured_to_be_faster(llama):
    program = program_of(
        *llama, max_autotune=True, seconds=lambda choice: 1.0 if "Extern" in type(choice).__name__ else 2.0
    )
    assert program.count("extern_kernels.pifa_tail_library(") == LINEARS
    assert not launched_tails(program)


def test_a_template_serves_every_layer_where_it_is_measured_to_be_faster(llama):
    program = program_of(
        *llama, max_autotune=True, seconds=lambda choice: 2.0 if "Extern" in type(choice).__name__ else 1.0
    )
    assert "extern_kernels.pifa_tail_library(" not in program
    assert len(launched_tails(program)) == LINEARS


def arguments(*lead, m=512, n=256, r=160, dtype=torch.bfloat16, coefficients=None, bias=True):
    def make():
        lowering.register()
        factors = [fake(r, n, dtype=dtype), fake(m - r, r, dtype=coefficients or dtype), fake(m, dtype=torch.int32)]
        return [fake(*lead, n, dtype=dtype), *factors, *([fake(m, dtype=dtype)] if bias else [])]

    return make


@pytest.mark.parametrize("consumer", ["nothing", "silu", "gelu", "residual", "silu times other"])
def test_bias_activation_and_residual_end_in_the_tail(consumer):
    after = {
        "nothing": lambda y, z: y,
        "silu": lambda y, z: F.silu(y),
        "gelu": lambda y, z: F.gelu(y, approximate="tanh"),
        "residual": lambda y, z: y + z,
        "silu times other": lambda y, z: F.silu(y) * z,
    }[consumer]

    def given():
        return [*arguments(2, 64)(), fake(2, 64, 512, dtype=torch.bfloat16)]

    program = generate(lambda x, p, c, o, b, z: after(linear(x, p, c, o, b), z), given)
    assert len(launches(program)) == len(launched_tails(program)) == 1


@pytest.mark.parametrize("tokens", [1, 5, 64, 3000])
@pytest.mark.parametrize("dtypes", [(torch.float16,), (torch.bfloat16,), (torch.bfloat16, torch.float16)])
def test_every_16_bit_form_of_the_operator_has_a_tail(tokens, dtypes):
    pair = dict(zip(("dtype", "coefficients"), dtypes, strict=False))
    program = generate(lambda *a: linear(*a, y_scale=0.25), arguments(tokens, **pair))
    (tail,) = tails(program)
    scale = "4.0" if len(dtypes) == 2 else "1.0"
    assert f"OUT_SCALE : tl.constexpr = {scale}" in tail.source


@pytest.mark.parametrize("spoilt", [0, 1, 99])
def test_a_tile_that_cannot_be_rendered_makes_room_for_the_next(spoilt, monkeypatch):
    """And where none can, the library serves."""
    wanted = tile_tables.table_for("NVIDIA H200").candidates(["tail"], "bfloat16", 64)
    assert len(wanted) > 1
    add, tried = _torch.InductorAutotuner.add, []

    def adding(self, *given, **settings):
        tried.append(settings)
        return "no room" if len(tried) <= spoilt else add(self, *given, **settings)

    monkeypatch.setattr(_torch.InductorAutotuner, "add", adding)
    program = generate(linear, arguments(64))
    assert ("extern_kernels.pifa_tail_library(" in program) == (spoilt == 99)
    if spoilt < 99:
        tile = wanted[spoilt]
        (kernel,) = tails(program)
        assert (kernel.warps, kernel.stages) == (tile.warps, tile.stages)
        assert all(f"{name} : tl.constexpr = {value}" in kernel.source for name, value in tile.constants.items())


@pytest.fixture
def precision():
    before = torch.backends.cuda.matmul.fp32_precision
    yield lambda name: setattr(torch.backends.cuda.matmul, "fp32_precision", name)
    torch.backends.cuda.matmul.fp32_precision = before


def test_float32_uses_tf32_only_where_torch_allows_it(precision):
    precision("ieee")
    assert not tails(generate(linear, arguments(300, dtype=torch.float32)))  # the library is far better at that
    precision("tf32")
    allowed = generate(linear, arguments(300, dtype=torch.float32))
    assert tails(allowed)
    assert "ALLOW_TF32 : tl.constexpr = True" in allowed


def test_the_number_of_tokens_may_be_dynamic():
    program = generate(lambda *a: F.silu(linear(*a)), dynamic_tokens(arguments(300)))
    (tail,) = kernels(program)
    assert "ks0" in tail.signature
    assert len(launched_tails(program)) == 1


def dynamic_tokens(make):
    """The same arguments, with a symbol for the first size of the first one."""

    def given():
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        first, *rest = make()
        env = first.fake_mode.shape_env
        symbol = env.create_symbol(first.shape[0], ConstantSource("tokens"), DimDynamic.DYNAMIC)
        tokens = env.create_symintnode(symbol, hint=first.shape[0])
        return [torch.empty(tokens, first.shape[1], dtype=first.dtype, device="cuda"), *rest]

    return given


def test_a_relay_is_not_made_for_a_dynamic_number_of_tokens():
    span = tile_tables.Span(("bfloat16",), 1, None)
    table = tile_tables.read(tile_tables.FOLDER / "nvidia-h200.json")
    with tile_tables.use_table(replace(table, forms=(tile_tables.FormRow("relay", span, (0.0, 1.0), ""),), untried=())):
        assert "arg_COUNTERS" in generate(linear, arguments(8, bias=False))
        assert "arg_COUNTERS" not in generate(linear, dynamic_tokens(arguments(8, bias=False)))


def test_a_layer_of_full_row_rank_needs_no_tail():
    program = generate(linear, arguments(64, m=160, r=160))
    assert not launched_tails(program)
