"""Every form of linear layer: found, replaced, equal; every form that is none: left alone for its own true reason."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._dynamo.utils import counters

import pifa_compile
from pifa_compile.passes.forms import _FORMS, match_linear

OUT, IN, RANK = 24, 16, 5


def low_rank(*shape: int) -> nn.Parameter:
    m, n = shape[:2]
    flat = torch.randn(m, RANK, dtype=torch.float64) @ torch.randn(RANK, n, dtype=torch.float64)
    return nn.Parameter((flat / n).float().view(shape))


class Holder(nn.Module):
    """Parameters in every orientation and a function that uses some of them."""

    def __init__(self, function) -> None:
        super().__init__()
        self.out_in, self.in_out = low_rank(OUT, IN), low_rank(IN, OUT)
        self.bias = nn.Parameter(torch.randn(OUT))
        self.point1, self.point2, self.point3 = (low_rank(OUT, IN, *[1] * d) for d in (1, 2, 3))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def conv1d_of_transformers(s, x):
    size = x.shape[:-1]
    return torch.addmm(s.bias, x.view(-1, IN), s.in_out).view((*size, OUT))


FORMS = {
    "linear with bias": lambda s, x: F.linear(x, s.out_in, s.bias),
    "linear": lambda s, x: F.linear(x, s.out_in),
    "linear by keywords": lambda s, x: F.linear(input=x, weight=s.out_in, bias=s.bias),
    "linear of a transpose": lambda s, x: F.linear(x, s.in_out.t(), s.bias),
    "matmul": lambda s, x: torch.matmul(x, s.in_out),
    "method matmul": lambda s, x: x.matmul(s.in_out),
    "at": lambda s, x: x @ s.in_out,
    "at T": lambda s, x: x @ s.out_in.T,
    "at mT": lambda s, x: x @ s.out_in.mT,
    "at t()": lambda s, x: x @ s.out_in.t(),
    "at transpose": lambda s, x: x @ s.out_in.transpose(0, 1),
    "at transpose from the end": lambda s, x: x @ s.out_in.transpose(-2, -1),
    "at permute": lambda s, x: x @ s.out_in.permute(1, 0),
    "at two transposes": lambda s, x: x @ s.in_out.T.T,
    "mm": lambda s, x: torch.mm(x.view(-1, IN), s.in_out),
    "weight on the left": lambda s, x: s.out_in @ x.transpose(1, 2),
    "transposed weight on the left": lambda s, x: torch.matmul(s.in_out.T, x.transpose(1, 2).contiguous()),
    "weight on the left of a matrix": lambda s, x: torch.mm(s.out_in, x[0].T),
    "addmm": lambda s, x: torch.addmm(s.bias, x.view(-1, IN), s.out_in.t()),
    "Conv1D": conv1d_of_transformers,
    "einsum": lambda s, x: torch.einsum("bsi,oi->bso", x, s.out_in),
    "einsum transposed": lambda s, x: torch.einsum("bsi,io->bso", x, s.in_out),
    "einsum weight first": lambda s, x: torch.einsum("oi,...i->...o", s.out_in, x),
    "conv1d": lambda s, x: F.conv1d(x.transpose(1, 2), s.point1, s.bias),
    "conv1d unbatched": lambda s, x: F.conv1d(x[0].T.contiguous(), s.point1),
    "conv2d": lambda s, x: F.conv2d(x.reshape(3, IN, 2, 2), s.point2, s.bias).view(3, -1),
    "conv2d channels last": lambda s, x: F.conv2d(
        x.transpose(1, 2).reshape(3, IN, 2, 2).contiguous(memory_format=torch.channels_last), s.point2
    ),
    "conv3d": lambda s, x: F.conv3d(x.transpose(1, 2).reshape(3, IN, 2, 2, 1), s.point3, s.bias, padding="valid"),
}


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    monkeypatch.setenv("PIFA_CACHE_DIR", str(tmp_path / "store"))
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()


def compiled(model, **options):
    settings = {"inner": "eager", "density": 0.9, **options}
    return torch.compile(model, backend="pifa", fullgraph=True, options=settings)


@pytest.mark.parametrize("form", FORMS)
def test_the_form_is_replaced_and_gives_the_same(form):
    model, x = Holder(FORMS[form]), torch.randn(3, 4, IN)
    with torch.no_grad():
        expected, y = model(x), compiled(model)(x)
    assert counters["pifa"]["replaced"] == 1
    assert y.shape == expected.shape and y.stride() == expected.stride()
    assert float((y - expected).norm() / expected.norm()) < 1e-5


def test_all_forms_survive_inductor():
    def everything(s, x):
        return [function(s, x) for function in FORMS.values()]

    model, x = Holder(everything), torch.randn(3, 4, IN)
    with torch.no_grad():
        found = compiled(model, inner="inductor")(x)
        for y, expected in zip(found, model(x), strict=True):
            assert y.stride() == expected.stride()
            assert float((y - expected).norm() / expected.norm()) < 1e-5
    # Four forms hold a weight in the other orientation than its first call: they stay dense.
    assert counters["pifa"]["matched"] == len(FORMS)


class Strange(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.w = low_rank(IN, IN)
        self.fused = low_rank(3 * IN, IN)
        self.experts = nn.Parameter(torch.randn(3, IN, IN))
        self.heads = nn.Parameter(torch.randn(IN, 2, IN))
        self.kernel = nn.Parameter(torch.randn(IN, IN, 1))
        self.complex = nn.Parameter(torch.randn(IN, IN, dtype=torch.complex64))
        self.b = nn.Parameter(torch.randn(IN))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


REASONS = {
    "slice": (lambda s, x: F.linear(x, s.fused[:IN]), "part or view of the parameter fused"),
    "chunk": (lambda s, x: x @ s.fused.chunk(3)[1].T, "part or view of the parameter fused"),
    "view": (lambda s, x: F.linear(x, s.fused.view(IN, -1)[:, :IN]), "part or view of the parameter fused"),
    "computed": (lambda s, x: F.linear(x, s.w * 2), "computed in the graph (mul from w, torch.float32)"),
    "computed of inputs too": (lambda s, x: F.linear(x, s.w * x.mean()), "computed in the graph (mul), not"),
    "stack in bmm": (lambda s, x: torch.bmm(x, s.experts), "stack of 3 weights in one 3-dimensional parameter"),
    "stack in matmul": (lambda s, x: x @ s.experts, "stack of 3 weights"),
    "stack in einsum": (lambda s, x: torch.einsum("bsi,bio->bso", x, s.experts), "stack of 3 weights"),
    "einsum that is no linear layer": (lambda s, x: torch.einsum("bsi,oi->bos", x, s.w), "einsum 'bsi,oi->bos'"),
    "left of a vector": (lambda s, x: s.w @ x[0, 0], "on the left of a vector"),
    "einsum over heads": (lambda s, x: torch.einsum("bsi,ihd->bshd", x, s.heads), "with a 3-dimensional parameter"),
    "stack behind a transpose": (lambda s, x: torch.bmm(x, s.experts.transpose(1, 2)), "stack of 3 weights"),
    "scaled addmm": (lambda s, x: torch.addmm(s.b, x[0], s.w, alpha=2), "beta 1 and alpha 2"),
    "addmm onto a matrix": (lambda s, x: torch.addmm(x[0], x[1], s.w), "not a bias"),
    "strided convolution": (lambda s, x: F.conv1d(x.transpose(1, 2), s.kernel, stride=2), "stride"),
    "padded convolution": (lambda s, x: F.conv1d(x.transpose(1, 2), s.kernel, padding=1), "padding"),
    "a vector": (lambda s, x: F.linear(x, s.b), "the weight is a vector"),
    "einsum of a diagonal": (lambda s, x: torch.einsum("bsi,ii->bsi", x, s.w), "einsum 'bsi,ii->bsi' is no linear"),
    "einsum of rows": (lambda s, x: torch.einsum("bss,io->bo", x[:, :, :4], s.w), "einsum 'bss,io->bo' is no linear"),
    "einsum without an output": (lambda s, x: torch.einsum("bsi,oi", x, s.w), "einsum 'bsi,oi' is no linear"),
    "complex": (lambda s, x: F.linear(x.to(torch.complex64), s.complex), "complex64 weight"),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_is_left_alone_says_its_own_reason(case, tmp_path):
    function, reason = REASONS[case]
    model, x = Strange(function), torch.randn(3, 4, IN)
    with torch.no_grad():
        expected, y = model(x), compiled(model, dump=tmp_path / "dump")(x)
    assert torch.equal(y, expected)
    (table,) = (tmp_path / "dump").glob("*/linears.json")
    (row,) = json.loads(table.read_text())["linears"]
    assert reason in row["reason"] and row["state"] == "dense"


def test_products_without_a_parameter_and_wide_convolutions_are_no_linear_layers():
    def forward(s, x):
        mixed = torch.einsum("bst,bti->bsi", x @ x.transpose(1, 2), x)
        mixed = mixed + torch.addmm(x[0, 0], x[0], x[1].T @ x[2])
        return mixed + F.conv1d(x.transpose(1, 2), s.fused.view(IN, IN, 3), padding=1).mT

    with torch.no_grad():
        compiled(Strange(forward))(torch.randn(3, 4, IN))
    assert counters["pifa"]["matched"] == 0


@pytest.mark.parametrize("target", list(_FORMS), ids=lambda target: getattr(target, "__name__", target))
def test_a_call_without_tensors_is_no_linear_layer(target):
    """No graph of Dynamo's has one; a graph that somebody wrote by hand must not stop the compilation."""
    graph = fx.Graph()
    call = graph.call_method if isinstance(target, str) else graph.call_function
    assert match_linear(call(target)) is None
    assert match_linear(call(target, (graph.placeholder("x"),))) is None


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_of_other_dtypes_are_left_alone(dtype, tmp_path):
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(IN, IN).to(dtype), requires_grad=False)
    model.forward = lambda x: F.linear(x, model.w.to(x.dtype))
    with torch.no_grad():
        y = compiled(model)(torch.randn(2, IN))
    assert counters["pifa"]["replaced"] == 0 and torch.isfinite(y).all()


def test_a_weight_used_both_ways_is_replaced_in_the_first(tmp_path):
    def forward(s, x):
        return F.linear(F.linear(x, s.w), s.w.T)

    model, x = Strange(forward), torch.randn(2, 3, IN)
    with torch.no_grad():
        y, expected = compiled(model, dump=tmp_path / "dump")(x), model(x)
    assert float((y - expected).norm() / expected.norm()) < 1e-5
    (table,) = (tmp_path / "dump").glob("*/linears.json")
    reasons = [row["reason"] for row in json.loads(table.read_text())["linears"]]
    assert reasons[0] is None and "transpose" in reasons[1]


def test_gpt2_with_its_fused_projections_and_a_compression_of_the_whole_model():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)).eval()
    report = pifa_compile.compress(model, pifa_compile.Svd(density=0.7, rank_multiple=1), progress=False)
    assert {r.layout for r in report.run.layers if r.object} == {"in_out"}
    ids = torch.randint(0, 64, (2, 7))
    with torch.no_grad():
        torch.compile(model, backend="pifa", options={"inner": "eager"})(ids, use_cache=False)
    assert counters["pifa"]["replaced"] == 8 and counters["pifa"]["skipped"] == 1
