"""A graph is served from exactly one run: the one that is named, or the only one that fits."""

from dataclasses import replace

import pytest
import torch

from pifa_compile.digest import cast_digests, digest
from pifa_compile.errors import AmbiguousRunError, UnknownRunError
from pifa_compile.options import Settings
from pifa_compile.recipes import FirstCall, Svd
from pifa_compile.selection import choose_run, describe
from pifa_compile.store import LayerRecord, RunHeader

WEIGHTS = [torch.randn(6, 5, generator=torch.Generator().manual_seed(i)) for i in range(4)]
DIGESTS = [digest(w) for w in WEIGHTS]


@pytest.fixture
def write(store):
    """``write(run_id, weights, density=0.5, finish=True)``: a run in which the weights of these numbers stay dense."""

    def make(run_id, weights, density=0.5, finish=True, method=Svd, **settings):
        header = RunHeader(
            run_id=run_id,
            model="toy",
            recipe=method(density=density, **settings).to_json(),
            layers_planned=len(weights),
            created=f"2025-01-0{len(list(store.runs())) + 1}T00:00:00Z",
        )
        with store.write_run(header) as writer:
            for i in weights:
                known = {"digests": cast_digests(WEIGHTS[i]), "shape": (6, 5), "object": None, "form": "dense"}
                size = {"rank": 0, "numbers": 30, "bytes": 120, "seconds": 0.0, "reason": "a test"}
                writer.add(LayerRecord(name=f"layer{i}", **known, **size))
            if finish:
                writer.finish()

    return make


def chosen(store, digests, **settings):
    run = choose_run(store, digests, Settings(**settings))
    return run and run.run_id


def test_an_empty_store_has_no_run_that_fits(store):
    assert chosen(store, DIGESTS) is None
    assert chosen(store, DIGESTS, density=0.5) is None


def test_the_run_that_is_named_is_taken(store, write):
    write("first", [0])
    write("second", [0, 1])
    assert chosen(store, DIGESTS, run="first") == "first"
    assert chosen(store, DIGESTS, run="sec") == "second"
    with pytest.raises(UnknownRunError, match="'third' is no run"):
        chosen(store, DIGESTS, run="third")


def test_a_density_takes_the_run_that_has_it_and_knows_every_weight(store, write):
    write("half", [0, 1, 2])
    write("most", [0, 1, 2], density=0.8)
    assert chosen(store, DIGESTS[:3], density=0.5) == "half"
    assert chosen(store, DIGESTS[:2], density=0.8, method="svd") == "most"
    assert chosen(store, DIGESTS[:3], density=0.7) is None
    assert chosen(store, DIGESTS, density=0.5) is None, "one weight is not in the run"
    assert chosen(store, DIGESTS[:3], density=0.5, method="another") is None


def test_a_cast_of_the_weights_is_known_too(store, write):
    write("half", [0, 1])
    cast = [digest(w.to(torch.bfloat16)) for w in WEIGHTS[:2]]
    assert chosen(store, cast, density=0.5) == "half"


def test_without_a_density_the_run_that_knows_most_is_taken(store, write):
    write("few", [0, 1])
    write("more", [0, 1, 2], density=0.8)
    assert chosen(store, DIGESTS) == "more"
    assert chosen(store, [DIGESTS[3]]) is None


def test_several_runs_that_fit_are_an_error_that_lists_them(store, write):
    write("half", [0, 1])
    write("most", [0, 1], density=0.8)
    with pytest.raises(AmbiguousRunError) as caught:
        chosen(store, DIGESTS[:2])
    message = str(caught.value)
    assert message.startswith("2 compression runs fit this model; name one with options={'run': ID} or PIFA_RUN")
    assert "half: toy, " in message
    assert "most: toy, " in message
    assert chosen(store, DIGESTS[:2], density=0.8) == "most"
    write("again", [0, 1], density=0.8, pivoting="qr")
    with pytest.raises(AmbiguousRunError, match="pivoting qr"):
        chosen(store, DIGESTS[:2], density=0.8)


def test_calibration_takes_runs_of_first_calls_only_or_leaves_them_out(store, write):
    write("called", [0, 1], method=FirstCall)
    assert chosen(store, DIGESTS[:2], density=0.5) == chosen(store, DIGESTS[:2], density=0.5, method="first-call")
    assert chosen(store, DIGESTS[:2], density=0.5, calibrate="first-call") == "called"
    assert chosen(store, DIGESTS[:2], density=0.5, calibrate="none") is None
    write("plain", [0, 1])
    assert chosen(store, DIGESTS[:2], density=0.5, calibrate="first-call") == "called"
    assert chosen(store, DIGESTS[:2], density=0.5, calibrate="none") == "plain"
    with pytest.raises(AmbiguousRunError, match="method first-call"):
        chosen(store, DIGESTS[:2], density=0.5)


def test_of_first_calls_the_one_of_the_fewest_layers_is_taken(store, write):
    write("whole", [0, 1, 2], method=FirstCall)
    write("part", [0, 1], method=FirstCall)
    assert chosen(store, DIGESTS[:2], density=0.5) == "part"
    assert chosen(store, DIGESTS[:3], density=0.5) == "whole"
    assert chosen(store, DIGESTS[2:3], density=0.5) == "whole"
    write("again", [0, 1], method=FirstCall, seed=1)
    with pytest.raises(AmbiguousRunError, match="2 compression runs fit"):
        chosen(store, DIGESTS[:2], density=0.5)


def test_a_run_under_way_is_not_taken_unless_it_is_named(store, write):
    write("begun", [0, 1], finish=False)
    assert chosen(store, DIGESTS[:2]) is None
    assert chosen(store, DIGESTS[:2], density=0.5) is None
    assert chosen(store, DIGESTS[:2], run="begun") == "begun"


def test_a_run_is_described_in_a_line(store, write):
    write("half", [0], skip=["a"])
    (run,) = store.runs()
    text = describe(run)
    assert text.startswith("half: toy, ")
    assert text.endswith(", made 2025-01-01T00:00:00Z")
    assert text == "half: toy, method svd, density 0.5, skip ['a'], made 2025-01-01T00:00:00Z"
    assert run.header.recipe["pivoting"] == "maxvol"  # a default, which is not told


def test_a_run_of_an_unknown_method_is_described_by_all_its_settings(store, write):
    write("half", [0])
    (run,) = store.runs()
    theirs = replace(run, header=replace(run.header, recipe={"method": "theirs", "density": 0.5, "windows": 3}))
    assert describe(theirs) == "half: toy, method theirs, density 0.5, windows 3, made 2025-01-01T00:00:00Z"
    for wrong in ({"windows": 3}, {"method": ["svd"]}, {"density": 7, "method": "svd"}, {"method": "svd"}):
        text = describe(replace(run, header=replace(run.header, recipe=wrong)))
        assert all(f"{key} {value}" in text for key, value in wrong.items())
