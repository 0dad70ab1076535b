"""One row per linear layer of a graph: what was done with it, or why not, and what that costs."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate
from torch import Tensor

from pifa_compile.factors import flop_per_token
from pifa_compile.passes.plan import LinearSite, Plan

HEADERS = {
    "name": "layer",
    "shape": "m x n",
    "state": "state",
    "rank": "rank",
    "numbers_before": "numbers",
    "numbers_after": "kept",
    "density": "density",
    "flop_after": "FLOP/token",
    "ms_before": "ms dense",
    "ms_after": "ms predicted",
    "error": "error",
    "reason": "why not",
    "source": "source",
}


def site_row(site: LinearSite) -> dict[str, Any]:
    """The facts of one linear layer, ready for JSON."""
    before, after = site.numbers()
    m, n = site.shape or (0, 0)
    form = _form(site)
    flop = 0 if site.folded else flop_per_token(form, m, n, site.rank or 0)  # type: ignore[arg-type]
    if site.rows is not None and site.record is not None and form != "dense":
        whole = site.record.shape[0]  # a layer's share of what it does together with others
        flop = flop_per_token(site.record.form, whole, n, site.rank or 0) * m // whole
    return {
        "name": site.name,
        "shape": [m, n] if site.shape else None,
        "state": form if site.rows is None or form == "dense" else f"{form}, joint",
        "rank": site.rank if form != "dense" else None,
        "numbers_before": before,
        "numbers_after": after,
        "density": after / before if before else None,
        "flop_before": 2 * before,
        "flop_after": flop,
        "error": site.record.error if site.record is not None and form != "dense" else None,
        "reason": site.reason,
        "source": site.source,
    }


def _form(site: LinearSite) -> str:
    if site.folded:
        return "folded"
    if site.reason is not None:
        return "dense"
    if site.factors is not None:
        return site.factors.form
    return site.record.form if site.record is not None else "dense"


def plan_rows(plan: Plan) -> list[dict[str, Any]]:
    """``site_row`` of every site, in graph order."""
    return [site_row(s) for s in plan.sites]


def dense_weights(plan: Plan) -> dict[int, Tensor]:
    """The weights of the layers in factored form, by id: the model still owns them, so they stay in memory."""
    taken = (s for s in plan.sites if s.parameter is not None and _form(s) != "dense")
    return {id(s.parameter): s.parameter for s in taken if s.parameter is not None}


def render_memory(dense_bytes: int) -> str:
    """One line on what dense weights take beside the factors; empty where there are none."""
    if not dense_bytes:
        return ""
    held = f"{dense_bytes / 1e6:.2f} MB of their dense weights stay in memory beside the factors"
    return f"{held}: the model owns them; pifa_compile.apply_ lets them go"


def render_rows(rows: list[dict[str, Any]]) -> str:
    """The rows as a text table; columns that say nothing are left out."""
    shown = [{key: _cell(key, row.get(key)) for key in HEADERS} for row in rows]
    kept = [key for key in HEADERS if any(row[key] for row in shown)]
    body = [[row[key] for key in kept] for row in shown]
    align = ["right" if key in _RIGHT else "left" for key in kept]
    headers = [HEADERS[key] for key in kept]
    return tabulate(body, headers, "simple", disable_numparse=True, colalign=align if body else None)


_RIGHT = {"rank", "numbers_before", "numbers_after", "density", "flop_after", "ms_before", "ms_after", "error"}


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key == "shape":
        return f"{value[0]} x {value[1]}"
    if key == "density":
        return f"{value:.3f}"
    if key == "error":
        return f"{value:.1e}"
    if key in ("ms_before", "ms_after"):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def render_summary(rows: list[dict[str, Any]]) -> str:
    """One line: how many layers were taken, and the numbers before and after, over them and over all."""
    taken = [r for r in rows if r["state"] not in ("dense", "folded")]
    before, after = (sum(r[f"numbers_{when}"] for r in taken) for when in ("before", "after"))
    total_before, total_after = (sum(r[f"numbers_{when}"] for r in rows) for when in ("before", "after"))
    share = f"{after / before:.4f} of their {before:,} numbers" if before else "no numbers"
    whole = f"{total_after / total_before:.4f} of {total_before:,}" if total_before else "0"
    taken_of = f"{len(taken)} of {len(rows)} linear layers in factored form"
    return f"{taken_of} keep {share}; all linear layers of the graph keep {whole}"
