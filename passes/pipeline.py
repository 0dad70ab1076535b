"""The whole of what happens to a graph, in order, and the runner that times, counts, checks and dumps it.

    captured graph -> open_attention -> detect -> find_pairs -> lookup -> take_pairs -> [dry run ends here]
                   -> replace -> fold -> group -> decompose -> tidy -> Inductor

A pass is a function of the graph module and the context that returns a PassResult. It neither logs nor dumps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from pifa_compile import _torch
from pifa_compile.passes.attention import open_attention
from pifa_compile.passes.decompose import decompose
from pifa_compile.passes.detect import detect
from pifa_compile.passes.dump import Dump
from pifa_compile.passes.fold import fold
from pifa_compile.passes.group import group
from pifa_compile.passes.lookup import lookup
from pifa_compile.passes.pairs import find_pairs, take_pairs
from pifa_compile.passes.plan import Context, PassResult
from pifa_compile.passes.replace import replace
from pifa_compile.passes.tidy import tidy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass:
    """One step; ``rewrites`` says that it puts factors into the graph, so that a dry run stops before it."""

    name: str
    run: Callable[[fx.GraphModule, Context], PassResult]
    rewrites: bool


PIPELINE: tuple[Pass, ...] = (
    Pass("open_attention", open_attention, rewrites=False),  # first: linear layers that are inside of one call
    Pass("detect", detect, rewrites=False),  # then: everything later works on the sites it finds
    Pass("find_pairs", find_pairs, rewrites=False),  # before lookup: halves of adapters are not compressed either
    Pass("lookup", lookup, rewrites=False),  # one run for the graph, so that all its layers come from one compression
    Pass(
        "take_pairs", take_pairs, rewrites=False
    ),  # after lookup: factors of the halves, where there are any, come first
    Pass("replace", replace, rewrites=True),  # one operator per layer, whatever form the layer had
    Pass("fold", fold, rewrites=True),  # while every layer is one operator with one order
    Pass("group", group, rewrites=True),  # after fold: what needs no gather any more is not gathered
    Pass("decompose", decompose, rewrites=True),  # CPU only, before Inductor: its weight packing is a graph pass
    Pass("tidy", tidy, rewrites=True),  # last: it erases what the others left without a reader
)


def run_passes(gm: fx.GraphModule, context: Context, *, dry: bool = False) -> dict[str, PassResult]:
    """Run the pipeline on the graph in place; ``dry`` stops before the first pass that rewrites it."""
    dump = Dump(gm, context)
    results: dict[str, PassResult] = {}
    for step in PIPELINE:
        if dry and step.rewrites:
            break
        dump.before(gm)
        if step.rewrites:
            dump.capture(gm)
        started = time.perf_counter()
        result = results[step.name] = step.run(gm, context)
        seconds = time.perf_counter() - started
        if result.changed:
            gm.graph.lint()
            gm.recompile()
            dump.after(gm, step.name)
        log.debug("%s: matched %d, changed %d, %.3f s", step.name, result.matched, result.changed, seconds)
    dump.finish()
    _count(context)
    return results


def _count(context: Context) -> None:
    """Counts that any test or user can read: torch._dynamo.utils.counters["pifa"]."""
    sites = context.plan.sites
    found = {
        "matched": len(sites),
        "replaced": sum(s.factors is not None and not s.prepared for s in sites),
        "prepared": sum(s.prepared for s in sites),
        "skipped": sum(s.reason is not None for s in sites),
    }
    counts = _torch.counters()
    for key, number in found.items():
        counts[key] += number
