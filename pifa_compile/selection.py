"""Which compression run a graph is served from: exactly one, never a mixture, never another density than asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pifa_compile.errors import AmbiguousRunError, RecipeError, RecordError
from pifa_compile.options import Settings
from pifa_compile.recipes import RECIPES, FirstCall, recipe_for
from pifa_compile.store import Run, Store


def choose_run(store: Store, digests: Sequence[str], settings: Settings) -> Run | None:
    """The run for weights with these content digests, or None if none fits.

    A run that is named is taken. With a density (and method), a run fits if it has exactly that density and knows
    every weight, as factors or as left dense; "calibrate" takes only those that were calibrated on a first call, or
    only others. Without a density, the run that knows most of the weights fits.

    Where several fit, and all were calibrated on first calls, the one made of the fewest layers is taken: it was made
    for these weights, the others for graphs that have more. In all other cases AmbiguousRunError is raised: no method
    goes before another.
    """
    if settings.run is not None:
        return store.run(settings.run)
    counted = [(run, sum(d in run.by_digest for d in digests)) for run in store.runs() if run.complete]
    most = len(digests) if settings.density is not None else max((count for _, count in counted), default=0)
    fitting = [run for run, count in counted if count and count == most and _asked_for(run, settings)]
    if len(fitting) > 1 and all(_first_call(run) for run in fitting):
        least = min(run.header.layers_planned for run in fitting)
        fitting = [run for run in fitting if run.header.layers_planned == least]
    if len(fitting) > 1:
        raise AmbiguousRunError([describe(run) for run in fitting])
    return fitting[0] if fitting else None


def check_shapes(run: Run, weights: Iterable[tuple[str, str, tuple[int, int]]]) -> None:
    """Raise RecordError, naming the layer, where the run tells a weight's shape wrong.

    weights  (digest, layout, shape) of each

    A digest stands for the weight and its shape, but the shape that a run tells beside it is only as true as the run.
    """
    for digest, layout, (m, n) in weights:
        record = run.by_digest.get(digest)
        if record is None or record.object is None or record.layout != layout:
            continue
        start, stop = record.rows_of(digest) or (0, record.shape[0])
        if (stop - start, record.shape[1]) != (m, n):
            problem = f"run {run.run_id!r} says {stop - start} x {record.shape[1]}, the weight is {m} x {n}"
            raise RecordError(f"layer {record.name!r}", f"{problem}; remove the run with Store.delete_run")


def _asked_for(run: Run, settings: Settings) -> bool:
    if settings.density is None:
        return True
    if settings.calibrate is not None and _first_call(run) != (settings.calibrate == FirstCall.method):
        return False
    recipe = run.header.recipe
    return recipe.get("density") == settings.density and settings.method in (None, recipe.get("method"))


def _first_call(run: Run) -> bool:
    return run.header.recipe.get("method") == FirstCall.method


def describe(run: Run) -> str:
    """A run in one line, for a list to choose from: method, density, and settings other than the method's defaults."""
    recipe = run.header.recipe
    usual, first = _defaults(recipe), [key for key in ("method", "density") if key in recipe]
    others = [key for key, value in recipe.items() if key not in first and value != usual.get(key)]
    words = ", ".join(f"{key} {recipe[key]}" for key in (*first, *others))
    return f"{run.header.run_id}: {run.header.model}, {words}, made {run.header.created}"


def _defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The method's recipe of this density; {} where this release does not know it."""
    method = recipe.get("method")
    if not isinstance(method, str) or method not in RECIPES:
        return {}
    try:  # a store may say anything
        return recipe_for(method, density=recipe.get("density")).to_json()
    except RecipeError:
        return {}
