"""One compiled graph as a page to look at: the captured graph beside what the passes left of it.

    Snapshot(graph) before the first rewrite -> page_data(...) after the last -> render_page(data) -> graph.html

The data is plain JSON. Every node stands in it once, numbered and with its state; ``rows`` sets the two graphs side by
side as a diff does: a node that both have, or a layer and what took its place, share a row. The page (page.html) is one
file that refers to nothing outside, and it shows names and source lines as text only.
"""

from __future__ import annotations

import platform
from bisect import bisect_left
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import fx

from pifa_compile.pages import fill
from pifa_compile.passes.plan import ORIGIN, LinearSite, Plan
from pifa_compile.passes.snapshot import Snapshot
from pifa_compile.passes.table import dense_weights, site_row


def page_data(name: str, captured: Snapshot, graph: fx.Graph, plan: Plan) -> dict[str, Any]:
    """All that the page shows of a graph; ``captured`` is how it stood before the first pass that rewrites.

    nodes    number -> facts, inputs (numbers; inputs_after where they differ), state, twin (its number on the other
             side), site (index in linears). States: pifa, pair, dense (a linear layer), new, erased, same
    rows     [number in the captured graph or None, number in the graph that is left or None]
    linears  as in linears.json, with the numbers of its nodes and more of its record
    texts    what the fields "module" and "source" of a node index
    """
    left = Snapshot(graph, plan, captured)
    before, after = _numbers(captured, left)
    made_for = _made_for(before, after)
    became = {old: new for new, old in made_for.items()}  # the last one that was written for it
    became |= {number: number for number in after.values() if number < len(before)}
    became |= {before[old]: after[new] for old, new in zip(captured.sites, left.sites, strict=True) if new in after}
    nodes = _nodes(captured, left, before, after)
    for number, twin in [*made_for.items(), *became.items()]:
        if number != twin:
            nodes[number]["twin"] = twin
            nodes[number].setdefault("module", nodes[twin].get("module", ""))
    linears = _linears(plan, nodes, [before[node] for node in captured.sites], became)
    return {
        "name": name,
        "run": None if plan.run is None else plan.run.header.to_json() | {"density": plan.run.density},
        "versions": _versions(),
        "totals": _totals(plan, linears),
        "linears": linears,
        "rows": align(list(before.values()), list(after.values()), became),
        "texts": _share_texts(nodes),
        "nodes": nodes,
    }


def render_page(data: dict[str, Any]) -> str:
    """The page of ``page_data``."""
    return fill(Path(__file__).with_name("page.html"), data)


# --- the two graphs --------------------------------------------------------------------------------------------------


def _numbers(captured: Snapshot, left: Snapshot) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
    """The number of every node in either graph: one number if it is the same on both sides."""
    before = {node: i for i, node in enumerate(captured.facts)}
    fresh = count(len(before))
    same = {node for node, facts in left.facts.items() if captured.facts.get(node) is facts}
    return before, {node: before[node] if node in same else next(fresh) for node in left.facts}


def _made_for(before: dict[fx.Node, int], after: dict[fx.Node, int]) -> dict[int, int]:
    """The captured node in whose place each new node was written, by number."""
    captured = {node.name: i for node, i in before.items()}
    origins = {number: node.meta.get(ORIGIN, node.name) for node, number in after.items() if number >= len(before)}
    return {number: captured[origin] for number, origin in origins.items() if origin in captured}


def _nodes(
    captured: Snapshot, left: Snapshot, before: dict[fx.Node, int], after: dict[fx.Node, int]
) -> list[dict[str, Any]]:
    """All nodes by number; states of linear layers come later."""
    kept = set(after.values())
    nodes = [
        facts | {"inputs": [before[i] for i in captured.inputs[node]], "state": "same" if n in kept else "erased"}
        for n, (node, facts) in enumerate(captured.facts.items())
    ]
    for node, number in after.items():
        inputs = [after[i] for i in left.inputs[node]]
        if number == len(nodes):
            nodes.append(left.facts[node] | {"inputs": inputs, "state": "new"})
        elif inputs != nodes[number]["inputs"]:
            nodes[number]["inputs_after"] = inputs
    return nodes


def align(before: list[int], after: list[int], became: dict[int, int]) -> list[list[int | None]]:
    """Rows of a side-by-side view: as many pairs of ``became`` as can stand beside each other in the order of both."""
    place = {number: position for position, number in enumerate(after)}
    pairs = [(i, place[became[number]]) for i, number in enumerate(before) if became.get(number) in place]
    rows: list[list[int | None]] = []
    i = j = 0
    for k, position in [*_increasing(pairs), (len(before), len(after))]:
        rows += [[number, None] for number in before[i:k]]
        rows += [[None, number] for number in after[j:position]]
        if k < len(before):
            rows.append([before[k], after[position]])
        i, j = k + 1, position + 1
    return rows


def _increasing(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest run of pairs, not necessarily neighbours, whose second numbers increase as their first ones do."""
    ends: list[int] = []  # of the best run of each length: its last second number, and which pair that is
    best: list[int] = []
    previous: list[int] = []
    for k, (_, second) in enumerate(pairs):
        length = bisect_left(ends, second)
        previous.append(best[length - 1] if length else -1)
        if length == len(ends):
            ends.append(second)
            best.append(k)
        else:
            ends[length], best[length] = second, k
    run = []
    k = best[-1] if best else -1
    while k >= 0:
        run.append(pairs[k])
        k = previous[k]
    return run[::-1]


# --- the layers ------------------------------------------------------------------------------------------------------


def _linears(plan: Plan, nodes: list[dict[str, Any]], sites: list[int], became: dict[int, int]) -> list[dict[str, Any]]:
    """The rows of the table; marks the nodes of every layer with its state. A layer that another took in is erased."""
    linears = []
    for i, (site, number) in enumerate(zip(plan.sites, sites, strict=True)):
        linear = _linear(site) | {"before": number, "after": became.get(number)}
        linear |= {"state": "erased"} if number not in became else {}
        for end in {number, became.get(number, number)}:
            nodes[end] |= {"state": linear["state"], "site": i}
        linears.append(linear)
    return linears


def _linear(site: LinearSite) -> dict[str, Any]:
    row, record = site_row(site), site.record
    halves = [s for s in (site, site.inner) if s is not None and s.parameter is not None]
    size = sum(s.parameter.nbytes for s in halves if s.parameter is not None) or None  # None: it came as factors
    row |= {"bytes_before": size, "bytes_after": size if site.factors is None else site.factors.nbytes}
    if record is not None and row["state"] != "dense":
        row["reason"] = record.reason  # why it is a pair
        row |= {key: getattr(record, key) for key in ("truncation", "least_error", "seconds")}
    return row


def _totals(plan: Plan, linears: list[dict[str, Any]]) -> dict[str, int]:
    """Sums over the calls in factored form (taken), and over all; bytes count each weight once.

    bytes_kept  of dense weights that stay in memory beside the factors
    """
    taken = {i: row for i, row in enumerate(linears) if row["state"].startswith(("pifa", "pair"))}
    weights = {plan.sites[i].weight: row for i, row in taken.items() if row["bytes_before"]}
    sums: dict[str, int] = {"taken": len(taken), "linears": len(linears)}
    for when in ("before", "after"):
        sums[f"numbers_{when}"] = sum(row[f"numbers_{when}"] for row in taken.values())
        sums[f"all_{when}"] = sum(row[f"numbers_{when}"] for row in linears if row["state"] != "erased")
        sums[f"bytes_{when}"] = sum(row[f"bytes_{when}"] for row in weights.values())
    sums["bytes_kept"] = sum(weight.nbytes for weight in dense_weights(plan).values())
    return sums


def _versions() -> dict[str, str]:
    try:
        package = version("pifa-compile")
    except PackageNotFoundError:
        package = "not installed"  # a source tree on PYTHONPATH
    return {"pifa-compile": package, "torch": torch.__version__, "python": platform.python_version()}


def _share_texts(nodes: list[dict[str, Any]]) -> list[str]:
    """The different modules and source lines; nodes are left with their places in that list."""
    places: dict[str, int] = {}
    for node in nodes:
        for key in {"module", "source"} & node.keys():
            node[key] = places.setdefault(node[key], len(places))
    return list(places)
