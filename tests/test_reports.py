"""What a run did, as text and as data."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pifa_compile.recipes import Svd
from pifa_compile.reports import SORTS, CompressionReport, render_run, run_summary
from pifa_compile.store import LayerRecord, Member, Run, RunHeader

DIGEST = "0" * 64


def record(name, m, n, rank, numbers, **fields):
    known = {"form": "pifa", "object": DIGEST, "bytes": 4 * numbers, "seconds": 0.5}
    return LayerRecord(name=name, digests={}, shape=(m, n), rank=rank, numbers=numbers, **known | fields)


LAYERS = (
    record("blocks.0.up", 1536, 384, 160, 281760, error=8.2e-8, truncation=0.53, least_error=0.53),
    record("blocks.0.down", 384, 1536, 176, 307120, error=8.1e-8, truncation=0.25, least_error=0.25),
    record("blocks.1.up", 100, 50, 20, 3000, form="pair", error=2e-3, truncation=0.6, reason="kept as a pair: a test"),
    record("lm_head", 1000, 384, 0, 384000, form="dense", object=None, seconds=0.0, reason="output embedding"),
)


def run(layers=LAYERS, complete=True, planned=4):
    header = RunHeader("svd-0.5-0123", "toy", Svd(density=0.5).to_json(), planned, "2025-01-02T03:04:05Z")
    return Run(header, tuple(layers), complete)


def rows(text):
    """The names of the layers in the order of the table."""
    return [line.split()[0] for line in text.splitlines()[2:] if line.startswith(("blocks", "lm_head"))]


def test_the_summary_counts_the_layers_that_are_replaced():
    found = run_summary(run())
    before, after = 2 * 1536 * 384 + 5000, 281760 + 307120 + 3000
    assert found == {
        "run": "svd-0.5-0123",
        "model": "toy",
        "recipe": Svd(density=0.5).to_json(),
        "complete": True,
        "layers": 4,
        "replaced": 3,
        "numbers_before": before,
        "numbers_after": after,
        "density": after / before,
        "bytes": 4 * after,
        "seconds": 1.5,
    }
    assert json.loads(json.dumps(found)) == found


def test_layers_that_were_factored_together_count_one_by_one():
    members = tuple(Member(f"blocks.2.{name}", {}, 64) for name in "qk")
    joint = run((*LAYERS, record("blocks.2.q+k", 128, 64, 8, 1472, members=members)), complete=False, planned=9)
    found = run_summary(joint)
    assert (found["layers"], found["replaced"]) == (6, 5)
    assert "(unfinished: 6 of 9 layers): 5 of 6 linear layers replaced" in render_run(joint)


def test_what_calibration_took_is_not_in_the_seconds():
    plain = run()
    calibrated = Run(replace(plain.header, calibration={"text": "a"}), plain.layers, complete=True)
    assert render_run(plain).endswith("factored in 1.5 s") and "error of the weight at" in render_run(plain)
    told = render_run(calibrated)
    assert told.endswith("factored in 1.5 s after calibration") and "error of the outputs at" in told


def test_a_run_that_replaces_nothing_has_no_density():
    found = run_summary(run(LAYERS[3:]))
    assert (found["replaced"], found["density"], found["numbers_before"]) == (0, None, 0)
    assert "0 of 1 linear layers replaced, 0.0 MB, factored in 0.0 s" in render_run(run(LAYERS[3:]))
    assert "0 of 0 linear layers replaced" in render_run(run(()))


def test_golden_report_of_a_compression(golden):
    report = CompressionReport(run(), Path("/somewhere/store"), 2_000_000)
    golden("compression.txt", f"{report}\n")
    assert report.run_id == "svd-0.5-0123"


def test_the_report_has_the_density_of_the_whole_model_beside_that_of_the_layers():
    report = CompressionReport(run(), Path("/somewhere/store"), 2_000_000)
    found = report.summary()
    assert found["model_numbers"] == 2_000_000
    assert found["model_density"] == (2_000_000 - found["numbers_before"] + found["numbers_after"]) / 2_000_000
    assert found["store"] == "/somewhere/store"
    assert run_summary(run()).items() <= found.items()
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        (None, [0, 1, 2, 3]),
        ("name", [1, 0, 2, 3]),
        ("rank", [3, 2, 0, 1]),
        ("error", [2, 0, 1, 3]),
        ("numbers", [3, 1, 0, 2]),
    ],
)
def test_layers_can_be_sorted(sort, order):
    assert rows(render_run(run(), sort)) == [LAYERS[i].name for i in order]
    assert sort is None or sort in SORTS


def test_a_run_under_way_says_so():
    assert "run svd-0.5-0123 (unfinished: 4 of 7 layers): 3 of 4" in render_run(run(complete=False, planned=7))
    assert "unfinished" not in render_run(run())
