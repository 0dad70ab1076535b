"""What a run leaves behind: rows as JSON, and the same as tables in Markdown. python -m bench.gpu.report ROWS.json
draws pictures of them beside, with matplotlib."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def about(device: str) -> dict[str, Any]:
    """Card, versions and revision."""
    facts: dict[str, Any] = {"device": device, "python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "card": properties.name,
            "memory GB": properties.total_memory / 1e9,
            "processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    else:
        facts["card"] = platform.processor() or platform.machine()
    return facts | {"revision": _revision()}


def _revision() -> str:
    """The commit of this tree, where git knows it."""
    git = shutil.which("git")
    if git is None or "PIFA_REVISION" in os.environ:  # a tree may be measured where its history is not
        return os.environ.get("PIFA_REVISION", "unknown")
    command = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def folder(root: Path, facts: dict[str, Any]) -> Path:
    """The directory of a card's results."""
    made = root / (re.sub(r"[^a-z0-9]+", "-", str(facts["card"]).lower()).strip("-") or "unknown")
    made.mkdir(parents=True, exist_ok=True)
    return made


def kept(where: Path, facts: dict[str, Any]) -> dict[str, list[Row]]:
    """The sections that the same revision left of the same card and torch; nothing of any other."""
    path = where / "rows.json"
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    same = all(data["about"].get(key) == facts[key] for key in ("card", "torch", "revision"))
    sections: dict[str, list[Row]] = data["sections"] if same else {}
    return sections


def write(where: Path, facts: dict[str, Any], sections: dict[str, list[Row]], left_out: list[str]) -> None:
    """Everything so far; called after each section, so that a run that is cut off leaves what it had."""
    data = {"about": facts, "sections": sections, "left out": left_out}
    (where / "rows.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    lines = ["# Measurements", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    for title, rows in sections.items():
        lines += [f"## {title}", "", *_table(rows), ""]
    lines += ["Left out for want of time: " + "; ".join(left_out)] if left_out else []
    (where / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _table(rows: list[Row]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict)))
    if not columns:
        return ["nothing"]
    text = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return text + ["| " + " | ".join(_cell(row.get(key, "")) for key in columns) + " |" for row in rows]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


def plot(where: Path, rows: list[Row], title: str) -> None:
    """Time of each way over the number of tokens, one picture per layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if "us" in row]
    for key in dict.fromkeys((row["model"], row["layer"], row["dtype"]) for row in timed):
        chosen = [row for row in timed if (row["model"], row["layer"], row["dtype"]) == key]
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for way in dict.fromkeys(row["way"] for row in chosen):
            points = sorted((row["N"], row["us"]) for row in chosen if row["way"] == way)
            axes.plot(*zip(*points, strict=True), marker="o", label=way)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds", title=f"{title}: {', '.join(key)}")
        axes.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(where / (re.sub(r"[^a-z0-9]+", "-", f"{title} {' '.join(key)}".lower()) + ".png"), dpi=120)
        pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the rows of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, help="rows.json, as bench.gpu.run writes it")
    path = parser.parse_args(arguments).rows
    sections = json.loads(path.read_text(encoding="utf-8"))["sections"]
    for section in ("layers", "ranks"):
        plot(path.parent, sections.get(section, []), section)


if __name__ == "__main__":
    main()
