"""Rows of a benchmark with the machine that they are of: as a table, as JSON, as plots."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from pifa_compile.errors import InputError
from pifa_compile.machine import device_name
from pifa_compile.plain_json import plain_json

Row = dict[str, Any]


@dataclass
class Report:
    """What one benchmark found; ``columns`` are shown in the table, the rows may know more."""

    title: str
    columns: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything, with machine, versions and revision."""
        return {"title": self.title, "machine": machine(), "notes": self.notes, "rows": self.rows}

    def save(self, path: Path) -> None:
        """Write ``to_json`` to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(plain_json(self.to_json()) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        body = [[_cell(row.get(column)) for column in self.columns] for row in self.rows]
        numeric = [any(isinstance(r.get(c), int | float) and not isinstance(r[c], bool) for r in self.rows)
                   for c in self.columns]  # fmt: skip
        align = ["right" if number else "left" for number in numeric]
        table = tabulate(body, list(self.columns), "simple", disable_numparse=True, colalign=align if body else None)
        return "\n".join([self.title, "", table, "", *self.notes])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def machine() -> dict[str, Any]:
    """Device, threads, versions, revision of the source tree (None outside of one) and time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = ("pifa-compile", "torch", "triton", "transformers")
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "revision": _revision(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _revision() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def plot(report: Report, folder: Path) -> list[Path]:
    """Three pictures of the rows of ``kernels``, each as PNG and as SVG: speed-up over dense by tokens and by density,
    and the roofline.

    Raises InputError without matplotlib (the extra ``plot``).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install 'pifa-compile[plot]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, draw in (("tokens", _by_tokens), ("density", _by_density), ("roofline", _roofline)):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        draw(figure.add_subplot(), report.rows)
        for kind in ("png", "svg"):
            made.append(folder / f"{name}.{kind}")
            figure.savefig(made[-1], dpi=150)
    return made


def _by_tokens(axes: Any, rows: Sequence[Row]) -> None:
    _speedup(axes, rows, "N", lambda row: f"{row['form']}, {row['dtype']}, density {row['density']:.2f}")
    axes.set(xscale="log", xlabel="tokens N")


def _by_density(axes: Any, rows: Sequence[Row]) -> None:
    _speedup(axes, rows, "density", lambda row: f"{row['form']}, {row['dtype']}, N {row['N']}")
    axes.set(xlabel="density: numbers kept of a dense weight's")


def _speedup(axes: Any, rows: Sequence[Row], key: str, label: Callable[[Row], str]) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["form"] != "dense":
            lines.setdefault(label(row), []).append((row[key], 1 / row["of dense"]))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=name, alpha=0.7, linewidth=0.7)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(ylabel="speed-up over dense")
    axes.legend(fontsize=7)


def _roofline(axes: Any, rows: Sequence[Row]) -> None:
    for form in sorted({row["form"] for row in rows}):
        points = [(row["flop"] / row["bytes"], row["flop"] / row["ms"] / 1e6) for row in rows if row["form"] == form]
        axes.plot(*zip(*points, strict=True), "o", label=form, alpha=0.7)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s")
    axes.legend(fontsize=7)
