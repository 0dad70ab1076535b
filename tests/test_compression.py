"""compress() and the walk under it: the best factors at the density asked for, each weight once, never twice."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from pifa_compile import pivoting
from pifa_compile.compression import CompressionReport, compress, compress_weights
from pifa_compile.compression.svd import spectrum
from pifa_compile.digest import digest
from pifa_compile.errors import WeightError
from pifa_compile.factors import numbers, rank_for_density
from pifa_compile.layers import LinearWeight, as_matrix
from pifa_compile.pivoting import ERROR_LIMITS
from pifa_compile.recipes import Svd
from pifa_compile.store import RunWriter, Store

SHAPES = [(64, 64), (96, 40), (40, 96), (64, 64), (30, 30)]  # square, tall, wide


def chain(shapes=SHAPES, dtype=torch.float32, seed=0):
    """Linear layers in a list (they need not fit each other), with random weights."""
    torch.manual_seed(seed)
    return nn.ModuleList(nn.Linear(n, m, dtype=dtype) for m, n in shapes)


def run_of(model, density=0.5, store=None, **settings):
    return compress(model, Svd(density=density, **settings), store=store, progress=False).run


def factored():
    return counters["pifa"]["factored"]


def replaced(run):
    return [r for r in run.layers if r.object is not None]


def facts(run):
    """All that is remembered of the layers but for the time that they took."""
    return [replace(r, seconds=0.0) for r in run.layers]


# --- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["pifa", "pair"])
def test_factors_are_the_best_of_their_rank_in_the_dtype_of_the_weight(store, relative, best_error, dtype, form):
    model = chain(dtype=dtype)
    run = run_of(model, 0.5, store, rank_multiple=4, form=form)
    assert len(run.layers) == len(SHAPES)
    assert run.complete
    for r, layer in zip(run.layers, model, strict=True):
        weight = layer.weight.detach()
        factors = store.factors(r)
        assert (r.form, factors.form, factors.dtype) == (form, form, dtype)
        assert (r.shape, r.rank, r.numbers, r.bytes) == (factors.shape, factors.rank, factors.numbers, factors.nbytes)
        assert r.numbers == numbers(form, *weight.shape, r.rank) < weight.numel()
        least = best_error(weight, r.rank)
        assert r.truncation == r.least_error == pytest.approx(least, rel=1e-4)
        assert r.error < ERROR_LIMITS[dtype]
        assert relative(factors.weight(), weight) == pytest.approx((least**2 + r.error**2) ** 0.5, rel=1e-3)
        assert r.details["dtype"] == str(dtype).removeprefix("torch.")
        assert r.reason is None
        assert r.seconds > 0


def test_weights_are_known_by_their_content_and_that_of_their_casts(store):
    model = chain()
    run = run_of(model)
    for r, layer in zip(run.layers, model, strict=True):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert run.by_digest[digest(layer.weight.detach().to(dtype))] == r


def test_transposed_and_convolution_weights_are_stored_as_the_matrices_they_hold(store, relative, best_error):
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({"gpt": Conv1D(60, 40), "conv": nn.Conv2d(40, 60, 1), "kernel": nn.Conv2d(4, 4, 3)})
    nn.init.normal_(model["gpt"].weight)
    run = run_of(model, rank_multiple=4)
    assert [(r.name, r.layout, r.shape) for r in run.layers] == [
        ("gpt", "in_out", (60, 40)),
        ("conv", "conv1x1", (60, 40)),
    ]
    for r in run.layers:
        matrix = as_matrix(model[r.name].weight, r.layout)
        assert relative(store.factors(r).weight(), matrix) == pytest.approx(best_error(matrix, r.rank), rel=1e-4)
        assert digest(model[r.name].weight.detach()) in r.digests.values()


def test_the_model_stays_as_it_is():
    model = chain()
    model[0].weight.requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    run_of(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (2 * len(SHAPES) - 1)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("r", [1, 3, 11])
def test_the_true_rank_is_found_and_never_exceeded(store, relative, random_matrix, r):
    model = chain([(48, 40)])
    model[0].weight.data = random_matrix(48, 40, r, decay=1)
    (layer,) = run_of(model, 0.9, store).layers
    assert layer.rank == r
    assert relative(store.factors(layer).weight(), model[0].weight.detach()) < 1e-5


def test_the_pivoting_of_the_recipe_is_used(store):
    model = chain([(64, 64)])
    found = {p: run_of(model, pivoting=p).layers[0].details["pivoting"] for p in ("maxvol", "qr", "lu")}
    assert found == {p: p for p in found}
    (grouped,) = run_of(model, rank_multiple=8, pivot_group=8).layers
    assert grouped.details["pivoting"] == "groups of 8"
    starts = store.factors(grouped).row_order[: grouped.rank : 8]
    assert not (starts % 8).any()
    odd, even = run_of(chain([(65, 64), (64, 64)]), rank_multiple=8, pivot_group=8).layers
    assert (odd.details["pivoting"], even.details["pivoting"]) == ("maxvol", "groups of 8")


def test_coefficients_of_bfloat16_models_may_have_more_bits(store):
    model = chain(dtype=torch.bfloat16)
    same, finer = run_of(model), run_of(model, coefficients="float16")
    for before, after in zip(same.layers, finer.layers, strict=True):
        factors = store.factors(after)
        assert (factors.dtype, factors.coefficients.dtype) == (torch.bfloat16, torch.float16)
        assert (after.rank, after.bytes) == (before.rank, before.bytes)
        assert after.error < before.error


# --- density ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "density"), [*(("pifa", d) for d in (0.3, 0.5, 0.8)), ("pair", 0.4), ("pair", 0.6)])
@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_the_density_is_reached_within_one_rank_step_and_never_exceeded(density, form, multiple):
    shapes = [(64, 64)] * 6 + [(96, 40), (40, 96), (80, 80)]
    report = compress(chain(shapes), Svd(density=density, rank_multiple=multiple, form=form), progress=False)
    dense = sum(m * n for m, n in shapes)
    kept = sum(r.numbers for r in report.run.layers)
    assert len(replaced(report.run)) == len(shapes)
    assert density - multiple * 160 / dense < kept / dense <= density
    assert report.summary()["density"] == report.run.density == kept / dense


def test_layers_of_low_true_rank_leave_their_share_to_those_after_them(random_matrix):
    shapes = [(64, 64)] * 8
    model = chain(shapes)
    for layer in model[:2]:
        layer.weight.data = random_matrix(64, 64, 2, seed=1 if layer is model[0] else 2)
    run = run_of(model, 0.5, rank_multiple=1)
    assert [r.rank for r in run.layers[:2]] == [2, 2]
    assert min(r.rank for r in run.layers[2:]) > rank_for_density(64, 64, 0.5)
    assert 0.5 - 128 / (8 * 64 * 64) < run.density <= 0.5


def test_small_layers_are_not_spared():
    (r,) = run_of(chain([(12, 12)])).layers
    assert r.rank == rank_for_density(12, 12, 0.5) < 16


def test_where_no_rank_fits_a_layer_stays_dense_with_the_reason():
    big, tiny = (64, 64), (2, 2)
    run = run_of(chain([tiny, big, big]), 0.5, rank_multiple=1)
    assert (run.layers[0].object, run.layers[0].form, run.layers[0].rank) == (None, "dense", 0)
    assert run.layers[0].reason == "no rank of a 2 x 2 weight keeps 0.5 of its numbers or fewer"
    assert run.layers[0].numbers == 4
    assert [r.rank for r in run.layers[1:]] == [r.rank for r in run_of(chain([big, big]), 0.5, rank_multiple=1).layers]


def test_weights_of_zeros_stay_dense_with_the_reason():
    model = chain([(64, 64), (48, 48), (64, 64)])
    model[1].weight.data.zero_()
    run = run_of(model, rank_multiple=1)
    assert [r.reason for r in run.layers] == [None, "the weight is all zeros", None]
    assert factored() == 2
    dense = 2 * 64 * 64
    assert 0.5 - 128 / dense < run.density <= 0.5, "a layer that stays dense took from the others"


# --- what the recipe says of single layers ----------------------------------------------------------------------------


def test_skipped_layers_stay_dense_with_the_reason():
    run = run_of(chain(), skip=["0", "[12]"], overrides={"3": {"dense": True}})
    reasons = ["skipped by the pattern '0'", *["skipped by the pattern '[12]'"] * 2, "left dense by an override", None]
    assert [r.reason for r in run.layers] == reasons
    assert factored() == 1


def test_overrides_set_the_rank_or_the_density_of_single_layers():
    overrides = {"*": {"density": 0.25}, "1": {"rank": 7}, "2": {"density": 0.7}, "3": {"rank": 50}, "4": {"rank": 1}}
    run = run_of(chain(), rank_multiple=4, overrides=overrides)
    ranks = [rank_for_density(64, 64, 0.25, 4), 7, rank_for_density(40, 96, 0.7, 4), 50, 1]
    assert [r.rank for r in run.layers] == ranks


def test_overrides_have_no_part_in_the_density_of_the_others():
    plain = run_of(chain([(64, 64), (80, 40)]), rank_multiple=4)
    others = run_of(chain([(64, 64), (80, 40), (64, 64)]), rank_multiple=4, overrides={"2": {"rank": 50}})
    assert [r.rank for r in others.layers] == [*(r.rank for r in plain.layers), 50]


def test_an_override_that_saves_nothing_or_cannot_be_met_leaves_the_layer_dense():
    overrides = {"0": {"rank": 999}, "1": {"density": 0.01}, "2": {"density": 0.5}}
    run = run_of(chain([(64, 64), (64, 64), (12, 12)]), overrides=overrides)
    assert [r.reason for r in run.layers] == [
        "rank 64 would save nothing",
        "no rank of a 64 x 64 weight keeps 0.01 of its numbers or fewer",
        None,
    ]
    assert run.layers[2].rank == rank_for_density(12, 12, 0.5)


def test_another_pattern_or_name_makes_another_run():
    """Although recipe and weights are the same: the pattern matches under one name and not under the other."""
    model = chain([(64, 64), (64, 64)])
    first = run_of(model, skip=["0"])
    wrapped = run_of(nn.ModuleDict({"model": model}), skip=["0"])
    assert [r.reason is None for r in first.layers] == [False, True]
    assert [r.reason is None for r in wrapped.layers] == [True, True]
    assert first.run_id != wrapped.run_id


# --- weights that cannot be factored ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_an_error_that_names_the_layer(store, value, dtype):
    model = nn.ModuleDict({"good": nn.Linear(32, 32), "bad": nn.Linear(32, 32)}).to(dtype)
    model["bad"].weight.data[3, 5] = value
    with pytest.raises(WeightError, match=r"^bad: the \(32, 32\) weight has infinite or NaN entries; repair it or"):
        run_of(model)
    assert [(r.complete, len(r.layers)) for r in store.runs()] == [(False, 1)], "what was finished stays in the store"
    assert len(replaced(run_of(model, skip=["bad"]))) == 1


def test_a_weight_of_zeros_and_a_nan_is_not_taken_for_zeros():
    model = chain([(8, 8)])
    model[0].weight.data.zero_()[0, 0] = torch.nan
    with pytest.raises(WeightError, match="NaN"):
        run_of(model)


def test_a_model_without_a_linear_layer_is_an_error():
    with pytest.raises(WeightError, match="Sequential: the model has no linear layer; nothing can be compressed"):
        run_of(nn.Sequential(nn.ReLU()))


def test_weights_without_content_or_of_other_types_stay_dense():
    model = chain([(32, 32), (32, 32), (32, 32)])
    model[0].to("meta")
    model[1].weight = nn.Parameter(torch.ones(32, 32, dtype=torch.int8), requires_grad=False)
    run = run_of(model)
    assert ["on meta" in run.layers[0].reason, "torch.int8" in run.layers[1].reason] == [True, True]
    assert [r.digests == {} for r in run.layers] == [True, True, False]
    assert len(replaced(run)) == 1
    assert facts(run_of(model)) == facts(run)


def test_the_output_embedding_stays_dense():
    model = nn.ModuleDict({"body": nn.Linear(32, 32), "lm_head": nn.Linear(32, 50)})
    assert {r.name: r.reason for r in run_of(model).layers} == {
        "body": None,
        "lm_head": "output embedding, left dense by default",
    }


# --- pairs in place of pivoted factors --------------------------------------------------------------------------------


def test_where_pivoted_factors_are_not_exact_enough_a_pair_keeps_no_more_numbers(
    store, monkeypatch, relative, best_error
):
    model = chain()
    pivoted = run_of(model, 0.6, Store(store.root / "other"), rank_multiple=4)
    monkeypatch.setitem(pivoting.ERROR_LIMITS, torch.float32, 0.0)
    run = run_of(model, 0.6, store, rank_multiple=4)
    assert 0.5 < run.density <= 0.6
    for r, before, layer in zip(run.layers, pivoted.layers, model, strict=True):
        weight = layer.weight.detach()
        assert (r.form, r.numbers) == ("pair", numbers("pair", *r.shape, r.rank))
        assert r.rank < before.rank
        assert "kept as a pair: pivoted factors in torch.float32 have a relative error of" in r.reason
        assert f"of rank {r.rank} instead of " in r.reason
        assert r.truncation == r.least_error == pytest.approx(best_error(weight, r.rank), rel=1e-4)
        assert relative(store.factors(r).weight(), weight) == pytest.approx(r.truncation, rel=1e-4)
    assert facts(run_of(model, 0.6, store, rank_multiple=4)) == facts(run)


@pytest.mark.parametrize("r", [1, 2, 48])
def test_a_pair_that_replaces_a_rank_of_an_override_saves_numbers_too(monkeypatch, r):
    monkeypatch.setitem(pivoting.ERROR_LIMITS, torch.float32, 0.0)
    (layer,) = run_of(chain([(64, 64)]), overrides={"0": {"rank": r}}).layers
    assert layer.form == "pair"
    assert layer.numbers <= numbers("pifa", 64, 64, r) < 64 * 64
    assert layer.rank == (1 if r <= 2 else 16)


# --- the same weight --------------------------------------------------------------------------------------------------


def test_equal_weights_are_computed_and_stored_once():
    model = chain([(64, 64), (64, 64), (64, 64)])
    model[1].weight = model[0].weight  # the same parameter
    model[2].load_state_dict(model[0].state_dict())  # the same content
    run = run_of(model)
    assert [r.name for r in run.layers] == ["0"]
    assert run.header.layers_planned == factored() == 1


def test_equal_weights_stay_dense_where_one_of_them_must():
    """A graph cannot tell them apart."""
    model = chain([(64, 64), (64, 64), (32, 32)])
    model[1].load_state_dict(model[0].state_dict())
    run = run_of(model, skip=["1"])
    assert [r.reason for r in run.layers] == ["skipped by the pattern '1' (1 has the same content)", None]


def test_a_weight_and_its_cast_in_one_model_are_two(store, random_matrix):
    weight = random_matrix(48, 48)
    model = nn.ModuleDict({"wide": nn.Linear(48, 48), "narrow": nn.Linear(48, 48, dtype=torch.bfloat16)})
    model["wide"].weight.data, model["narrow"].weight.data = weight, weight.bfloat16()
    run = run_of(model)
    assert [store.factors(r).dtype for r in run.layers] == [torch.float32, torch.bfloat16]
    store.delete_run(run.run_id)
    with interrupted_after(2):
        run_of(model)
    assert facts(run_of(model)) == facts(run), "a resumed walk took one for the other"


def test_a_weight_of_few_bits_in_two_dtypes_is_one():
    """Its digests are the same in every dtype, so it is one weight to the store."""
    model = nn.ModuleDict({"wide": nn.Linear(48, 48), "narrow": nn.Linear(48, 48, dtype=torch.bfloat16)})
    model["wide"].weight.data = model["narrow"].weight.data.float()
    run = run_of(model)
    assert [r.name for r in run.layers] == ["wide"]
    assert digest(model["narrow"].weight.detach()) in run.by_digest


def test_weights_of_one_name_get_numbers(store):
    weights = [LinearWeight("weight", layer.weight) for layer in chain([(32, 32)] * 3)]
    run = compress_weights(weights, Svd(density=0.5), store, model="graph", progress=False)
    assert [r.name for r in run.layers] == ["weight", "weight#2", "weight#3"]
    assert compress_weights(weights, Svd(density=0.5), store, model="graph", progress=False) == run


def test_a_layer_that_is_the_model_has_a_name():
    assert [r.name for r in run_of(nn.Linear(32, 32)).layers] == ["weight"]


# --- again, and after an interruption ---------------------------------------------------------------------------------


@contextmanager
def interrupted_after(count):
    """The walk in this context is interrupted once the ``count``-th layer is in the run."""
    add, calls = RunWriter.add, []

    def add_and_fail(self, record):
        add(self, record)
        calls.append(record)
        if len(calls) == count:
            raise InterruptedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(RunWriter, "add", add_and_fail)
        yield


def test_a_second_call_computes_nothing():
    model = chain()
    run = run_of(model)
    assert factored() == len(SHAPES)
    again = run_of(model)
    assert factored() == len(SHAPES)
    assert again == run


@pytest.mark.parametrize("settings", [{"density": 0.6}, {"rank_multiple": 4}, {"pivoting": "qr"}, {"form": "pair"}])
def test_another_recipe_is_another_run(settings):
    model = chain([(64, 64)])
    first, second = run_of(model), run_of(model, **settings)
    assert first.run_id != second.run_id
    assert factored() == 2


def test_other_weights_are_another_run():
    assert run_of(chain(seed=0)).run_id != run_of(chain(seed=1)).run_id


def test_names_do_not_matter_to_a_run():
    model = chain()
    run = run_of(model)
    assert run_of(nn.ModuleDict({"base": nn.ModuleDict({"model": model})})) == run
    assert factored() == len(SHAPES)


def test_a_walk_that_was_interrupted_goes_on(store):
    model = chain()
    whole = run_of(model, store=store.root / "other")
    counters.clear()
    with interrupted_after(3):
        run_of(model)
    assert factored() == 3
    assert facts(run_of(nn.ModuleDict({"renamed": model})))[3:] == [
        replace(r, name=f"renamed.{r.name}") for r in facts(whole)[3:]
    ]
    assert factored() == len(SHAPES)
    assert [r.object for r in run_of(model).layers] == [r.object for r in whole.layers]


def walk_until_killed(root: str, count: int) -> None:
    """In another process: compress until the ``count``-th factors are in the store, but not yet in the run."""
    put = Store.put_factors

    def put_and_die(self, factors, calls=[]):  # noqa: B006 - counts the calls
        digest = put(self, factors)
        calls.append(digest)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return digest

    Store.put_factors = put_and_die
    run_of(deficient_chain(), store=root, rank_multiple=4)


def deficient_chain():
    """Layers whose ranks depend on those before: one has a low rank and leaves its share to the others."""
    model = chain()
    model[1].weight.data[:, 3:] = 0
    return model


def test_a_walk_that_was_killed_goes_on_and_gives_the_same_run(store):
    model = deficient_chain()
    whole = run_of(model, store=store.root / "other", rank_multiple=4)
    code = f"import runpy; runpy.run_path({__file__!r})['walk_until_killed']({str(store.root)!r}, 3)"
    path = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    killed = subprocess.run([sys.executable, "-c", code], env=os.environ | path, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (begun,) = store.runs()
    assert (begun.complete, [r.name for r in begun.layers]) == (False, ["0", "1"])
    counters.clear()
    run = run_of(model, rank_multiple=4)
    assert factored() == len(SHAPES) - 2
    assert facts(run) == facts(whole)
    assert facts(run)[:2] == facts(begun)
    assert run.run_id == whole.run_id == begun.run_id
    assert store.verify(run.run_id) == []


def test_factors_that_were_lost_are_computed_again(store):
    from pifa_compile.store.objects import object_path

    model = chain()
    run = run_of(model)
    object_path(store.root, run.layers[2].object).unlink()
    counters.clear()
    assert {r.name: r.object for r in run_of(model).layers} == {r.name: r.object for r in run.layers}
    assert factored() == 1


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_report_names_the_run_and_the_share_of_the_whole_model(store):
    model = nn.Sequential(nn.Embedding(100, 64), *chain())
    report = compress(model, Svd(density=0.5), name="toy", revision="abc", progress=False)
    assert isinstance(report, CompressionReport)
    assert (report.run.header.model, report.run.header.revision) == ("toy", "abc")
    assert report.run.header.seed == 0
    assert {"pifa-compile", "torch", "scipy", "python"} == set(report.run.header.versions)
    assert report.store == store.root
    assert store.run(report.run_id) == report.run
    total = sum(p.numel() for p in model.parameters())
    found = report.summary()
    assert found["model_numbers"] == total
    assert found["model_density"] == (total - found["numbers_before"] + found["numbers_after"]) / total
    assert found["numbers_after"] == sum(r.numbers for r in report.run.layers)


def test_the_store_may_be_given_in_any_way(store, tmp_path):
    model = chain([(32, 32)])
    places = {None: store.root, tmp_path / "a": tmp_path / "a", str(tmp_path / "b"): tmp_path / "b"}
    for given, root in places.items():
        assert compress(model, Svd(density=0.5), store=given, progress=False).store == root
        assert len(Store(root).runs()) == 1
    opened = Store(tmp_path / "c")
    assert compress(model, Svd(density=0.5), store=opened, progress=False).store == opened.root


def test_a_model_is_named_after_its_origin_or_its_class():
    model = chain([(32, 32)])
    assert run_of(model).header.model == "ModuleList"
    named = chain([(32, 32)], seed=1)
    named.config = type("Config", (), {"_name_or_path": "org/name"})()
    assert run_of(named).header.model == "org/name"
    named = chain([(32, 32)], seed=2)
    named.config = type("Config", (), {"_name_or_path": ""})()
    assert run_of(named).header.model == "ModuleList"


def test_progress_goes_to_standard_error(capsys):
    compress(chain([(32, 32)]), Svd(density=0.5))
    out, err = capsys.readouterr()
    assert out == ""
    assert "1/1" in err
    assert "svd-0.5-" in err
    run_of(chain([(32, 32)], seed=1))
    assert capsys.readouterr() == ("", "")


def test_a_spectrum_can_be_cut_at_any_rank(random_matrix, relative, best_error):
    weight = random_matrix(30, 20, 12, decay=2)
    found = spectrum(weight)
    assert found.rank == 12
    for r in (1, 5, 12):
        assert found.truncate(r).rank == r
        assert relative(found.truncate(r).weight(), weight) == pytest.approx(best_error(weight, r), abs=1e-6)
        assert found.truncation_error(r) == pytest.approx(best_error(weight, r), abs=1e-6)
