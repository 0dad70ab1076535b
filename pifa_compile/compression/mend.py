"""Factors that the disk has lost: an error that says how to make them again, or the same made again from the weights.

m = out_features, n = in_features, r = rank.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pifa_compile import _torch
from pifa_compile.compression.again import how_to_make
from pifa_compile.compression.first_call import exact, first_call_header, first_call_layers, go_on_with_first_call
from pifa_compile.compression.layer import pivoted
from pifa_compile.compression.observe import CapturedGraph, Sites
from pifa_compile.compression.svd import spectrum
from pifa_compile.errors import DamagedError, RecipeError
from pifa_compile.factors import Factors
from pifa_compile.layers import LinearWeight, as_matrix
from pifa_compile.pivoting import Factorized, factorize
from pifa_compile.recipes import Calibrated, FirstCall, Recipe, recipe_from_json
from pifa_compile.store import LayerRecord, Run, Store
from pifa_compile.store.objects import CURE

log = logging.getLogger(__name__)


class Mender:
    """Reads the factors of one run, and deals with those that are damaged or missing as the option "damaged" says.

    weights  what factors may be made again from, by the digest of their content
    call     the graph of a first call and its open sites, where there is one
    run      the run as it is in the store now
    """

    def __init__(
        self,
        store: Store,
        run: Run,
        policy: str,
        weights: Mapping[str, LinearWeight],
        call: tuple[CapturedGraph, Sites] | None = None,
    ) -> None:
        self.run = run
        self._store, self._policy, self._weights, self._call = store, policy, weights, call
        self._names: list[str] = []

    def factors(self, record: LayerRecord, load: Callable[..., Factors], *place: Any) -> Factors:
        """``load(record, *place)``, if need be after its object was made again; of ``run``'s record by then.

        Raises DamagedError, which names the layer, the object and what mends it: always under "error", and under
        "recompute" where the factors do not follow from what is at hand, with the reason.
        """
        try:
            return load(record, *place)
        except DamagedError as error:
            if self._policy == "error":
                raise damage(self._store, self.run, error) from error
            self.run = self._mended(record, error)
            self._names.append(record.name)
            return load(self.run.by_name[record.layers[0][0]], *place)

    def tell(self) -> None:
        """One warning for all that was made again."""
        if self._names:
            count, names = len(self._names), ", ".join(self._names)
            text = f"the factors of {count} layers were damaged or missing and have been made again: {names}"
            warnings.warn(f"pifa: run {self.run.run_id!r}: {text}", stacklevel=3)

    def _mended(self, record: LayerRecord, error: DamagedError) -> Run:
        try:
            with torch.inference_mode(False), torch.no_grad(), exact():
                return self._again(record, recipe_from_json(self.run.header.recipe))
        except (_CannotError, RecipeError) as reason:
            raise damage(self._store, self.run, error, f"it cannot be made again here, because {reason}") from error

    def _again(self, record: LayerRecord, recipe: Recipe) -> Run:
        if isinstance(recipe, FirstCall):
            if self._call is None:
                raise _CannotError("it was calibrated on the inputs of a first call, which are not at hand")
            graph, sites = self._call
            layers = first_call_layers(sites, recipe)
            header = first_call_header(graph, layers, recipe, self.run.header.model)
            if header.run_id != self.run.run_id:
                raise _CannotError("it was made of other layers than those of this graph")
            if header.calibration != self.run.header.calibration:
                raise _CannotError("it was calibrated on other inputs than those of this call")
            return go_on_with_first_call(graph, sites, layers, recipe, self._store, header)
        if isinstance(recipe, Calibrated):
            raise _CannotError("it was calibrated on a text, which is not at hand")
        return _replaced(self._store, self.run, record, _factorized(record, recipe, self._weights))


class _CannotError(Exception):
    """Why factors do not follow from what is at hand."""


def damage(store: Store, run: Run, error: DamagedError, reason: str = "") -> DamagedError:
    """The error with what mends this very run in place of what mends any, and with a reason before it."""
    cure = how_to_make(store, run) if error.cure == CURE else error.cure
    return DamagedError(error.path, error.problem, f"{reason}; {cure}" if reason else cure, error.layer)


def _factorized(record: LayerRecord, recipe: Recipe, weights: Mapping[str, LinearWeight]) -> Factorized:
    """What a recipe without data makes of the weights that a record is about, of the record's form and rank."""
    dtype = str(record.details.get("dtype"))
    found = [_own_weight(name, digests, dtype, record, weights) for name, digests in record.layers]
    matrices = [as_matrix(weight.parameter, weight.layout) for weight in found]
    fitted = spectrum(matrices[0] if len(matrices) == 1 else torch.cat(matrices), record.name)
    if record.form == recipe.form:
        return pivoted(fitted, record.rank, matrices[0].dtype, recipe)
    _torch.counters()["factored"] += 1  # a pair that was kept in place of pivoted factors
    return factorize(fitted.truncate(record.rank), matrices[0].dtype, form="pair")


def _own_weight(
    name: str, digests: Mapping[str, str], dtype: str, record: LayerRecord, weights: Mapping[str, LinearWeight]
) -> LinearWeight:
    weight = weights.get(digests.get(dtype, ""))
    if weight is not None and weight.layout == record.layout:
        return weight
    casts: Sequence[str] = [key for key, digest in digests.items() if digest in weights]
    if casts:
        raise _CannotError(f"the weight of {name} is {casts[0]} here, and was factored in {dtype}")
    raise _CannotError(f"the weight of {name} is not at hand")


def _replaced(store: Store, run: Run, record: LayerRecord, made: Factorized) -> Run:
    """The run with an object made again; where it is another (of another machine, or version), the run names that."""
    factors = made.factors
    if (factors.form, factors.shape, factors.rank) != (record.form, record.shape, record.rank):
        found = f"{factors.form} of rank {factors.rank}"
        raise _CannotError(f"it comes out as {found}, and was {record.form} of rank {record.rank}")
    digest = store.put_factors(factors)
    if digest == record.object:
        return run
    new = replace(record, object=digest, error=made.error, bytes=factors.nbytes)
    with store.write_run(run.header) as writer:
        if record.name not in writer.done:  # else another process was faster
            writer.add(new)
        new = writer.done[record.name]
        if set(writer.done) == {other.name for other in run.layers}:
            writer.finish()
    return replace(run, layers=tuple(new if other.name == record.name else other for other in run.layers))
