"""One compression run as a page to look at: its layers as charts and a table, and how good the model still is with it.

    run_data(run, store) -> render_run_page(data) -> a file

The data is plain JSON; the page (run_page.html) is one file that refers to nothing outside and shows names as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pifa_compile.pages import fill
from pifa_compile.reports import run_summary
from pifa_compile.store import Evaluation, LayerRecord, Run, Store

#: Figures that a chart is drawn of, the best first; for those of LESS, less is better.
FIGURES = ("perplexity", "mean_cosine")
LESS = ("perplexity", "excess")


def run_data(run: Run, store: Store) -> dict[str, Any]:
    """All that the page shows of a run; evaluations are those of all runs of the same model in the store.

    run      the header, and what it came to: complete, densities, totals
    layers   in the order of the model. kind: what a layer is called in its block; error: rounding of the factors;
             bytes_before: of the dense weight, None if its dtype is not known
    weights  whether errors are of the weights (a method without data) or of the outputs
    curves   figure by figure: what each evaluated run reached, and the dense model; the most telling first
    """
    header = run.header
    kinds = kinds_of(list(run.by_name))
    facts = run_summary(run) | {"density_all": run.density_all, "layers_planned": header.layers_planned}
    return {
        "run": header.to_json() | facts,
        "weights": header.calibration is None,
        "layers": [_layer(record, kinds) for record in in_model_order(run.layers)],
        "curves": _curves(run, store),
    }


def render_run_page(data: dict[str, Any]) -> str:
    """The page of ``run_data``."""
    return fill(Path(__file__).with_name("run_page.html"), data)


# --- layers ----------------------------------------------------------------------------------------------------------


def in_model_order(records: Sequence[LayerRecord]) -> list[LayerRecord]:
    """Records by block, the first number in a name; those outside of blocks last, else as they were compressed.

    A run has what stays dense by a rule before everything else.
    """
    stacks: dict[str, int] = {}

    def place(record: LayerRecord) -> tuple[int, int]:
        prefix, number, _ = _parts(_first(record))
        return (len(records), 0) if number is None else (stacks.setdefault(prefix, len(stacks)), number)

    return sorted(records, key=place)


def kinds_of(names: Sequence[str]) -> dict[str, str]:
    """What each layer is called in its block: the last part of its name, or as many as tell it from its neighbours."""
    parts = {name: _parts(name) for name in names}
    length = dict.fromkeys(names, 1)
    while True:
        kinds = {name: ".".join(rest[-length[name] :]) for name, (_, _, rest) in parts.items()}
        seen: dict[tuple[str, int | None, str], int] = {}
        for name, (prefix, number, _) in parts.items():
            place = (prefix, number, kinds[name])
            seen[place] = seen.get(place, 0) + 1
        ambiguous = {kind for (_, _, kind), count in seen.items() if count > 1}
        longer = [name for name in names if kinds[name] in ambiguous and length[name] < len(parts[name][2])]
        if not longer:
            return kinds
        for name in longer:
            length[name] += 1


def _parts(name: str) -> tuple[str, int | None, list[str]]:
    """The stack of blocks that a layer is in ("model.layers."), the number of its block, what is left of its name.

    What is left of a block that is itself a layer is the name of the stack; "linear" if it has none.
    """
    found = re.match(r"((?:.*?\.)?)([0-9]{1,9})(?:\.|$)", name)
    if found is None:
        return "", None, name.split(".")
    rest = name[found.end() :] or found[1].rstrip(".").rpartition(".")[2] or "linear"
    return found[1], int(found[2]), rest.split(".")


def _first(record: LayerRecord) -> str:
    return record.layers[0][0]


def _layer(record: LayerRecord, kinds: Mapping[str, str]) -> dict[str, Any]:
    m, n = record.shape
    return {
        "name": record.name,
        "kind": "+".join(kinds[name] for name, _ in record.layers),
        "block": _parts(_first(record))[1],
        "m": m,
        "n": n,
        "form": record.form,
        "rank": record.rank if record.object is not None else None,
        "numbers": record.numbers,
        "density": record.numbers / (m * n) if m * n else 1.0,
        "bytes": record.bytes,
        "bytes_before": _dense_bytes(record),
        "truncation": record.truncation,
        "least_error": record.least_error,
        "error": record.error,
        "seconds": record.seconds,
        "reason": record.reason,
        "members": [[member.name, member.m] for member in record.members],
        "details": record.details,
    }


def _dense_bytes(record: LayerRecord) -> int | None:
    if record.object is None:
        return record.bytes
    name = record.details.get("dtype")
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return record.dense_numbers * dtype.itemsize if isinstance(dtype, torch.dtype) else None


# --- quality ---------------------------------------------------------------------------------------------------------


def _curves(run: Run, store: Store) -> list[dict[str, Any]]:
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for other, evaluation in _evaluations(run, store):
        for figure, value in evaluation.figures.items():
            if figure in evaluation.dense:
                curve = found.setdefault((figure, *evaluation.key), _curve(figure, evaluation))
                curve["points"].append(_point(other, evaluation, value) | {"own": other.run_id == run.run_id})
                if other.run_id == run.run_id:
                    curve["dense"] = evaluation.dense[figure]
    for curve in found.values():
        curve["points"].sort(key=lambda point: (point["density"], point["run"]))
    return sorted(found.values(), key=_telling)


def _evaluations(run: Run, store: Store) -> Iterator[tuple[Run, Evaluation]]:
    """Of all runs of the run's model."""
    for other in store.runs():
        if other.run_id == run.run_id or same_model(run, other):
            for evaluation in store.evaluations(other.run_id):
                yield other, evaluation


def same_model(a: Run, b: Run) -> bool:
    """Whether all layers of the run that has fewer of them are layers of the other, by their content."""
    few, many = sorted((a, b), key=lambda run: len(run.by_name))
    weights = [digests.values() for record in few.layers for _, digests in record.layers if digests]
    return bool(weights) and all(any(d in many.by_digest for d in digests) for digests in weights)


def _curve(figure: str, evaluation: Evaluation) -> dict[str, Any]:
    known = {key: getattr(evaluation, key) for key in ("text", "protocol", "dtype")}
    return known | {"figure": figure, "less": figure in LESS, "dense": evaluation.dense[figure], "points": []}


def _point(run: Run, evaluation: Evaluation, value: float) -> dict[str, Any]:
    recipe = run.header.recipe
    method, form = str(recipe.get("method", "")), recipe.get("form")
    return {
        "run": run.run_id,
        "method": f"{method}, pair" if form == "pair" else method,
        "density": evaluation.density,
        "model_density": evaluation.model_density,
        "value": value,
        "created": evaluation.created,
    }


def _telling(curve: dict[str, Any]) -> tuple[bool, int]:
    """Curves that the run itself is on first, and those of the figures that say most."""
    figure = curve["figure"]
    rank = FIGURES.index(figure) if figure in FIGURES else len(FIGURES)
    return not any(point["own"] for point in curve["points"]), rank
