"""A card's table from measurements: its tiles in the order of their speed, without those that never were the fastest,
and the form that a whole block was fastest in. python -m bench.gpu.settle ROWS.json prints it."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pifa_compile.kernels.kernel_forms import BY_COST
from pifa_compile.kernels.tile_tables import EARLY, FormRow, Rates, Span, Table, Tile, table_for, write

Row = dict[str, Any]
#: A tile within so much of the fastest one is kept: two runs differ by that.
NEAR = 1.02


@dataclass(frozen=True)
class Settled:
    """A table, and why tiles are in it no more."""

    table: Table
    removed: tuple[str, ...]


@dataclass(frozen=True)
class _Result:
    """How one tile did in one contest: its time, and that over the time of the fastest."""

    row: Row
    relative: float

    def __str__(self) -> str:
        row = self.row
        count = f"{row['together']} of " if row["together"] > 1 else ""
        shape = f"{count}{row['m']}x{row['n']}, r = {row['r']}, N = {row['N']}"
        return f"{shape}: {row['us']:.1f} us, {self.relative:.2f} of the fastest"


def settle(table: Table, about: dict[str, Any], sections: dict[str, list[Row]]) -> Settled:
    """The table after all rows of a run."""
    tiles = [row for row in sections.get("tiles", []) if "tile" in row]
    settled = by_tiles(by_rates(table, about), tiles, about["card"])
    return replace(settled, table=by_forms(settled.table, sections.get("blocks", []), about["card"]))


def by_tiles(table: Table, rows: Sequence[Row], card: str) -> Settled:
    """The table after the rows of ``bench.gpu.tiles``; what was not measured stays, behind what was.

    A tile that was wrong goes, also where it was fast; one that could not be measured stays, as if it had not been, and
    one whose early twin stays, for where nothing can start early. A template (or EARLY) is untried no more when all
    that was measured of it is right.
    """
    wrong_rows = {_key(row["tile"]): row for row in rows if not row["ok"] and "error" in row}
    results = _results([row for row in rows if row["ok"] and _key(row["tile"]) not in wrong_rows])
    removed, kept = list[str](), list[tuple[tuple[Any, ...], Tile]]()
    for tile in table.tiles:
        key = _key(tile.to_json())
        wrong, found = wrong_rows.get(key), results[key]
        if wrong is not None:
            removed.append(f"{wrong['way']}, N = {wrong['N']}: an error of {wrong['error']:.2g}")
        elif found and not _near(found) and not _near(results[_early_key(tile)]):
            best = min(found, key=lambda result: result.relative)
            removed.append(f"{best.row['way']}: at best {best}")
        elif found:
            mean = math.exp(sum(math.log(result.relative) for result in found) / len(found))
            row = found[0].row
            place = (0, tile.span.first, row["launch"], mean)
            reason = f"{card}, {row['dtype']}: " + "; ".join(map(str, sorted(found, key=lambda r: r.relative)[:3]))
            kept.append((place, replace(tile, reason=reason)))
        else:
            kept.append(((1,), tile))
    tiles = tuple(tile for _, tile in sorted(kept, key=lambda pair: pair[0]))
    untried = tuple(name for name in table.untried if not _is_right([row for row in rows if _is_of(row, name)]))
    return Settled(replace(table, tiles=tiles, untried=untried), tuple(removed))


def _results(rows: Iterable[Row]) -> dict[str, list[_Result]]:
    """Of every tile, by ``_key``: how it did in each contest that it was in."""
    contests: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        names = ("m", "n", "r", "together", "N", "dtype", "launch")
        contests[tuple(row[name] for name in names)].append(row)
    found: dict[str, list[_Result]] = defaultdict(list)
    for contest in contests.values():
        fastest = min(row["us"] for row in contest)
        for row in contest:
            found[_key(row["tile"])].append(_Result(row, row["us"] / fastest))
    return found


def _key(tile: dict[str, Any]) -> str:
    """What makes a tile the same one, whatever the reason that is given for it."""
    return json.dumps({name: value for name, value in tile.items() if name != "reason"}, sort_keys=True)


def _early_key(tile: Tile) -> str:
    """The key of the same tile, started early."""
    return _key(replace(tile, early=True).to_json())


def _near(results: Sequence[_Result]) -> bool:
    """Whether a tile was the fastest somewhere, or all but."""
    return any(result.relative <= NEAR for result in results)


def _is_of(row: Row, name: str) -> bool:
    return bool(row["tile"].get("early", False) if name == EARLY else row["tile"]["template"] == name)


def _is_right(rows: Sequence[Row]) -> bool:
    return bool(rows) and all(row["ok"] for row in rows)


def by_forms(table: Table, rows: Sequence[Row], card: str) -> Table:
    """The table after blocks that ran in one form each: the fastest, from half way (of the logarithm) to the counts of
    tokens on either side that were measured too. The one that the cost prefers stays where it is not clearly slower."""
    measured: dict[int, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["ok"] and row.get("form"):
            measured[row["tokens"]][row["form"]] = row
    forms, first = [], 1
    counts = sorted(measured)
    for tokens, above in itertools.zip_longest(counts, counts[1:]):
        last = None if above is None else math.isqrt(tokens * above)
        ranked = sorted(measured[tokens].values(), key=_rank)
        times = ", ".join(f"{row['form']} {row['ms']:.3f} ms" for row in ranked)
        reason = f"{card}, {ranked[0]['dtype']}, {ranked[0]['model']}, N = {tokens}: {times}"
        span = Span(("float16", "bfloat16"), first, last)
        forms.append(FormRow(ranked[0]["form"], span, (0.0, 1.0), reason))
        first = (last or 0) + 1
    return replace(table, forms=tuple(forms) or table.forms)


def _rank(row: Row) -> float:
    return float(row["ms"]) / (NEAR if row["form"] == BY_COST[0] else 1.0)


def by_rates(table: Table, about: dict[str, Any]) -> Table:
    """The table with what the card was measured to do at most."""
    flop = {name: rate * 1e12 for name, rate in about["TFLOP/s"].items()}
    flop["tfloat32"] = flop.pop("float32")  # which is measured as a product that may round to it
    rates = Rates(
        about["TB/s"] * 1e12,
        {**table.rates.flop_per_second, **flop},
        about["launch us"] / 1e6,
        f"measured: a copy, large products, a small kernel in a CUDA graph; torch {about['torch']}",
    )
    return replace(table, device=about["card"], rates=rates)


def main(arguments: Sequence[str] | None = None) -> None:
    """Settle the rows of a run anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, help="rows.json, as bench.gpu.run writes it")
    data = json.loads(parser.parse_args(arguments).rows.read_text(encoding="utf-8"))
    settled = settle(table_for(data["about"]["card"]), data["about"], data["sections"])
    for line in settled.removed:
        print(line, file=sys.stderr)
    print(write(settled.table), end="")


if __name__ == "__main__":
    main()
