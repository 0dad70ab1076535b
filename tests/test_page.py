"""graph.html: its data, and that nothing in it can do harm or reach outside."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses import FakeTensorMode

import pifa_compile
from pifa_compile import Svd
from pifa_compile.passes.page import align, page_data, render_page
from pifa_compile.passes.plan import ORIGIN, LinearSite, Plan
from pifa_compile.passes.snapshot import Snapshot

HERE = Path(__file__).parent
OWNED = "document.title='owned'"
HOSTILE = f'</script><script>{OWNED}</script><img src=x onerror="{OWNED}">\'"&amp; \u2028 @DATA@'


def dumped(model, folder: Path, *inputs, **options) -> tuple[str, dict]:
    """The page of a model's only graph, and its data."""
    options = {"inner": "eager", "dump": folder, **options}
    with torch.no_grad():
        torch.compile(model, backend="pifa", options=options)(*inputs)
    (path,) = folder.glob("*/graph.html")
    page = path.read_text(encoding="utf-8")
    return page, data_of(page)


def data_of(page: str) -> dict:
    (text,) = re.findall(r'<script nonce="page" type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


@pytest.fixture
def block():
    spec = importlib.util.spec_from_file_location("golden_block", HERE / "models" / "block.py")
    module = sys.modules["golden_block"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.Block().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) / 8)
    return model


def state_of(data: dict, name: str) -> str:
    (found,) = [node["state"] for node in data["nodes"] if name in (node["name"], node.get("label"))]
    return found


def both_sides(data: dict, site: int = 0) -> list[dict]:
    return [data["nodes"][data["linears"][site][when]] for when in ("before", "after")]


# --- data ------------------------------------------------------------------------------------------------------------


def test_golden_data_of_a_page(block, tmp_path, golden):
    pifa_compile.compress(block, Svd(density=0.5, rank_multiple=4), progress=False)
    _, data = dumped(block, tmp_path / "dump", torch.randn(3, 48))
    assert data["run"]["recipe"]["density"] == 0.5
    assert data["versions"]["torch"] == torch.__version__
    data |= {"run": "RUN", "versions": "VERSIONS"}
    for linear in data["linears"]:  # their last digits differ between machines
        linear |= {key: "NUMBER" for key in ("error", "truncation", "least_error", "seconds") if linear.get(key)}
    lines = [f"{json.dumps(key)}: {lines_of(value)}" for key, value in data.items()]
    golden("page.json", "{\n" + ",\n".join(lines) + "\n}\n")


def lines_of(value) -> str:
    """JSON with one line for each element of a list."""
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n" + ",\n".join(f" {json.dumps(element)}" for element in value) + "\n]"


def test_every_node_stands_in_the_page_with_its_state(block, tmp_path):
    pifa_compile.compress(block, Svd(density=0.5), progress=False)
    _, data = dumped(block, tmp_path / "dump", torch.randn(3, 48))
    assert state_of(data, "up.weight") == state_of(data, "up.bias") == "erased", "its order is folded, the bias with it"
    assert state_of(data, "lm_head.weight") == state_of(data, "output") == "same"
    assert [row["state"] for row in data["linears"]] == ["pifa", "pifa", "dense"]
    captured, left = both_sides(data)
    assert (captured["op"], left["op"], captured["state"], left["state"]) == ("linear", "add", "pifa", "pifa")
    assert both_sides(data, 2)[0] is both_sides(data, 2)[1]
    assert "output embedding" in data["linears"][2]["reason"]
    before, after = ([row[side] for row in data["rows"] if row[side] is not None] for side in (0, 1))
    assert sorted({*before, *after}) == list(range(len(data["nodes"])))
    assert len(before) == len(set(before)) and len(after) == len(set(after))
    for number in before:
        assert set(data["nodes"][number]["inputs"]) <= set(before)
    for number in after:
        assert set(data["nodes"][number].get("inputs_after", data["nodes"][number]["inputs"])) <= set(after)


def test_a_new_node_has_a_shape_and_leads_back_to_its_layer(block, tmp_path):
    pifa_compile.compress(block, Svd(density=0.5), progress=False)
    _, data = dumped(block, tmp_path / "dump", torch.randn(3, 48))
    rank = data["linears"][0]["rank"]
    new = [node for node in data["nodes"] if node["state"] == "new"]
    assert all(node.get("shape") for node in new)
    first = next(node for node in new if node["op"] == "linear")
    assert first["shape"] == [3, rank]
    assert data["nodes"][first["twin"]] is both_sides(data)[0]
    assert data["texts"][first["source"]].startswith("block.py:")


def test_looking_at_a_graph_of_dynamic_shapes_leaves_no_guards(block, tmp_path):
    options = {"inner": "eager", "density": 0.5, "dump": tmp_path / "dump"}
    compiled = torch.compile(block, backend="pifa", options=options, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        assert [compiled(torch.randn(size, 48)).shape[0] for size in (3, 7)] == [3, 7]
    (path,) = (tmp_path / "dump").glob("*/graph.html")
    linears = [node for node in data_of(path.read_text(encoding="utf-8"))["nodes"] if node["op"] == "linear"]
    assert len(linears) == 3 + 4
    assert all(isinstance(node["shape"][0], str) and isinstance(node["shape"][1], int) for node in linears)


def test_a_pair_is_shown_as_a_pair_with_its_reason(block, tmp_path):
    pifa_compile.compress(block, Svd(density=0.5, form="pair"), progress=False)
    _, data = dumped(block, tmp_path / "dump", torch.randn(3, 48))
    assert [node["state"] for node in both_sides(data)] == ["pair", "pair"]
    assert [node["op"] for node in both_sides(data)] == ["linear", "linear"]


class Tied(nn.Module):
    """One weight that a layer and something else read."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32, bias=False)

    def forward(self, x):
        return self.inner(x) + self.inner.weight.sum()


def test_a_weight_with_another_reader_is_not_called_erased(tmp_path):
    _, data = dumped(Tied(), tmp_path / "dump", torch.randn(2, 32), density=0.5)
    assert data["linears"][0]["state"] == "pifa"
    assert state_of(data, "inner.weight") == "same"


def test_a_layer_that_another_took_in_is_erased(tmp_path):
    model = nn.Sequential(nn.Linear(64, 16, bias=False), nn.Linear(16, 64))
    _, data = dumped(model, tmp_path / "dump", torch.randn(2, 64))
    assert [row["state"] for row in data["linears"]] == ["erased", "pifa"]
    assert data["linears"][0]["after"] is None and "folded" in data["linears"][0]["reason"]
    assert data["totals"]["taken"] == 1
    assert data["totals"]["all_before"] == data["totals"]["numbers_before"] == 2 * 16 * 64


def test_a_layer_that_came_as_factors_has_no_dense_bytes(block, tmp_path):
    run = pifa_compile.compress(block, Svd(density=0.5), progress=False).run_id
    pifa_compile.apply_(block, run=run)
    _, data = dumped(block, tmp_path / "dump", torch.randn(3, 48))
    assert [row["state"] for row in data["linears"]] == ["pifa", "pifa", "dense"]
    assert data["linears"][0]["bytes_before"] is None and data["linears"][0]["bytes_after"] > 0
    assert both_sides(data)[0]["op"] == "pifa.linear.default" and data["totals"]["bytes_before"] == 0
    assert data["totals"]["bytes_kept"] == 0


def test_totals_are_those_of_the_table(block, tmp_path):
    pifa_compile.compress(block, Svd(density=0.5), progress=False)
    _, data = dumped(block, tmp_path / "dump", torch.randn(3, 48))
    totals, taken = data["totals"], data["linears"][:2]
    assert (totals["taken"], totals["linears"]) == (2, 3)
    assert totals["numbers_after"] == sum(row["numbers_after"] for row in taken)
    assert totals["all_before"] == totals["numbers_before"] + 48 * 64
    assert totals["bytes_before"] == totals["bytes_kept"] == 4 * totals["numbers_before"]


def test_a_source_tree_that_is_not_installed_has_a_page(tmp_path, monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("pifa_compile.passes.page.version", absent)
    _, data = dumped(torch.relu, tmp_path / "dump", torch.randn(3))
    assert data["versions"]["pifa-compile"] == "not installed" and data["versions"]["torch"] == torch.__version__


def test_an_operator_that_refuses_to_be_looked_at_has_no_shape():
    def refuse(x):
        raise RuntimeError("not for fake values")

    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = FakeTensorMode().from_tensor(torch.randn(3, 4))
    node = graph.call_function(refuse, (x,))
    node.meta[ORIGIN] = "x"
    facts = Snapshot(graph, Plan()).facts
    assert facts[x]["shape"] == [3, 4]
    assert facts[node]["op"] == "refuse" and "shape" not in facts[node]


def test_a_graph_without_linear_layers_has_a_page(tmp_path):
    page, data = dumped(torch.relu, tmp_path / "dump", torch.randn(3))
    assert data["run"] is None and data["linears"] == []
    assert {node["state"] for node in data["nodes"]} == {"same"}
    assert page.startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("before", "after", "became", "rows"),
    [
        ([0, 1], [0, 1], {0: 0, 1: 1}, [[0, 0], [1, 1]]),
        ([0, 1, 2], [0, 5, 6, 2], {0: 0, 1: 6, 2: 2}, [[0, 0], [None, 5], [1, 6], [2, 2]]),
        ([0, 1, 2], [1, 2, 0], {0: 0, 1: 1, 2: 2}, [[0, None], [1, 1], [2, 2], [None, 0]]),
        ([0, 1], [4], {0: 4, 1: 4}, [[0, None], [1, 4]]),
        ([0], [], {}, [[0, None]]),
        ([], [], {}, []),
    ],
)
def test_rows_keep_the_order_of_both_graphs(before, after, became, rows):
    assert align(before, after, became) == rows


# --- the file ------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """The elements of a page, as a browser would find them, and the text of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def assert_closed(page: str) -> None:
    """The page is whole, refers to nothing outside and runs no script but its own."""
    assert not re.search(r"https?:|//\w+\.\w|@import|url\(", page)
    assert not re.search(
        r"\b(fetch|XMLHttpRequest|WebSocket|import|innerHTML|outerHTML|insertAdjacentHTML|eval)\b\s*[(=]", page
    )
    tags = Tags(page).tags
    assert not {tag for tag, _ in tags} & {"link", "img", "iframe", "object", "embed", "base", "form", "a"}
    assert not [
        attrs for _, attrs in tags if {"src", "href", "style"} & attrs.keys() or any(a.startswith("on") for a in attrs)
    ]
    (policy,) = [attrs["content"] for tag, attrs in tags if tag == "meta" and "http-equiv" in attrs]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert not re.search(r"@(STYLE|SCRIPT|DATA)@", page)


def test_the_page_refers_to_nothing_outside(block, tmp_path):
    page, _ = dumped(block, tmp_path / "dump", torch.randn(3, 48), density=0.5)
    assert_closed(page)


def hostile(data: dict) -> dict:
    """The data with hostile text wherever a user's own text may stand."""
    data["name"] = HOSTILE
    data["texts"] = [HOSTILE for _ in data["texts"]]
    data["run"] |= {"model": HOSTILE, "recipe": {"method": HOSTILE, "density": HOSTILE, HOSTILE: HOSTILE}}
    for node in data["nodes"]:
        node |= {"name": HOSTILE, "op": HOSTILE, "label": HOSTILE, "constants": HOSTILE}
    for linear in data["linears"]:
        linear |= {"name": HOSTILE, "reason": HOSTILE, "source": HOSTILE}
    return data


def test_hostile_text_stays_text(block, tmp_path):
    page, data = dumped(block, tmp_path / "dump", torch.randn(3, 48), density=0.5)
    bad = render_page(hostile(data))
    assert Tags(bad).tags == Tags(page).tags
    assert data_of(bad)["name"] == HOSTILE
    assert "onerror" in bad and "<img" not in bad


def test_a_name_of_the_user_reaches_the_page_unchanged(tmp_path):
    model = nn.Module()
    name = "</script><b onclick='x'>"
    model.add_module(name, nn.Linear(32, 32))
    model.forward = lambda x: model._modules[name](x)
    page, data = dumped(model.forward, tmp_path / "dump", torch.randn(2, 32), density=0.5)
    assert "<b onclick" not in page
    assert any("onclick" in json.dumps(node) for node in data["nodes"])


def long_graph(layers: int) -> tuple[fx.Graph, Plan]:
    """A captured graph of ``layers`` dense linear layers with a relu between them."""
    graph = fx.Graph()
    weights = [graph.placeholder(f"layers_{i}_weight") for i in range(layers)]
    x = graph.placeholder("x")
    plan = Plan()
    for i, weight in enumerate(weights):
        node = graph.call_function(F.linear, (x, weight))
        node.meta["stack_trace"] = f'File "model.py", line {i}, in forward\n    x = torch.relu(self.layers[{i}](x))\n'
        node.meta["nn_module_stack"] = {"1": (f"L['self'].layers.{i}", nn.Linear)}
        site = LinearSite(node=node, x=x, weight=None, bias=None, parameter=None, name=f"layers.{i}", source="")
        site.reason = "the weight is no tensor"
        plan.sites.append(site)
        x = graph.call_function(torch.relu, (node,))
    graph.output(x)
    return graph, plan


def test_a_graph_of_5000_nodes_gives_a_small_page_quickly():
    graph, plan = long_graph(1667)
    assert len(graph.nodes) > 5000
    started = time.perf_counter()
    page = render_page(page_data("graph", Snapshot(graph, plan), graph, plan))
    assert time.perf_counter() - started < 10  # takes a fraction of a second; far more if something were quadratic
    assert len(page) < 3e6


# --- in a browser ----------------------------------------------------------------------------------------------------


def rendered(path: Path, folder: Path) -> str:
    """What a headless browser makes of the page, as HTML; skips where there is none that works."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium here")
    quiet = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    quiet += ["--no-first-run"] + (["--no-sandbox"] if os.geteuid() == 0 else [])
    command = [browser, "--headless", *quiet, f"--user-data-dir={folder}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if not done.stdout.strip():
        pytest.skip(f"chromium does not start here: {done.stderr[-200:]}")
    return done.stdout


@pytest.mark.slow
def test_a_browser_draws_the_page_and_hostile_text_stays_text(block, tmp_path):
    _, data = dumped(block, tmp_path / "dump", torch.randn(3, 48), density=0.5)
    (path,) = (tmp_path / "dump").glob("*/graph.html")
    drawn = rendered(path, tmp_path / "browser")
    assert "<title>graph_0_0: pifa</title>" in drawn
    assert "linear layers in factored form" in drawn and drawn.count('class="row') > 2 * 10
    path.write_text(render_page(hostile(data)), encoding="utf-8")
    drawn = rendered(path, tmp_path / "browser")
    tags = Tags(drawn).tags
    assert "img" not in {tag for tag, _ in tags} and [tag for tag, _ in tags].count("script") == 2
    assert not [name for _, attrs in tags for name in attrs if name.startswith("on")]
    assert "&lt;img" in drawn and "<title>owned" not in drawn
