"""What the backend would do with every linear layer of a model, and why, before anything is changed or compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from pifa_compile import _torch, cost, machine
from pifa_compile.backend import find_run, make_context, warn_of_constants
from pifa_compile.compression.ranks import plan_uniform
from pifa_compile.factors import FLOP_PER_TOKEN, NUMBERS, Factors, Form, PifaFactors, numbers
from pifa_compile.kernels.few_tokens import serves
from pifa_compile.options import Settings, resolve
from pifa_compile.passes.pairs import Pair
from pifa_compile.passes.pipeline import run_passes
from pifa_compile.passes.plan import Context, LinearSite
from pifa_compile.passes.table import dense_weights, plan_rows, render_memory, render_rows, render_summary
from pifa_compile.recipes import recipe_for
from pifa_compile.store import LayerRecord, Run, Store


@dataclass
class DryRun:
    """One row per linear layer of every graph that Dynamo captured.

    run      the compression run that would be used, None if there is none
    planned  whether the ranks are a plan: the first call would compress the weights, and choose ranks by its inputs
    dense    bytes of each dense weight that would stay in memory beside its factors, by the id of the weight
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    graphs: int = 0
    run: str | None = None
    planned: bool = False
    dense: dict[int, int] = field(default_factory=dict)

    @property
    def dense_bytes(self) -> int:
        """Bytes of dense weights that would stay in memory beside the factors, each weight once."""
        return sum(self.dense.values())

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON."""
        facts = {"run": self.run, "planned": self.planned, "graphs": self.graphs, "dense_bytes": self.dense_bytes}
        return facts | {"linears": self.rows}

    def __str__(self) -> str:
        lines = [render_rows(self.rows), "", render_summary(self.rows)]
        if memory := render_memory(self.dense_bytes):
            lines.append(memory)
        if self.planned:
            lines.append("no run has this density: the first call would compress; its ranks may differ from this plan")
        elif self.run is not None:
            lines.append(f"factors from run {self.run}")
        forms: tuple[Form, ...] = ("dense", "pair", "pifa")
        lines.append("numbers:     " + ", ".join(f"{form} {NUMBERS[form]}" for form in forms))
        lines.append("FLOP/token:  " + ", ".join(f"{form} {FLOP_PER_TOKEN[form]}" for form in forms))
        return "\n".join(lines)


def dry_run(
    model: Callable[..., Any],
    *inputs: Any,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    **keywords: Any,
) -> DryRun:
    """Run ``model(*inputs, **keywords)`` once, uncompressed and without gradients, and report what would be replaced.

    options  the backend's options, e.g. {"density": 0.6} or {"run": "svd-0.6-..."}; nothing is compressed or written

    Predicted times are shown where the machine has a profile (``machine.profile``; ``pifa bench kernels`` makes one).
    """
    settings = resolve(None, options)
    report = DryRun()
    backend = functools.partial(_observe, report=report, settings=settings)
    with torch.no_grad():
        torch.compile(_torch.own_frame(model), backend=backend, dynamic=dynamic)(*inputs, **keywords)
    return report


def _observe(
    gm: fx.GraphModule, example_inputs: list[Any], *, report: DryRun, settings: Settings
) -> Callable[..., Any]:
    warn_of_constants(gm)
    values = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))

    def find_or_plan(store: Store, settings: Settings, sites: Sequence[LinearSite]) -> Run | None:
        run = find_run(store, settings, sites)
        report.planned |= run is None and settings.density is not None
        return run

    context = make_context(replace(settings, dump=None), values, find_or_plan, _plan_pairs)
    run_passes(gm, context, dry=True)
    if context.plan.run is not None:
        report.run = context.plan.run.header.run_id
    elif settings.density is not None:
        _plan_ranks(context, settings)
    report.graphs += 1
    rows = plan_rows(context.plan)
    for site, row in zip(context.plan.sites, rows, strict=True):
        row |= _predicted(site, row["state"])
    report.rows += rows
    report.dense |= {key: weight.nbytes for key, weight in dense_weights(context.plan).items()}
    return gm.forward


def _predicted(site: LinearSite, state: str) -> dict[str, float]:
    """Milliseconds of one call of the layer, dense and as planned, where this machine's profile is known."""
    x = _torch.fake_value(site.x)
    form = state.partition(",")[0]
    if not isinstance(x, torch.Tensor) or site.shape is None or form not in cost.STEPS or x.dtype not in machine.DTYPES:
        return {}
    profile = machine.profile(x.device, measure=False)
    if profile is None or not all(type(size) is int for size in x.shape):
        return {}
    (m, n), whole = site.shape, site.shape[0]
    tokens = x.numel() // n
    if site.rows is not None and site.record is not None:  # a layer's share of what it does together with others
        whole = site.record.shape[0]
    dtype = _torch.dtype_name(x.dtype)
    if form == "pifa" and x.device.type == "cpu" and serves(tokens, whole, n, site.rank or 0, x.dtype):
        form = cost.FEW_TOKENS
    after = cost.time(form, tokens, whole, n, site.rank or 0, dtype, profile) * m / whole
    return {"ms_before": 1e3 * cost.time("dense", tokens, m, n, 0, dtype, profile), "ms_after": 1e3 * after}


def _plan_pairs(store: Store, pairs: Sequence[Pair], values: Mapping[fx.Node, Any]) -> list[Factors]:
    """Factors without content for the products of pairs, at full rank."""
    found: list[Factors] = []
    for left, right in (pair.matrices() for pair in pairs):
        (m, k), n = left.shape, right.shape[1]
        rows, coefficients = (torch.empty(shape, dtype=left.dtype, device="meta") for shape in ((k, n), (m - k, k)))
        found.append(PifaFactors(rows, coefficients, torch.empty(m, dtype=torch.int32, device="meta")))
    return found


def _plan_ranks(context: Context, settings: Settings) -> None:
    """Give every site that waits for a compression the record that its shape and the density promise."""
    recipe = recipe_for(settings.method or "svd", density=settings.density)
    waiting: dict[str, LinearSite] = {}
    for site in context.plan.sites:
        if site.digest is not None and site.record is None:
            waiting.setdefault(site.digest, site)
    shapes = [site.shape or (0, 0) for site in waiting.values()]
    ranks = plan_uniform(shapes, recipe.density, recipe.rank_multiple, recipe.form)
    planned = {
        digest: _planned_record(site, rank, recipe.form)
        for (digest, site), rank in zip(waiting.items(), ranks, strict=True)
    }
    for site in context.plan.sites:
        if site.digest in planned:
            site.record = planned[site.digest]
            site.reason = site.record.reason


def _planned_record(site: LinearSite, rank: int, form: Form) -> LayerRecord:
    m, n = site.shape or (0, 0)
    return LayerRecord(
        name=site.name,
        digests={},
        shape=(m, n),
        object=_PLANNED if rank else None,
        form=form if rank else "dense",
        rank=rank,
        numbers=numbers(form, m, n, rank) if rank else m * n,
        bytes=0,
        seconds=0.0,
        reason=None if rank else "no rank keeps so few numbers",
    )


_PLANNED = "0" * 64  # stands for an object that is not made yet
