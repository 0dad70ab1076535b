"""Calibration on a first call: exact moments, better than no data, and nothing of the caller's is changed."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import pifa_compile
from pifa_compile import Store, Svd
from pifa_compile.compression.observe import CapturedGraph, results
from pifa_compile.compression.shrinkage import INDEPENDENT, shrink, shrinkage
from pifa_compile.errors import AmbiguousRunError, RecipeError
from pifa_compile.options import Settings
from pifa_compile.passes.detect import detect
from pifa_compile.passes.plan import Context, Plan
from pifa_compile.recipes import FirstCall

OPTIONS = {"inner": "eager", "calibrate": "first-call"}
pytestmark = pytest.mark.filterwarnings("ignore:pifa. the first call has")


class Mlp(nn.Module):
    """Two layers whose inputs lie near a subspace, and outputs of which a few matter."""

    def __init__(self, width: int = 48, hidden: int = 128) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        with torch.no_grad():
            self.down.weight.mul_(torch.logspace(0, -2, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


def inputs(*shape: int, width: int = 48, seed: int = 0) -> torch.Tensor:
    """Tokens whose powers fall over two decades, in directions that are the same for every seed."""
    basis = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(99))).Q
    x = torch.randn(*shape, width, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(0, -2, width) @ basis


def compiled(model, density=0.5, **options):
    return torch.compile(model, backend="pifa", options=OPTIONS | {"density": density} | options)


def relative(y, wanted) -> float:
    return float((y.double() - wanted.double()).norm() / wanted.double().norm())


def captured(model, *arguments, guard=torch.no_grad, **keywords):
    """The graph of a call of the model, as the backend gets it, and its open sites."""
    seen = []

    def backend(gm, examples):
        values = dict(zip(gm.graph.find_nodes(op="placeholder"), examples, strict=True))
        context = Context(Settings(), values, Plan(), lambda _: None, None, None)
        detect(gm, context)
        seen.append((CapturedGraph(gm, values), [s for s in context.plan.sites if s.open]))
        return gm.forward

    torch._dynamo.reset()
    with guard():
        torch.compile(model, backend=backend, fullgraph=True)(*arguments, **keywords)
    return seen[0]


# --- what is observed ------------------------------------------------------------------------------------------------


def test_moments_of_inputs_are_those_of_the_call():
    model, x = Mlp().eval(), inputs(3, 20)
    graph, sites = captured(model, x)
    up, down = graph.input_moments([[site] for site in sites])
    hidden = nn.functional.gelu(model.up(x)).detach().double().flatten(0, 1)
    rows = x.double().flatten(0, 1)
    assert up.count == down.count == 60
    assert torch.allclose(up.gram, rows.T @ rows)
    assert torch.allclose(down.gram, hidden.T @ hidden, rtol=1e-6, atol=1e-7)


def test_a_layer_with_two_calls_sums_what_both_read_and_one_input_counts_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.a(self.a(x).relu()) + self.b(x)

    model, x = Twice().eval(), torch.randn(9, 16)
    graph, sites = captured(model, x)
    a, first, b = graph.input_moments([[s for s in sites if s.name == "a"], [sites[0], sites[-1]], [sites[-1]]])
    second = model.a(x).relu().detach().double()
    assert torch.allclose(a.gram, x.double().T @ x.double() + second.T @ second, rtol=1e-6)
    assert torch.equal(first.gram, b.gram) and first.count == 9


def test_channels_of_a_convolution_are_its_inputs():
    model, x = nn.Conv2d(6, 10, 1).eval(), torch.randn(2, 6, 4, 5)
    graph, (site,) = captured(model, x)
    (moments,) = graph.input_moments([[site]])
    rows = x.double().movedim(1, -1).reshape(-1, 6)
    assert moments.count == 40 and torch.allclose(moments.gram, rows.T @ rows)
    (gradients,) = graph.output_moments([[site]], "full", 1)
    assert gradients.m == 10 and gradients.samples == 40


def test_gradient_moments_are_those_of_the_jacobian():
    """With signs s independent, E[J^T s s^T J] is the sum of J^T J over the outputs."""
    model = Mlp(6, 10).double().eval()
    x = torch.randn(40, 6, dtype=torch.float64)
    graph, (up, down) = captured(model, x)
    first, last = graph.output_moments([[up], [down]], "full", 2000)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda h: model.down(nn.functional.gelu(h))))(model.up(x))
    wanted = torch.einsum("toi,toj->ij", jacobian, jacobian) / 40
    assert first.samples == 80000
    assert relative(first.mean(), wanted.detach()) < 0.02
    assert relative(last.mean(), torch.eye(6)) < 0.02
    diagonal, _ = graph.output_moments([[up], [down]], "diagonal", 2000)
    assert torch.allclose(diagonal.mean(), first.mean().diagonal())


def test_padding_under_an_attention_mask_does_not_count():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x, attention_mask):
            return self.layer(x) * attention_mask.unsqueeze(-1)

    x, mask = torch.randn(3, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    graph, (site,) = captured(Masked().eval(), x, attention_mask=mask)
    (moments,) = graph.input_moments([[site]])
    rows = x[mask.bool()].double()
    assert moments.count == 9 and torch.allclose(moments.gram, rows.T @ rows)
    (gradients,) = graph.output_moments([[site]], "full", 3)
    assert gradients.samples == 27
    whole, _ = captured(Masked().eval(), x, attention_mask=torch.ones_like(mask))
    assert whole.mask is None


def test_tokens_that_are_not_finite_do_not_count():
    x = torch.randn(6, 8)
    x[2, 3] = torch.inf
    graph, (site,) = captured(nn.Linear(8, 4).eval(), x)
    (moments,) = graph.input_moments([[site]])
    rows = x[[0, 1, 3, 4, 5]].double()
    assert moments.count == 5 and torch.allclose(moments.gram, rows.T @ rows)


def test_what_a_cache_keeps_is_no_result_but_hidden_states_before_a_pooler_are():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.k, self.mix, self.pool = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            h = x * 2.0
            k = self.k(h)
            hidden = h + self.mix(k)
            return k, hidden, torch.tanh(self.pool(hidden[:, 0]))

    graph, sites = captured(Cached().eval(), torch.randn(2, 3, 8))
    (end,) = graph.gm.graph.find_nodes(op="output")
    outputs = end.args[0]
    assert results(graph.gm.graph) == [outputs[1], outputs[2]]
    assert [s.name for s in sites] == ["k", "mix", "pool"]


def test_equal_inputs_have_equal_digests_and_others_have_not():
    model, x = Mlp().eval(), inputs(30)
    first, again, other = (captured(model, t)[0].digest() for t in (x, x.clone(), x + 1e-3))
    assert first == again != other
    model.down.weight.data.mul_(2)
    assert captured(model, x)[0].digest() == first, "weights are no inputs"


# --- what is not changed ---------------------------------------------------------------------------------------------


class Stateful(Mlp):
    """Writes to a buffer, to a part of a cache it is given, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        cache[:, : x.shape[-2]] = x
        h = super().forward(cache[:, : x.shape[-2]] + self.calls)
        h += nn.functional.dropout(x, 0.5, True)
        return h


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_caller_finds_everything_as_after_one_dense_call(guard):
    model, x = Stateful().eval(), inputs(2, 40)
    cache, expected = torch.zeros(2, 64, 48), torch.zeros(2, 64, 48)
    twin = copy.deepcopy(model)
    state = torch.get_rng_state()
    with guard():
        twin(x, expected)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        y = compiled(model, 0.8, allow_grad=True)(x, cache)
    assert counters["pifa"]["factored"] == 2
    assert torch.equal(torch.get_rng_state(), after), "as many numbers drawn as by one call"
    assert torch.equal(model.calls, twin.calls) and torch.equal(cache, expected)
    assert all(p.grad is None for p in model.parameters()) and x.grad is None
    assert torch.isfinite(y).all()


def test_observing_alone_changes_nothing():
    model, x, cache = Stateful().eval(), inputs(2, 40), torch.zeros(2, 64, 48)
    graph, sites = captured(model, x, cache)
    model.calls.zero_()
    cache.zero_()
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    graph.input_moments([[s] for s in sites])
    found = graph.output_moments([[s] for s in sites], "full", 3)
    assert all(m is not None and m.samples == 240 for m in found)
    assert graph.activation_bytes > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert float(model.calls) == float(cache.abs().max()) == 0
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before, strict=True))


def test_a_parameter_that_the_graph_writes_to_is_not_written_to_by_observing():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.seen = nn.Parameter(torch.zeros(2, 8), requires_grad=False)

        def forward(self, x):
            self.seen[0].add_(x.sum(0))
            return self.layer(x) + self.seen[0]

    model, x = Counting().eval(), torch.randn(5, 8)
    graph, (site,) = captured(model, x)
    before = model.seen.clone()
    graph.input_moments([[site]])
    assert graph.output_moments([[site]], "full", 1)[0] is not None
    assert torch.equal(model.seen, before)


# --- the run ---------------------------------------------------------------------------------------------------------


def outputs(model, x, density=0.5, **options):
    torch._dynamo.reset()
    with torch.no_grad():
        return compiled(model, density, **options)(x)


def test_it_is_nearer_to_the_dense_model_than_without_data_also_on_other_inputs():
    model, other = Mlp().eval(), inputs(500, seed=1)
    with torch.no_grad():
        wanted = model(other)
        f = compiled(model)
        f(inputs(500))
        calibrated = f(other)
    plain = outputs(model, other, calibrate="none")
    methods = {run.header.recipe["method"] for run in Store().runs()}
    assert methods == {"first-call", "svd"}
    assert relative(calibrated, wanted) < 0.5 * relative(plain, wanted)


def test_the_factors_are_the_weighted_optimum_at_their_ranks():
    """Against a float64 solution by SVD, of a layer whose output is the graph's: its weighting is near the identity."""
    layer, x = nn.Linear(40, 30, bias=False).eval(), inputs(4000, width=40)
    y = outputs(layer, x)
    (run,) = Store().runs()
    (record,) = run.layers
    gram = shrink(x.double().T @ x.double(), len(x))
    root = torch.linalg.cholesky(gram)
    u, s, vh = torch.linalg.svd(layer.weight.detach().double() @ root)
    best = u[:, : record.rank] * s[: record.rank] @ vh[: record.rank] @ torch.linalg.inv(root)
    wanted, dense = x.double() @ best.T, x.double() @ layer.weight.detach().double().T
    assert record.least_error == pytest.approx(float(s[record.rank :].norm() / s.norm()), rel=1e-6)
    assert record.least_error <= record.truncation < 1.02 * record.least_error
    assert relative(y, dense) < 1.02 * relative(wanted, dense)


def test_the_run_says_what_it_was_calibrated_on_and_keeps_its_density():
    model, x = Mlp().eval(), inputs(300)
    outputs(model, x)
    (run,) = Store().runs()
    assert run.complete and run.density_all <= 0.5 and run.run_id.startswith("first-call-0.5-")
    graph, _ = captured(model, x)
    assert run.header.calibration == {"source": "first call", "digest": graph.digest()}
    for record in run.layers:
        assert record.object is None or record.details["tokens"] == 300
        assert record.object is not None or record.reason.startswith("left dense by the allocation")


def test_other_inputs_and_other_shapes_find_the_run_of_the_first(recwarn):
    model = Mlp().eval()
    with torch.no_grad():
        f = compiled(model)
        y = f(inputs(300))
        f(inputs(200))
        f(inputs(2, 50))
        assert torch.equal(f(inputs(300)), y)
    assert counters["pifa"]["factored"] == 2
    assert len(Store().runs()) == 1


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_a_graph_with_sizes_that_change(guard):
    model, x, other = Mlp().eval(), inputs(4, 70), inputs(3, 40)
    with guard():
        f = torch.compile(model, backend="pifa", dynamic=True, options=OPTIONS | {"density": 0.5})
        y = f(x)
        f(other)
        wanted = model(x)
    assert counters["stats"]["unique_graphs"] == 1 and counters["pifa"]["factored"] == 2
    assert relative(y, wanted) < 0.5


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model, x = Mlp().eval(), inputs(200)
        y = compiled(model, 0.8, allow_grad=True)(x)
        assert relative(y, model(x)) < 0.2
    assert counters["pifa"]["replaced"] == 2


def test_under_autocast():
    model, x = Mlp().eval(), inputs(300)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = compiled(model, 0.8)(x)
        wanted = model(x)
    assert y.dtype == torch.bfloat16
    assert relative(y, wanted) < 0.1


def test_a_model_in_sixteen_bits():
    model, x = Mlp().eval().to(torch.bfloat16), inputs(300).to(torch.bfloat16)
    y = outputs(model, x, 0.8)
    assert y.dtype == torch.bfloat16
    with torch.no_grad():
        assert relative(y, model(x)) < 0.1


def test_each_graph_between_breaks_has_a_run_of_its_own():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Mlp(), Mlp()

        def forward(self, x):
            h = self.a(x)
            torch._dynamo.graph_break()
            return self.b(h)

    model = Broken().eval()
    outputs(model, inputs(300))
    runs = Store().runs()
    assert len(runs) == 2 and len({run.header.calibration["digest"] for run in runs}) == 2
    assert counters["pifa"]["factored"] == counters["pifa"]["replaced"] == 4
    outputs(model, inputs(200))
    assert counters["pifa"]["factored"] == 4 and counters["pifa"]["replaced"] == 8


def test_few_tokens_warn_once_and_name_the_cure():
    model = Mlp().eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs(model, inputs(30))
    (message,) = [str(w.message) for w in caught if "tokens" in str(w.message)]
    assert message.startswith("pifa: the first call has 30 tokens, less than half the inputs of 1 of its layers")
    assert "`pifa compress`" in message
    assert counters["pifa"]["factored"] == 2


@pytest.mark.parametrize("tokens", [1, 4])
def test_hardly_any_tokens_are_no_worse_than_none(tokens):
    model, other = Mlp().eval(), inputs(500, seed=1)
    with torch.no_grad():
        wanted = model(other)
        f = compiled(model)
        f(inputs(tokens))
        calibrated = f(other)
    assert relative(calibrated, wanted) < 1.1 * relative(outputs(model, other, calibrate="none"), wanted)


def test_a_graph_without_gradients_gives_all_layers_one_density():
    class Hard(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x):
            return self.b(self.a(x).detach()).detach()

    model = Hard().eval()
    outputs(model, inputs(300, width=32))
    (run,) = Store().runs()
    assert [r.rank for r in run.layers] == [r.rank for r in pifa_compile.compress(model, Svd(density=0.5)).run.layers]


def test_an_operator_without_a_derivative_warns_and_goes_on():
    @torch.library.custom_op("pifa_test::shifted", mutates_args=())
    def shifted(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    shifted.register_fake(torch.empty_like)

    class Shifting(Mlp):
        def forward(self, x):
            return torch.ops.pifa_test.shifted(super().forward(x))

    model = Shifting().eval()
    with pytest.warns(UserWarning, match="all layers get one density, because the graph has no gradients"):
        y = outputs(model, inputs(300), 0.8)
    with torch.no_grad():
        assert relative(y, model(inputs(300))) < 0.2


def test_equal_weights_share_factors_and_zero_weights_stay_dense():
    class Equal(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.zero = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
            self.b.load_state_dict(self.a.state_dict())
            nn.init.zeros_(self.zero.weight)

        def forward(self, x):
            return self.a(x) + self.b(x * x) + self.zero(x)

    outputs(Equal().eval(), inputs(300, width=32))
    (run,) = Store().runs()
    assert {r.name: r.reason for r in run.layers} == {"a": None, "zero": "the weight is all zeros"}
    assert counters["pifa"]["factored"] == 1 and counters["pifa"]["replaced"] == 2


def test_layers_that_no_rank_makes_smaller_stay_dense_and_break_nothing():
    outputs(nn.Linear(40, 1).eval(), inputs(300, width=40))
    outputs(nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)).eval(), inputs(300, width=12), 0.01)
    reasons = [record.reason for run in Store().runs() for record in run.layers]
    assert len(reasons) == 3 and all(reason.startswith("no rank of a ") for reason in reasons)


# --- which run -------------------------------------------------------------------------------------------------------


def unwrapped(error: BaseException, kind: type) -> BaseException:
    while not isinstance(error, kind) and error.__cause__ is not None:
        error = error.__cause__
    return error


def test_a_run_of_another_method_is_not_taken_in_its_place():
    model, x = Mlp().eval(), inputs(300)
    pifa_compile.compress(model, Svd(density=0.5), progress=False)
    outputs(model, x)
    assert sorted(run.header.recipe["method"] for run in Store().runs()) == ["first-call", "svd"]
    outputs(model, x, calibrate="none")
    assert counters["pifa"]["factored"] == 4
    options = {"inner": "eager", "density": 0.5}
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception) as caught:
        torch.compile(model, backend="pifa", options=options)(x)
    message = str(unwrapped(caught.value, AmbiguousRunError))
    assert "first-call-0.5-" in message and "svd-0.5-" in message
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend="pifa", options=options | {"method": "first-call"})(x)
    assert counters["pifa"]["factored"] == 4


def test_of_two_graphs_with_the_same_weights_each_is_served_by_its_own_run():
    model, x = Mlp().eval(), inputs(300)
    outputs(model.up, x)
    outputs(model, x)
    small, large = sorted(Store().runs(), key=lambda run: len(run.layers))
    assert (len(small.layers), len(large.layers)) == (1, 2)
    outputs(model.up, x)
    assert counters["pifa"]["factored"] == 3, "the first graph is found again, beside the larger one"


def test_a_run_that_was_interrupted_goes_on_with_the_same_inputs_and_is_begun_anew_with_others(monkeypatch):
    from pifa_compile.compression import first_call

    def interrupted(model, x):
        real, calls = first_call.pivoted, []

        def stop(*arguments):
            if calls:
                raise KeyboardInterrupt
            calls.append(1)
            return real(*arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(first_call, "pivoted", stop)
            outputs(model, x, 0.8)

    model = Mlp().eval()
    interrupted(model, inputs(300))
    (run,) = Store().runs()
    assert not run.complete and len(run.layers) == 1
    outputs(model, inputs(300), 0.8)
    assert counters["pifa"]["factored"] == 2
    Store().delete_run(run.run_id)
    interrupted(model, inputs(300))
    outputs(model, inputs(400), 0.8)
    assert counters["pifa"]["factored"] == 5
    (again,) = Store().runs()
    assert again.complete and again.run_id == run.run_id and again.header.calibration != run.header.calibration


def test_who_comes_second_takes_the_run_of_who_came_first(monkeypatch):
    """Two processes that calibrate on inputs of their own at the same time end up with one run."""
    from pifa_compile import backend

    model = Mlp().eval()
    outputs(model, inputs(300))
    (run,) = Store().runs()
    monkeypatch.setattr(backend, "choose_run", lambda *_: None)
    outputs(model, inputs(400))
    assert counters["pifa"]["factored"] == 2
    assert Store().runs() == [run]


def test_a_dry_run_calibrates_nothing(tmp_path):
    model = Mlp().eval()
    report = pifa_compile.dry_run(model, inputs(300), options={"density": 0.5, "calibrate": "first-call"})
    assert report.planned and not (tmp_path / "store").exists()
    assert counters["pifa"]["factored"] == 0


def test_it_cannot_be_had_without_a_call():
    with pytest.raises(RecipeError, match=r"method 'first-call' needs the call of a compiled model; compile with"):
        pifa_compile.compress(Mlp(), FirstCall(density=0.5), progress=False)


SCRIPT = """
import json, sys
import torch
from torch import nn
from torch._dynamo.utils import counters

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32)).eval()
x = torch.randn(200, 32)
options = {"density": 0.6, "calibrate": "first-call", "inner": "eager"}
with torch.no_grad():
    y = torch.compile(model, backend="pifa", options=options)(x[: int(sys.argv[1])])
print(json.dumps({"y": y[:50].double().sum().item(), "pifa": dict(counters["pifa"])}))
"""


def test_a_second_process_computes_nothing_whatever_its_inputs(tmp_path):
    def run(tokens: int) -> dict:
        environment = os.environ | {"PIFA_CACHE_DIR": str(tmp_path / "store")}
        command = [sys.executable, "-c", SCRIPT, str(tokens)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    first, second = run(200), run(50)
    assert first["pifa"]["factored"] == first["pifa"]["replaced"] == second["pifa"]["replaced"] == 2
    assert second["pifa"].get("factored", 0) == 0
    assert second["y"] == pytest.approx(first["y"], rel=1e-5)


# --- shrinkage -------------------------------------------------------------------------------------------------------


def test_shrinkage_falls_with_tokens_and_is_near_the_best_share():
    n = 30
    powers = torch.logspace(0, -2, n, dtype=torch.float64)
    truth = torch.diag(powers)
    last = 1.0
    for tokens in (5, 20, 80, 2000):
        x = torch.randn(tokens, n, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens)) * powers.sqrt()
        gram = x.T @ x
        spread = float(gram.trace() ** 2 / gram.square().sum())
        share = shrinkage(n, tokens, spread)
        assert 0 < share < last
        last = share
        shares = torch.linspace(0, 1, 201, dtype=torch.float64)
        target = gram.trace() / n * torch.eye(n, dtype=torch.float64)
        errors = [float((((1 - s) * gram + s * target) / tokens - truth).norm()) for s in shares]
        found = ((1 - share) * gram + share * target) / tokens
        assert float((found - truth).norm()) < 1.25 * min(errors)
    assert last < 0.02


def test_shrunk_moments_keep_their_trace_and_nothing_is_the_identity():
    x = torch.randn(7, 12, dtype=torch.float64)
    gram = x.T @ x
    found = shrink(gram, 7)
    share = shrinkage(12, 7 * INDEPENDENT, float(gram.trace() ** 2 / gram.square().sum()))
    assert torch.allclose(found, (1 - share) * gram + share * gram.trace() / 12 * torch.eye(12, dtype=torch.float64))
    assert found.trace() == pytest.approx(float(gram.trace()))
    assert torch.equal(shrink(torch.zeros(3, 3), 0), torch.eye(3))
    assert torch.equal(shrink(torch.zeros(3, 3), 5), torch.eye(3))
    one = torch.outer(x[0], x[0])
    assert torch.allclose(shrink(one, 1), one.trace() / 12 * torch.eye(12, dtype=torch.float64))
