"""Compression when a model is compiled, calibrated on the inputs of the first call of a captured graph.

m = out_features, n = in_features, r = rank, N = number of tokens. One flow, the dense one: each weight becomes the
nearest one of its rank in what it does to its inputs, weighted by what random projections of the graph's outputs say
about its own outputs; ranks are priced over all layers of the graph by the same figures.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pifa_compile import _torch
from pifa_compile.compression.allocation import allocate, rank_options, tail_losses
from pifa_compile.compression.layer import (
    ALLOCATED,
    Finished,
    Layer,
    Unit,
    distinct_layers,
    factored_record,
    override_rank,
    pivoted,
    progress_bar,
    run_header,
    run_id,
    show,
    too_small,
)
from pifa_compile.compression.losses import MOST_ROUNDS, SAMPLES
from pifa_compile.compression.measure import Measure
from pifa_compile.compression.moments import FEW, SecondMoments
from pifa_compile.compression.mpifa import OutputWeighting, closed_form, objective, output_weighting, whitened_target
from pifa_compile.compression.observe import CapturedGraph, Sites
from pifa_compile.compression.ranks import plan_uniform
from pifa_compile.compression.shrinkage import shrink
from pifa_compile.compression.whitening import Whitening, whiten
from pifa_compile.errors import RunBusyError, RunMismatchError, UnknownRunError
from pifa_compile.factors import numbers, rank_for_density
from pifa_compile.layers import LinearWeight
from pifa_compile.passes.plan import LinearSite
from pifa_compile.pivoting import check_weight, numerical_rank
from pifa_compile.recipes import FirstCall
from pifa_compile.store import LayerRecord, Run, RunHeader, RunWriter, Store

log = logging.getLogger(__name__)

#: Moments of inputs are held up to this size at once; where the layers need more, the graph runs once for every part,
#: and all parts twice.
MOMENT_BYTES = 4 << 30
#: Full gradient moments are kept up to this size for all layers together; above it, their diagonals.
GRADIENT_BYTES = 4 << 30
#: Intermediate results are held for gradients up to this size; above it there is no weighting and no pricing.
ACTIVATION_BYTES = 16 << 30
#: With fewer tokens than this a call is not looked at: a first token alone is like no other (a small Llama calibrated
#: on one had a perplexity of 26 in place of 17 without data, on eight tokens 16.7, on 32 17.0, on 256 16.8).
LEAST = 8


def compress_first_call(
    graph: CapturedGraph, sites: Sites, recipe: FirstCall, store: Store, *, model: str, progress: bool = True
) -> Run:
    """Compress the weights of ``sites`` (all open sites of the graph, digested) and return the finished run.

    There is one such run for the same weights and recipe, whatever the inputs: they are noted in its calibration. A
    process that comes second waits for the first and takes its run; one that was interrupted goes on with the same
    inputs, and is begun anew with others.

    The fewer the tokens, the less of their moments is believed (``shrinkage``); if they are fewer than half the inputs
    of a layer there is a warning, and below LEAST all is as without data. Layers that no gradient arrives at keep the
    common density, and so do all where there are no gradients to be had; then there is a warning, too.

    Memory, besides what observing takes (``observe``): at most MOMENT_BYTES of moments of inputs, GRADIENT_BYTES of
    moments of gradients and ACTIVATION_BYTES of intermediate results; a log line says how much it is. Raises
    WeightError naming the layer if a weight is not finite.
    """
    with torch.inference_mode(False), torch.no_grad():
        layers = first_call_layers(sites, recipe)
        header = first_call_header(graph, layers, recipe, model)
        while True:
            try:
                return go_on_with_first_call(graph, sites, layers, recipe, store, header, progress=progress)
            except RunMismatchError:
                if (run := _finished(store, header)) is not None:
                    return run


def first_call_layers(sites: Sites, recipe: FirstCall) -> list[Layer]:
    """The distinct layers of the sites, in order."""
    first = {site.weight: site for site in reversed(sites)}
    found = [LinearWeight(s.name, s.parameter, s.layout) for s in first.values() if s.parameter is not None]
    return distinct_layers(found[::-1], recipe)


def first_call_header(graph: CapturedGraph, layers: Sequence[Layer], recipe: FirstCall, model: str) -> RunHeader:
    """The header of the run of these layers. Its id is that of their weights and the recipe, whatever the inputs."""
    header = run_header(recipe, layers, model, None, {"source": "first call", "digest": graph.digest()})
    return replace(header, run_id=run_id(recipe, [layer.identity for layer in layers]))


def go_on_with_first_call(
    graph: CapturedGraph,
    sites: Sites,
    layers: Sequence[Layer],
    recipe: FirstCall,
    store: Store,
    header: RunHeader,
    *,
    progress: bool = True,
) -> Run:
    """Make what is missing, or damaged, of the run. Raises RunMismatchError if it was begun on other inputs."""
    with store.write_run(header) as writer:
        return _write(graph, sites, layers, recipe, store, writer, progress)


def _finished(store: Store, header: RunHeader) -> Run | None:
    """The run that another process has made meanwhile, on other inputs; one that it did not finish is removed."""
    with suppress(RunBusyError, UnknownRunError):
        run = store.run(header.run_id)
        if run.complete:
            return run
        store.delete_run(header.run_id)
    return None


def _write(
    graph: CapturedGraph,
    sites: Sites,
    layers: Sequence[Layer],
    recipe: FirstCall,
    store: Store,
    writer: RunWriter,
    progress: bool,
) -> Run:
    with progress_bar(len(layers), writer.header.run_id, progress) as bar:
        walk = _Walk(graph, sites, recipe, store, writer, bar)
        for layer in layers:
            if layer.reason is not None:
                walk.add(layer.record(reason=layer.reason))
            elif layer.key in walk.done:
                show(bar, walk.done[layer.key])
            elif not bool(layer.matrix.any()):
                walk.add(layer.record(reason="the weight is all zeros"))
            else:
                check_weight(layer.matrix, layer.name)
        if any(layer.key not in walk.done for layer in layers):
            walk.run([layer for layer in layers if layer.reason is None and bool(layer.matrix.any())])
        return writer.finish()


@dataclass(frozen=True, eq=False)
class _Reader:
    """Layers that read the same tensors, the sites at which one of them does, and what is known of these tensors."""

    layers: list[Layer]
    sites: Sites

    @property
    def nbytes(self) -> int:
        return 8 * self.layers[0].weight.shape[1] ** 2


@dataclass(eq=False)
class _Walk:
    """One compression under way.

    done       records, by what a layer and its record share
    weighting  of the outputs of a layer, by the same key; none for layers that no gradient arrives at
    tails      what every rank of a layer costs the outputs of the graph
    enough     whether there are tokens enough to look at them at all
    """

    graph: CapturedGraph
    sites: Sites
    recipe: FirstCall
    store: Store
    writer: RunWriter
    bar: Any
    finished: Finished = field(init=False)
    done: dict[Any, LayerRecord] = field(init=False)
    weighting: dict[Any, OutputWeighting] = field(default_factory=dict)
    tails: dict[Any, list[float]] = field(default_factory=dict)
    enough: bool = True

    def __post_init__(self) -> None:
        self.finished = Finished(self.writer, self.bar)
        self.done = self.finished.done

    def add(self, record: LayerRecord) -> None:
        """Remember a finished layer, unless it is there already."""
        self.finished.add(record)

    def run(self, layers: Sequence[Layer]) -> None:
        """Observe, price and factor the layers that may be replaced."""
        parts = _parts(self._readers(layers))
        observed = self._observe(parts[0])
        self._weigh(layers, observed)
        for index, part in enumerate(parts):
            observed = self._observe(part) if index else observed
            with exact():
                self._price(observed)
        ranks = _ranks(self.recipe, layers, self.tails)
        for part in parts:
            observed = self._observe(part) if len(parts) > 1 else observed
            with exact():
                self._factor(observed, ranks)

    def _readers(self, layers: Sequence[Layer]) -> list[_Reader]:
        found: dict[Any, _Reader] = {}
        for layer in layers:
            sites = [site for site in self.sites if _is_of(site, layer)]
            read = tuple(dict.fromkeys((site.x, site.channel) for site in sites))
            found.setdefault(read, _Reader([], sites)).layers.append(layer)
        return list(found.values())

    def _observe(self, part: Sequence[_Reader]) -> list[tuple[_Reader, SecondMoments]]:
        return list(zip(part, self.graph.input_moments([reader.sites for reader in part]), strict=True))

    def _gram(self, moments: SecondMoments) -> Tensor:
        return shrink(moments.gram, moments.count if self.enough else 0)

    def _weigh(self, layers: Sequence[Layer], observed: Sequence[tuple[_Reader, SecondMoments]]) -> None:
        """Fill ``weighting``, from gradients; how many draws it takes follows from the number of tokens."""
        tokens = max(moments.count for _, moments in observed)
        _warn_of_few(layers, tokens)
        self.enough = tokens >= LEAST
        if not self.enough:
            return
        rounds = min(MOST_ROUNDS, math.ceil(SAMPLES * max(layer.weight.shape[0] for layer in layers) / max(tokens, 1)))
        needed = sum(8 * layer.weight.shape[0] ** 2 for layer in layers)
        form = "full" if needed <= GRADIENT_BYTES else "diagonal"
        held, between = sum(reader.nbytes for reader, _ in observed), self.graph.activation_bytes
        text = f"{tokens} tokens{'' if self.graph.mask is None else ' (padding left out)'}"
        with self.bar.external_write_mode():
            text = f"{text}: {held / 1e6:.1f} MB of moments, {between / 1e6:.1f} MB of intermediate results"
            log.warning("calibrating %d layers on %s", len(layers), text)
        try:
            if between > ACTIVATION_BYTES:
                raise RuntimeError(f"they need {between / 1e9:.0f} GB of intermediate results, more than are taken")
            writers = [[site for site in self.sites if _is_of(site, layer)] for layer in layers]
            gradients = self.graph.output_moments(writers, form, rounds, self.recipe.seed)
        except (RuntimeError, NotImplementedError) as error:  # operators without a derivative, memory
            text = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(f"pifa: all layers get one density, because the graph has no gradients: {text}", stacklevel=2)
            return
        with exact():
            for layer, moments in zip(layers, gradients, strict=True):
                mean = None if moments is None else moments.mean()
                if mean is not None and 0 < float(mean.sum() if mean.dim() == 1 else mean.trace()) < math.inf:
                    self.weighting[layer.key] = output_weighting(shrink(mean, tokens))

    def _price(self, observed: Sequence[tuple[_Reader, SecondMoments]]) -> None:
        """Fill ``tails`` for the layers that have a weighting."""
        for reader, moments in observed:
            whitening = whiten(self._gram(moments), overwrite=True)
            for layer in reader.layers:
                if layer.free and layer.key in self.weighting:
                    outputs = self.weighting[layer.key].apply(whitening.apply(layer.matrix.double()))
                    values = torch.linalg.svdvals(outputs)
                    self.tails[layer.key] = tail_losses(values, numerical_rank(values, *layer.weight.shape))

    def _factor(self, observed: Sequence[tuple[_Reader, SecondMoments]], ranks: Mapping[Any, int]) -> None:
        for reader, moments in observed:
            gram = self._gram(moments)
            whitening, measure = whiten(gram), Measure(gram)
            for layer in reader.layers:
                if layer.key not in self.done:
                    started = time.perf_counter()
                    record = self._factor_layer(layer, whitening, measure, ranks.get(layer.key, 0))
                    facts = record.details | {"tokens": moments.count} if record.object else {}
                    self.add(replace(record, seconds=time.perf_counter() - started, details=facts))

    def _factor_layer(self, layer: Layer, whitening: Whitening, measure: Measure, planned: int) -> LayerRecord:
        matrix, (m, n), recipe = layer.matrix, layer.weight.shape, self.recipe
        weighting = self.weighting.get(layer.key, OutputWeighting())
        if planned == 0:
            fits = layer.free and rank_for_density(m, n, recipe.density, 1, recipe.form)
            return layer.record(reason=ALLOCATED if fits else too_small(Unit((layer,)), recipe))
        target = whitened_target(matrix, whitening)
        fitted = closed_form(target, whitening, weighting)
        r = min(planned, fitted.rank)
        if numbers(recipe.form, m, n, r) >= m * n:
            return layer.record(reason=f"rank {r} would save nothing")
        made = pivoted(fitted, r, matrix.dtype, recipe)
        achieved, least = measure(matrix, made.factors.weight(), made.factors.rank)
        loss = objective(fitted.truncate(made.factors.rank), target, whitening, weighting)
        facts = {"truncation": achieved, "least_error": least, "details": {"objective": loss}}
        return factored_record(Unit((layer,)), made, self.store.put_factors(made.factors), seconds=0.0, **facts)


def _is_of(site: LinearSite, layer: Layer) -> bool:
    """Whether a site applies the layer's weight, told by its content."""
    own = layer.digests.get(_torch.dtype_name(layer.weight.parameter.dtype))
    return site.layout == layer.weight.layout and site.digest == own


def _parts(readers: Sequence[_Reader]) -> list[list[_Reader]]:
    """The readers in order, in parts whose moments fit into MOMENT_BYTES (or a single one that does not)."""
    parts: list[list[_Reader]] = [[]]
    for reader in readers:
        if parts[-1] and sum(other.nbytes for other in parts[-1]) + reader.nbytes > MOMENT_BYTES:
            parts.append([])
        parts[-1].append(reader)
    return parts


def _ranks(recipe: FirstCall, layers: Sequence[Layer], tails: Mapping[Any, list[float]]) -> dict[Any, int]:
    """The rank of every layer, 0 for dense: of priced ones by the loss, of those with an override by it."""
    ranks = _allocated(recipe, [layer for layer in layers if layer.key in tails], tails)
    ranks |= {layer.key: override_rank(layer, recipe) for layer in layers if layer.override}
    others = [layer for layer in layers if layer.key not in ranks]
    common = plan_uniform([layer.weight.shape for layer in others], recipe.density, recipe.rank_multiple, recipe.form)
    return ranks | {layer.key: r for layer, r in zip(others, common, strict=True)}


def _allocated(recipe: FirstCall, layers: Sequence[Layer], tails: Mapping[Any, list[float]]) -> dict[Any, int]:
    """The ranks that cost least under the density; in steps of one where no choice of multiples is small enough.

    None where not even that is: then each layer keeps the density as far as it can.
    """
    shapes = [layer.weight.shape for layer in layers]
    for multiple in (recipe.rank_multiple, 1):
        options = [
            rank_options(m, n, tails[layer.key], multiple, recipe.form)
            for layer, (m, n) in zip(layers, shapes, strict=True)
        ]
        chosen = allocate(options, recipe.density * sum(m * n for m, n in shapes))
        if chosen is not None:
            return {layer.key: option.rank for layer, option in zip(layers, chosen, strict=True)}
    return {}


def _warn_of_few(layers: Sequence[Layer], tokens: int) -> None:
    few = [layer for layer in layers if tokens < FEW * layer.weight.shape[1]]
    if few:
        warnings.warn(
            f"pifa: the first call has {tokens} tokens, less than half the inputs of {len(few)} of its layers: their "
            "factors are rough; make the first call with more, or run `pifa compress` on a text and name its run",
            stacklevel=2,
        )


@contextmanager
def exact() -> Iterator[None]:
    """No autocast: what is computed here is computed in the dtype it is written in."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
