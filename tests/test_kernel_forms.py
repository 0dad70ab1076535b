"""Which form runs a layer: a row of the table before the cost, and only forms that were tried and have tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pifa_compile import cost
from pifa_compile.kernels import kernel_forms as forms
from pifa_compile.kernels import lowering, tile_tables

H200 = "NVIDIA H200"
TABLE = replace(tile_tables.table_for(H200), untried=())
ALWAYS = tile_tables.Span(("float16", "bfloat16", "float32"), 1, None)


def call(tokens=128, m=4096, n=4096, r=1200, dtype="bfloat16", device=H200):
    return forms.Call(device, dtype, tokens, m, n, r)


def test_every_form_has_a_lowering():
    assert set(forms.KERNELS) == set(lowering.FORMS)
    assert set(forms.BY_COST) <= set(forms.KERNELS)


@pytest.mark.parametrize("tokens", [1, 16, 64, 4096])
def test_the_cost_prefers_fewer_launches_and_bytes(tokens):
    profile = tile_tables.table_for(H200).rates.profile(H200)
    times = [cost.time(form, tokens, 4096, 4096, 1200, "bfloat16", profile) for form in ("tail", "gather")]
    assert times == sorted(times)
    assert forms.form_for(call(tokens)) == "tail"


def test_the_cost_is_the_roof_of_each_launch():
    profile = tile_tables.Rates(1e3, {"bfloat16": 1e4}, 7.0, "").profile("a card")
    m, n, r, tokens = 30, 20, 10, 2
    head = max(2 * (tokens * (n + r) + r * n) / 1e3, 2 * tokens * r * n / 1e4)
    tail = max(2 * (tokens * (r + m) + (m - r) * r) / 1e3, 2 * tokens * (m - r) * r / 1e4)
    assert cost.time("tail", tokens, m, n, r, "bfloat16", profile) == pytest.approx(14 + head + tail)


def test_the_cost_decides_by_the_rates_of_the_device(monkeypatch):
    monkeypatch.setattr(forms, "fastest", lambda named, N, m, n, r, dtype, profile: (named, dtype, profile)[0][-1])
    assert forms.form_for(call()) == "gather"


@pytest.mark.parametrize("form", ["gather", "few", "relay"])
def test_a_row_of_the_table_goes_before_the_cost_within_its_span(form):
    span = tile_tables.Span(("bfloat16",), 1, 16)
    row = tile_tables.FormRow(form, span, (0.2, 0.4), "measured")
    with tile_tables.use_table(replace(TABLE, forms=(row,))):
        assert forms.form_for(call(16)) == form
        assert forms.form_for(call(17)) == "tail"
        assert forms.form_for(call(16, dtype="float16")) == "tail"
        assert forms.form_for(call(16, r=2000)) == "tail"


def test_a_form_without_tiles_is_not_chosen():
    row = tile_tables.FormRow("relay", ALWAYS, (0.0, 1.0), "")
    with tile_tables.use_table(replace(TABLE, tiles=(), forms=(row,))):
        assert forms.form_for(call()) == "gather"
    with tile_tables.use_table(replace(TABLE, forms=(row,))):
        assert forms.form_for(call(17)) == "tail"  # relays are for 16 tokens at most


def test_a_kernel_for_few_tokens_never_meets_more_than_it_was_made_for():
    row = tile_tables.FormRow("relay", ALWAYS, (0.0, 1.0), "")
    with tile_tables.use_table(replace(TABLE, forms=(row,))):
        assert forms.form_for(call(4)) == "relay"
        assert forms.form_for(replace(call(4), dynamic=True)) == "tail"
        assert forms.form_for(replace(call(4), fixed=False)) == "gather"
    for table in map(tile_tables.read, tile_tables.FOLDER.glob("*.json")):
        for tile in table.tiles:
            assert tile.template not in forms.FEW or (tile.span.last or 0) <= tile.constants["BLOCK_M"]


def test_a_template_that_its_device_has_not_tried_is_not_used():
    row = tile_tables.FormRow("relay", ALWAYS, (0.0, 1.0), "")
    with tile_tables.use_table(replace(TABLE, forms=(row,), untried=("relay",))):
        assert forms.form_for(call(4)) == "tail"
    shipped = tile_tables.table_for(H200)
    assert not [t for name in shipped.untried for t in shipped.candidates([name], "float16", 16)]


def test_exact_float32_is_left_to_the_library(tf32):
    assert forms.form_for(call(dtype="float32")) == "tail"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert forms.form_for(call(dtype="float32")) == "gather"


def test_other_devices_and_layers_without_coefficients_gather():
    assert forms.form_for(call(device=None)) == "gather"
    assert forms.form_for(call(m=1200, r=1200)) == "gather"
    assert forms.available(torch.device("cpu"), torch.bfloat16, 1) == ["gather"]


def test_what_can_be_measured_on_a_card(monkeypatch):
    monkeypatch.setattr(forms, "device_name", lambda device: H200)

    def available(tokens):
        return forms.available(torch.device("cuda"), torch.bfloat16, tokens)

    assert available(1) == ["gather", "tail", "few"]  # the relay was not tried
    assert available(4096) == ["gather", "tail"]
    with tile_tables.use_table(TABLE):
        assert available(1) == ["gather", "tail", "few", "relay"]
        assert available(4096) == ["gather", "tail"]
    with tile_tables.use_table(replace(TABLE, tiles=())):
        assert available(1) == ["gather"]
