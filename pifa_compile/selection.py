"""Which compression run a graph is served from: exactly one, never a mixture, never another density than asked for."""

from __future__ import annotations

from collections.abc import Sequence

from pifa_compile.errors import AmbiguousRunError
from pifa_compile.options import Settings
from pifa_compile.store import Run, Store


def choose_run(store: Store, digests: Sequence[str], settings: Settings) -> Run | None:
    """The run for weights with these content digests, or None if none fits.

    A run that is named is taken. With a density (and method), a run fits if it has exactly that density and knows
    every weight, as factors or as left dense. Without one, the run that knows most of the weights fits. Raises
    AmbiguousRunError when several fit equally well.
    """
    if settings.run is not None:
        return store.run(settings.run)
    counted = [(run, sum(d in run.by_digest for d in digests)) for run in store.runs() if run.complete]
    most = len(digests) if settings.density is not None else max((count for _, count in counted), default=0)
    fitting = [run for run, count in counted if count and count == most and _asked_for(run, settings)]
    if len(fitting) > 1:
        raise AmbiguousRunError([describe(run) for run in fitting])
    return fitting[0] if fitting else None


def _asked_for(run: Run, settings: Settings) -> bool:
    if settings.density is None:
        return True
    recipe = run.header.recipe
    return recipe.get("density") == settings.density and settings.method in (None, recipe.get("method"))


def describe(run: Run) -> str:
    """A run in one line, for a list to choose from."""
    recipe = {k: v for k, v in run.header.recipe.items() if k not in ("version", "seed") and v not in ([], {}, None)}
    words = ", ".join(f"{key} {value}" for key, value in recipe.items())
    return f"{run.header.run_id}: {run.header.model}, {words}, made {run.header.created}"
