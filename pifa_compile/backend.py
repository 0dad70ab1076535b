"""The Dynamo backend: options -> run of the store -> graph passes -> Inductor.

torch.compile(model, backend="pifa", options={"density": 0.6})
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from pifa_compile import _torch
from pifa_compile.compression import compress_weights
from pifa_compile.compression.first_call import compress_first_call
from pifa_compile.compression.mend import Mender
from pifa_compile.compression.observe import CapturedGraph
from pifa_compile.compression.pairs import PairWeight, compress_pairs
from pifa_compile.factors import Factors
from pifa_compile.fingerprint import cache_tag
from pifa_compile.kernels import lowering
from pifa_compile.layers import LinearWeight
from pifa_compile.loaded import shared_factors
from pifa_compile.options import Settings, resolve
from pifa_compile.passes.detect import GRADIENT
from pifa_compile.passes.lookup import NO_RUN
from pifa_compile.passes.pairs import Pair, folded_bias
from pifa_compile.passes.pipeline import run_passes
from pifa_compile.passes.plan import Context, LinearSite, Plan
from pifa_compile.passes.replace import output_dtype
from pifa_compile.passes.table import dense_weights
from pifa_compile.recipes import FirstCall, Svd, recipe_for
from pifa_compile.selection import check_shapes, choose_run
from pifa_compile.staleness import DenseGraph, Watch, guard_change, guard_identity, guarded
from pifa_compile.store import LayerRecord, Run, Store

log = logging.getLogger(__name__)


def pifa(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with its linear layers in factored form; see ``options.Settings`` for the options.

    The graph is rewritten in place. Weights keep their dense copy, because the model still owns it.
    """
    settings = resolve(mode, options)
    warn_of_constants(gm)
    placeholders = gm.graph.find_nodes(op="placeholder")
    values = dict(zip(placeholders, example_inputs, strict=True))
    graph = CapturedGraph(gm, values)

    held: list[Factors] = []  # until the graph has them

    def find(store: Store, settings: Settings, sites: Sequence[LinearSite]) -> Run | None:
        run = find_run(store, settings, sites)
        if run is None:
            return compress_now(store, settings, context.plan, graph)
        run, factors = read_factors(store, settings, run, context, graph)
        held.extend(factors)
        return run

    context = make_context(settings, values, find, factor_pairs)
    dense = DenseGraph(gm)
    on_cpu = all(t.device.type == "cpu" for t in example_inputs if isinstance(t, Tensor))
    checks = _torch.begin_isa_checks() if on_cpu and settings.inner != "eager" else []  # beside the passes
    try:
        run_passes(gm, context)
    finally:
        wait(checks)
    held.clear()  # what refers to it refers to itself, and would live until the collector comes
    _tell(context)
    kept = gm.graph.find_nodes(op="placeholder")
    compiled = _compile_inner(gm, [values[node] for node in kept], settings)
    watched = context.plan.watched(values)
    guard_identity(list(watched))
    if settings.staleness == "off" or not watched:
        return compiled
    watch = Watch([(_torch.placeholder_name(node), tensor) for node, tensor in watched.items()])
    guard_change(list(watched), watch)
    return guarded(compiled, dense.bind(values, kept), watch, settings.staleness)


def warn_of_constants(gm: fx.GraphModule) -> None:
    """Say so where Dynamo has hidden weights from the backend: their layers stay dense."""
    if count := _torch.inlined_parameters(gm):
        warnings.warn(
            f"pifa: {count} weights are constants of the graph, which cannot be replaced, so their layers stay dense: "
            "torch._inductor.config.freezing is on globally; give it to this backend, as options={'freezing': True}",
            stacklevel=2,
        )


def _compile_inner(gm: fx.GraphModule, inputs: list[Any], settings: Settings) -> Callable[..., Any]:
    if settings.inner == "eager":
        return gm.forward
    lowering.register()
    with _torch.cache_key_tag(cache_tag()):
        return _torch.compile_inner(gm, inputs, dict(settings.inductor))


def make_context(
    settings: Settings,
    values: Mapping[fx.Node, Any],
    find_run: Callable[[Store, Settings, Sequence[LinearSite]], Run | None],
    factor: Callable[[Store, Sequence[Pair], Mapping[fx.Node, Any]], list[Factors]],
) -> Context:
    """The context of the passes over one graph; the store is opened when the first layer asks for it."""
    opened = functools.cache(lambda: Store(settings.store))

    def load(record: LayerRecord, like: Tensor) -> Factors:
        return shared_factors(opened(), record, like.dtype, like.device)

    def pairs(found: Sequence[Pair]) -> list[Factors]:
        return factor(opened(), found, values)

    return Context(settings, dict(values), Plan(), lambda sites: find_run(opened(), settings, sites), load, pairs)


def factor_pairs(store: Store, pairs: Sequence[Pair], values: Mapping[fx.Node, Any]) -> list[Factors]:
    """Factors of the products of pairs, computed once and kept in the store, with the biases that fold into one."""
    run = compress_pairs([PairWeight(p.outer.name, *p.matrices()) for p in pairs], store)
    found: list[Factors] = []
    for pair, record in zip(pairs, run, strict=True):
        left, _ = pair.matrices()
        biases = [None if s.bias is None else values[s.bias] for s in (pair.outer, pair.inner)]
        factors = shared_factors(store, record, left.dtype, left.device)
        found.append(replace(factors, bias=folded_bias(pair, *biases)))
    return found


def find_run(store: Store, settings: Settings, sites: Sequence[LinearSite]) -> Run | None:
    """The run of the store that fits the weights of the sites, or None."""
    run = choose_run(store, [s.digest for s in sites if s.digest is not None], settings)
    if run is not None:
        check_shapes(run, ((s.digest, s.layout, s.shape) for s in sites if s.digest and s.shape))
    return run


def read_factors(
    store: Store, settings: Settings, run: Run, context: Context, graph: CapturedGraph
) -> tuple[Run, list[Factors]]:
    """The run and all its factors that the graph needs, before anything of the graph is changed.

    What is damaged is an error, or made again, as the settings say; then the run may be another than before.
    """
    sites = [site for site in context.plan.sites if site.open and site.digest is not None]
    weights = {s.digest or "": LinearWeight(s.name, p, s.layout) for s in sites if (p := s.parameter) is not None}
    mender = Mender(store, run, settings.damaged, weights, (graph, sites))
    found: list[Factors] = []
    for site in sites:
        record = mender.run.by_digest.get(site.digest or "")
        if record is not None and record.object is not None and record.layout == site.layout:
            assert site.parameter is not None
            like = site.parameter.detach().new_empty(0, dtype=output_dtype(site.node, site.parameter))
            found.append(mender.factors(record, context.load, like))
    mender.tell()
    return mender.run, found


def compress_now(store: Store, settings: Settings, plan: Plan, graph: CapturedGraph) -> Run | None:
    """The run of the density that is asked for, made now: from the inputs of this call, or without data if the options
    say so. None without a density."""
    if settings.density is None:
        return None
    sites = plan.weights().values()
    log.warning("no compression run at density %g fits: compressing %d layers now", settings.density, len(sites))
    label = _common_prefix([s.name for s in sites])
    method = settings.method or (Svd.method if settings.calibrate == "none" else FirstCall.method)
    recipe = recipe_for(method, density=settings.density)
    if isinstance(recipe, FirstCall):
        return compress_first_call(graph, [s for s in plan.sites if s.open], recipe, store, model=label)
    weights = [LinearWeight(s.name, s.parameter, s.layout) for s in sites if s.parameter is not None]
    with torch.no_grad():
        return compress_weights(weights, recipe, store, model=label)


def _common_prefix(names: list[str]) -> str:
    """A label for a graph's weights: the path that their names share."""
    parts = [name.split(".") for name in names]
    shared = [words[0] for words in zip(*parts, strict=False) if len(set(words)) == 1]
    return ".".join(shared) or "compiled graph"


def _tell(context: Context) -> None:
    """One log line of what was done, and one warning where the user can do something about layers left dense."""
    sites = context.plan.sites
    kept = sum(weight.nbytes for weight in dense_weights(context.plan).values()) / 1e6
    run = context.plan.run.header.run_id if context.plan.run is not None else "none"
    log.info(
        "%d of %d linear layers replaced from run %s; their dense weights stay in memory beside the factors: %.1f MB",
        sum(s.factors is not None for s in sites), len(sites), run, kept,
    )  # fmt: skip
    for cause in (GRADIENT, NO_RUN):
        count = sum(s.reason == cause for s in sites)
        if count:
            warnings.warn(f"pifa: {count} of {len(sites)} linear layers stay dense: {cause}", stacklevel=2)
    unknown = [s for s in sites if s.digest and s.record is None]
    if context.plan.run is not None and unknown:
        warnings.warn(
            f"pifa: {len(unknown)} of {len(sites)} linear layers stay dense: {unknown[0].reason}", stacklevel=2
        )
