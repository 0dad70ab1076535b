"""What differs between two compression runs: settings, layers and totals, the largest change first.

Layers are matched by name, what is left by content. Where one run has some layers in one factorization and the other
has them apart, the records of all of them stand beside each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from pifa_compile.store import LayerRecord, Run

#: Of a run's header, what is no setting: the name, and when.
_OWN = ("run_id", "created", "layers_planned")


@dataclass(frozen=True)
class Side:
    """One run's records of the same layers; mostly a single one, and then every list has one entry."""

    records: tuple[LayerRecord, ...]

    @property
    def numbers(self) -> int:
        return sum(record.numbers for record in self.records)

    @property
    def truncation(self) -> float | None:
        """The largest; a layer that stays dense has none, and loses nothing."""
        return max((record.truncation for record in self.records if record.truncation is not None), default=None)

    def to_json(self) -> dict[str, Any]:
        """JSON types only."""
        names = ("form", "rank", "numbers", "bytes", "truncation", "least_error", "error", "reason", "object")
        return {"names": [r.name for r in self.records]} | {
            name: [getattr(record, name) for record in self.records] for name in names
        }

    def facts(self) -> list[dict[str, Any]]:
        """What two runs must share to be equal: all but the time that it took, and names beside content."""
        skipped = ("name", "seconds")
        return [{k: v for k, v in record.to_json().items() if k not in skipped} for record in self.records]


@dataclass(frozen=True)
class Pair:
    """The same layers in both runs. ``weights``: "same", "casts" (of one another), or "other"."""

    name: str
    weights: str
    a: Side
    b: Side

    @property
    def equal(self) -> bool:
        return self.a.facts() == self.b.facts()

    @property
    def change(self) -> tuple[int, float]:
        """How large it is, for sorting: in numbers kept, then in what is lost."""
        lost = abs((self.b.truncation or 0.0) - (self.a.truncation or 0.0))
        return abs(self.b.numbers - self.a.numbers), lost

    def to_json(self) -> dict[str, Any]:
        """JSON types only."""
        sides = {"a": self.a.to_json(), "b": self.b.to_json()}
        return {"name": self.name, "weights": self.weights, "equal": self.equal} | sides


@dataclass(frozen=True)
class Difference:
    """Two runs beside each other.

    settings  of recipe and provenance that differ: by name, in a and in b; None where a run has no such field
    layers    that both runs have, the largest change first
    only      names of the layers that only a, and only b has
    """

    a: Run
    b: Run
    settings: dict[str, tuple[Any, Any]]
    layers: tuple[Pair, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def equal(self) -> bool:
        """Whether settings, layers and factors are the same; times and names do not count."""
        return not (self.settings or any(self.only)) and all(pair.equal for pair in self.layers)

    @property
    def warning(self) -> str | None:
        """That the runs are not of the same weights, in words."""
        counts = {kind: sum(pair.weights == kind for pair in self.layers) for kind in ("same", "casts", "other")}
        if not self.layers:
            return "the runs have no layer in common, neither by name nor by content: they are of different models"
        if counts["other"]:
            some = f"{counts['other']} of {len(self.layers)} layers that are called the same have other weights"
            return f"{some}: the runs are of different models, compared by name"
        if counts["casts"]:
            return "the weights are the same, but for the dtype of the model that was compressed"
        return None

    def to_json(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "equal": self.equal,
            "warning": self.warning,
            "same_weights": all(pair.weights == "same" for pair in self.layers) and not any(self.only),
            "a": {"run": self.a.run_id, "model": self.a.header.model} | totals(self.a),
            "b": {"run": self.b.run_id, "model": self.b.header.model} | totals(self.b),
            "settings": {name: list(values) for name, values in self.settings.items()},
            "layers": [pair.to_json() for pair in self.layers],
            "only_a": list(self.only[0]),
            "only_b": list(self.only[1]),
        }

    def __str__(self) -> str:
        heads = [f"{mark} {run.run_id}: {run.header.model}, made {run.header.created}{_state(run)}"
                 for mark, run in (("A", self.a), ("B", self.b))]  # fmt: skip
        same = "same weights" if self.layers and not self.warning else None
        parts = ["\n".join([*heads, f"warning: {self.warning}" if self.warning else same or ""]).rstrip()]
        if self.equal:
            return "\n\n".join([*parts, "no difference"])
        if self.settings:
            rows = [[name, *map(_text, values)] for name, values in self.settings.items()]
            parts.append(tabulate(rows, ["setting", "A", "B"], "simple", disable_numparse=True))
        parts += [_totals(self.a, self.b), *self._layer_table()]
        parts += [f"only in {mark}: {', '.join(names)}" for mark, names in zip("AB", self.only, strict=True) if names]
        return "\n\n".join(parts)

    def _layer_table(self) -> Iterator[str]:
        changed = [pair for pair in self.layers if not pair.equal]
        if changed:
            heads = ["layer", "form", "rank", "kept", "change", "truncation", "least", "why"]
            align = ["left", "left", *["right"] * 5, "left"]
            rows = [_row(pair) for pair in changed]
            yield tabulate(rows, heads, "simple", disable_numparse=True, colalign=align)
        if unchanged := len(self.layers) - len(changed):
            yield f"{unchanged} {'layer is' if unchanged == 1 else 'layers are'} the same in both"


def compare(a: Run, b: Run) -> Difference:
    """What differs between two runs, of one model or of two."""
    layers, only = _match(a, b)
    return Difference(
        a=a,
        b=b,
        settings=_changes(_settings(a), _settings(b)),
        layers=tuple(sorted(layers, key=lambda pair: pair.change, reverse=True)),
        only=only,
    )


# --- settings --------------------------------------------------------------------------------------------------------


def _settings(run: Run) -> dict[str, Any]:
    """Recipe and provenance, a line for each field of an object."""
    found: dict[str, Any] = {"finished": run.complete}
    for name, value in run.header.to_json().items():
        if name == "recipe":
            found |= {f"recipe: {key}": field for key, field in value.items()}
        elif isinstance(value, dict):
            found |= {f"{name}: {key}": field for key, field in value.items()}
        elif name not in _OWN:
            found[name] = value
    return found


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}


# --- layers ----------------------------------------------------------------------------------------------------------


def _match(a: Run, b: Run) -> tuple[list[Pair], tuple[tuple[str, ...], tuple[str, ...]]]:
    partner = _partners(a, b)
    pairs = []
    for records_a, records_b in _components(a, b, partner):
        sides = Side(records_a), Side(records_b)
        pairs.append(Pair(" & ".join(record.name for record in records_a), _weights(*sides, partner), *sides))
    missing = tuple(name for name in a.by_name if name not in partner)
    found = set(partner.values())
    return pairs, (missing, tuple(name for name in b.by_name if name not in found))


def _partners(a: Run, b: Run) -> dict[str, str]:
    """The layer of b for each layer of a that has one: of the same name, else of the same content."""
    partner = {name: name for name in a.by_name if name in b.by_name}
    free: dict[str, list[str]] = {}
    for name, digests in _layers(b):
        if name not in partner:
            for digest in set(digests.values()):
                free.setdefault(digest, []).append(name)
    taken: set[str] = set()
    for name, digests in _layers(a):
        if name not in partner:
            found = next((n for d in digests.values() for n in free.get(d, ()) if n not in taken), None)
            if found is not None:
                partner[name] = found
                taken.add(found)
    return partner


def _layers(run: Run) -> Iterator[tuple[str, dict[str, str]]]:
    for record in run.layers:
        yield from record.layers


def _components(
    a: Run, b: Run, partner: Mapping[str, str]
) -> Iterator[tuple[tuple[LayerRecord, ...], tuple[LayerRecord, ...]]]:
    """Records of a and of b that tell of the same layers, as few together as can be, in the order of a."""
    back = {theirs: ours for ours, theirs in partner.items()}
    seen: set[str] = set()
    for first in a.layers:
        if first.name in seen:
            continue
        ours, theirs = {first.name: first}, dict[str, LayerRecord]()
        todo: list[tuple[LayerRecord, Run, Mapping[str, str], dict[str, LayerRecord]]] = [(first, b, partner, theirs)]
        while todo:
            record, other, across, found = todo.pop()
            for name in (across[name] for name, _ in record.layers if name in across):
                new = other.by_name[name]
                if new.name not in found:
                    found[new.name] = new
                    todo.append((new, a, back, ours) if other is b else (new, b, partner, theirs))
        seen |= ours.keys()
        if theirs:
            yield tuple(ours.values()), tuple(theirs.values())


def _weights(a: Side, b: Side, partner: Mapping[str, str]) -> str:
    """How the weights of matched layers compare; the worst of several."""
    theirs = {name: digests for record in b.records for name, digests in record.layers}
    found = {
        _compared(digests, theirs[partner[name]])
        for record in a.records
        for name, digests in record.layers
        if name in partner
    }
    return next(kind for kind in ("other", "casts", "same") if kind in found)


def _compared(a: Mapping[str, str], b: Mapping[str, str]) -> str:
    if a == b:
        return "same"
    return "casts" if set(a.values()) & set(b.values()) else "other"


# --- text ------------------------------------------------------------------------------------------------------------


def _state(run: Run) -> str:
    return "" if run.complete else " (unfinished)"


def _text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or "none"
    return json.dumps(value)


def totals(run: Run) -> dict[str, Any]:
    """Counts and sums of a run; layers of groups are counted one by one, dense layers included in the sums."""
    sums = run.totals._asdict()
    return sums | {"density": run.density, "density_all": run.density_all}


def _totals(a: Run, b: Run) -> str:
    found = totals(a), totals(b)
    rows = [
        [title, *(show(side[key]) for side in found), _signed(found[1][key] - found[0][key], show)]
        for title, key, show in _TOTALS
    ]
    align = ["left", "right", "right", "right"]
    return tabulate(rows, ["total", "A", "B", "change"], "simple", disable_numparse=True, colalign=align)


def _count(x: float) -> str:
    return f"{x:,}"


_TOTALS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("layers", "layers", _count),
    ("as PIFA", "pifa", _count),
    ("as a pair", "pair", _count),
    ("left dense", "dense", _count),
    ("numbers, dense", "dense_numbers", _count),
    ("numbers kept", "numbers", _count),
    ("density of replaced layers", "density", lambda x: f"{x:.4f}"),
    ("density of all", "density_all", lambda x: f"{x:.4f}"),
    ("bytes", "bytes", _count),
    ("seconds", "seconds", lambda x: f"{x:.1f}"),
)


def _signed(change: Any, show: Callable[[Any], str]) -> str:
    return f"{'+' if change > 0 else ''}{show(change)}" if change else "0"


def _row(pair: Pair) -> list[str]:
    sides = pair.a.records, pair.b.records
    form, rank, kept, *errors, why = (_beside(*(_together(map(show, side)) for side in sides)) for show in _COLUMNS)
    change = _signed(pair.b.numbers - pair.a.numbers, _count)
    return [pair.name, form, rank, kept, change, *errors, why]


_COLUMNS: tuple[Callable[[LayerRecord], str], ...] = (
    lambda r: r.form,
    lambda r: "" if r.object is None else str(r.rank),
    lambda r: _count(r.numbers),
    lambda r: _error(r.truncation),
    lambda r: _error(r.least_error),
    lambda r: r.reason or "",
)


def _together(cells: Iterable[str]) -> str:
    """Of several records; what all of them say is said once."""
    found = list(filter(None, cells))
    return found[0] if len(set(found)) == 1 else " & ".join(found)


def _beside(a: str, b: str) -> str:
    return a if a == b else f"{a or '-'} -> {b or '-'}"


def _error(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}"
