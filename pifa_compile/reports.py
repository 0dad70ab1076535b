"""What a compression run did, as data and as text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from pifa_compile.store import LayerRecord, Run


@dataclass(frozen=True)
class CompressionReport:
    """The finished run, the store it lies in, and how many numbers the whole model has."""

    run: Run
    store: Path
    model_numbers: int

    @property
    def run_id(self) -> str:
        return self.run.header.run_id

    def summary(self) -> dict[str, Any]:
        """The figures of the run, and the density of the whole model beside that of its replaced layers."""
        facts = run_summary(self.run)
        kept = self.model_numbers - facts["numbers_before"] + facts["numbers_after"]
        whole = {"model_numbers": self.model_numbers, "model_density": kept / self.model_numbers}
        return facts | whole | {"store": str(self.store)}

    def __str__(self) -> str:
        facts = self.summary()
        whole = f"whole model: {facts['model_density']:.4f} of {facts['model_numbers']:,} numbers"
        return f"{render_run(self.run)}\n{whole}\nstore: {self.store}"


def run_summary(run: Run) -> dict[str, Any]:
    """The figures of a run as JSON: layers, numbers and bytes of the replaced layers, achieved density.

    Layers that were factored together count one by one. ``seconds`` went into factors; calibration is not among them.
    """
    taken = [r for r in run.layers if r.object is not None]
    before = sum(r.shape[0] * r.shape[1] for r in taken)
    after = sum(r.numbers for r in taken)
    return {
        "run": run.header.run_id,
        "model": run.header.model,
        "recipe": run.header.recipe,
        "complete": run.complete,
        "layers": run.totals.layers,
        "replaced": sum(len(r.layers) for r in taken),
        "numbers_before": before,
        "numbers_after": after,
        "density": after / before if before else None,
        "bytes": sum(r.bytes for r in taken),
        "seconds": sum(r.seconds for r in run.layers),
    }


_SORT_KEYS = {
    "name": lambda r: r.name,
    "rank": lambda r: r.rank,
    "error": lambda r: -(r.truncation or 0.0),
    "numbers": lambda r: -r.numbers,
}
SORTS = tuple(_SORT_KEYS)


def render_run(run: Run, sort: str | None = None) -> str:
    """A table of the run's layers, in the order of the walk or sorted by one of SORTS, and a summary line."""
    layers = sorted(run.layers, key=_SORT_KEYS[sort]) if sort else list(run.layers)
    headers = ["layer", "m x n", "form", "rank", "kept", "density", "truncation", "rounding", "why not"]
    align = ["left", "left", "left", *["right"] * 5, "left"]
    colalign = align if layers else None
    table = tabulate([_row(r) for r in layers], headers, "simple", disable_numparse=True, colalign=colalign)
    facts = run_summary(run)
    share = f" keep {facts['density']:.4f} of their {facts['numbers_before']:,} numbers" if facts["replaced"] else ""
    state = "" if run.complete else f" (unfinished: {facts['layers']} of {run.header.layers_planned} layers)"
    line = f"run {facts['run']}{state}: {facts['replaced']} of {facts['layers']} linear layers replaced{share}"
    of, after = ("weight", "") if run.header.calibration is None else ("outputs", " after calibration")
    errors = f"truncation: relative error of the {of} at this rank; rounding: of the factors beside the low-rank weight"
    legend = f"{errors}\n" if facts["replaced"] else ""
    return f"{table}\n\n{legend}{line}, {facts['bytes'] / 1e6:.1f} MB, factored in {facts['seconds']:.1f} s{after}"


def _row(r: LayerRecord) -> list[str]:
    m, n = r.shape
    if r.object is None:
        return [r.name, f"{m} x {n}", "dense", "", f"{m * n:,}", "1.000", "", "", r.reason or ""]
    size = [f"{r.numbers:,}", f"{r.numbers / (m * n):.3f}"]
    errors = [f"{x:.1e}" if x is not None else "" for x in (r.truncation, r.error)]
    return [r.name, f"{m} x {n}", r.form, str(r.rank), *size, *errors, r.reason or ""]
