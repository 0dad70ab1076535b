"""The tile tables: which launch configurations of a template to try on which device, and why.

One JSON file per device in ``tiles/``, named after the device; ``safe.json`` serves those that have none. A row says
for which dtypes and token counts it holds and carries its reason: an argument, or a measurement with card, dtype and
shape. N = number of tokens.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pifa_compile.cost import Profile

FOLDER = Path(__file__).with_name("tiles")
SAFE = "safe"
EARLY = "early"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Span:
    """For which calls a row holds: the dtypes of x, and token counts from ``first`` to ``last`` (None: no end)."""

    dtypes: tuple[str, ...]
    first: int
    last: int | None

    def holds(self, dtype: str, tokens: int) -> bool:
        return dtype in self.dtypes and self.first <= tokens and (self.last is None or tokens <= self.last)

    def to_json(self) -> dict[str, Any]:
        """Its part of a row of a file."""
        return {"dtypes": list(self.dtypes), "tokens": [self.first, self.last]}


@dataclass(frozen=True)
class Tile:
    """A launch configuration of one template: its constants, warps per program and pipeline stages.

    ``early``: programs start while the kernel ahead still runs, and wait before they read what it writes (programmatic
    dependent launch); of a first half, that it lets those of the second half start.
    """

    template: str
    span: Span
    constants: Mapping[str, int]
    warps: int
    stages: int
    reason: str
    early: bool = False

    def to_json(self) -> dict[str, Any]:
        """The row of a file."""
        shape = {"constants": dict(self.constants), "warps": self.warps, "stages": self.stages}
        early = {"early": True} if self.early else {}
        return {"template": self.template} | self.span.to_json() | shape | early | {"reason": self.reason}


@dataclass(frozen=True)
class FormRow:
    """Which form (of ``kernel_forms.py``) is the fastest for some calls; rank / min(m, n) is within ``rank_share``."""

    form: str
    span: Span
    rank_share: tuple[float, float]
    reason: str

    def to_json(self) -> dict[str, Any]:
        """The row of a file."""
        return {"form": self.form} | self.span.to_json() | {"rank_share": self.rank_share, "reason": self.reason}


@dataclass(frozen=True)
class Rates:
    """What a device can do at most: bytes and floating point operations per second; seconds per kernel launch."""

    bytes_per_second: float
    flop_per_second: Mapping[str, float]
    launch_seconds: float
    source: str

    def profile(self, device: str) -> Profile:
        """The same for the cost model: a device that is always as fast as it can be, and gathers as it copies."""
        rates = {dtype: {1: rate} for dtype, rate in self.flop_per_second.items()}
        return Profile(device, self.bytes_per_second, rates, math.inf, self.launch_seconds)


@dataclass(frozen=True)
class Table:
    """Everything that is known of one device.

    ``untried`` names templates that have not yet given right numbers on the device itself and are left out until then:
    those whose programs wait for each other, or that use TMA, of which a compiler and an interpreter say too little.
    ``EARLY`` among them stands for the early tiles of all templates.
    """

    device: str
    rates: Rates
    tiles: tuple[Tile, ...]
    forms: tuple[FormRow, ...]
    untried: tuple[str, ...] = ()

    def candidates(self, templates: tuple[str, ...] | list[str], dtype: str, tokens: int) -> list[Tile]:
        """The rows of some templates for one call, the preferred one first."""
        tried = [t for t in self.tiles if t.template in templates and self.has_tried(t)]
        return [t for t in tried if t.span.holds(dtype, tokens)]

    def has_tried(self, tile: Tile) -> bool:
        """Whether the device has given right numbers with such tiles."""
        return tile.template not in self.untried and not (tile.early and EARLY in self.untried)

    def form(self, dtype: str, tokens: int, rank_share: float) -> str | None:
        """The form that a row names for the call; None where no row does."""
        for row in self.forms:
            if row.span.holds(dtype, tokens) and row.rank_share[0] <= rank_share <= row.rank_share[1]:
                return row.form
        return None


def table_for(device: str) -> Table:
    """The table of a device by the name that its driver reports; an unknown one gets the safe rows and one warning."""
    if _FORCED:
        return _FORCED[-1]
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = FOLDER / f"{slug}.json"
    if not path.is_file():
        _warn_once(device)
        path = FOLDER / f"{SAFE}.json"
    return read(path)


@functools.cache
def _warn_once(device: str) -> None:
    known = sorted(p.stem for p in FOLDER.glob("*.json") if p.stem != SAFE)
    log.warning(
        "no tile table for %r (there are: %s): kernels run with safe tiles, which may be far from the fastest; "
        'options={"max_autotune": True} measures instead',
        device, ", ".join(known),
    )  # fmt: skip


@contextmanager
def use_table(table: Table) -> Iterator[None]:
    """Have ``table`` for every device, for measurements; compile caches do not know of it and must be off."""
    _FORCED.append(table)
    try:
        yield
    finally:
        _FORCED.pop()


_FORCED: list[Table] = []


@functools.cache
def read(path: Path) -> Table:
    """The table in a file."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Table(
        device=data["device"],
        rates=Rates(**data["rates"]),
        tiles=tuple(_tile(row) for row in data["tiles"]),
        forms=tuple(
            FormRow(row["form"], _span(row), (row["rank_share"][0], row["rank_share"][1]), row["reason"])
            for row in data["forms"]
        ),
        untried=tuple(data["untried"]),
    )


def write(table: Table) -> str:
    """The text of a table's file, a line per row."""
    head = {"device": table.device, "rates": asdict(table.rates), "untried": list(table.untried)}
    rows = {"tiles": [t.to_json() for t in table.tiles], "forms": [f.to_json() for f in table.forms]}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for key, found in rows.items():
        body = ",\n".join(f"    {json.dumps(row)}" for row in found)
        lines.append(f'  "{key}": [\n{body}\n  ]' if found else f'  "{key}": []')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _span(row: dict[str, Any]) -> Span:
    first, last = row["tokens"]
    return Span(tuple(row["dtypes"]), first, last)


def _tile(row: dict[str, Any]) -> Tile:
    shape = row["constants"], row["warps"], row["stages"]
    return Tile(row["template"], _span(row), *shape, row["reason"], row.get("early", False))
