"""A run as a picture: what each layer keeps, and what that costs it.

Needs matplotlib (the extra ``plot``), which is imported when something is drawn.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pifa_compile.errors import InputError
from pifa_compile.store import LayerRecord, Run

ENDINGS = (".png", ".svg", ".pdf")


def plot_run(run: Run, out: Path) -> Path:
    """Write the picture of a run; the file's ending chooses the format.

    Above, a cell per layer, a row for every kind of layer and a column for every block: the density that it keeps and
    its rank. Layers that share a factorization show what they keep together. Below, the error of every layer's weight
    beside the least at its rank. Raises InputError for other endings, and without matplotlib.
    """
    if out.suffix not in ENDINGS:
        raise InputError(f"cannot draw {out}: its name must end in {', '.join(ENDINGS)}")
    kinds, blocks, found = cells(run)
    if not found:
        raise InputError(f"run {run.run_id} has no layers in numbered blocks, which a picture is made of")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install 'pifa-compile[plot]'") from error
    height = 1.4 + 0.45 * len(kinds)
    figure = Figure(figsize=(max(7.0, 2.6 + 0.8 * len(blocks)), height + 3), layout="constrained")
    above, below = figure.subplots(2, height_ratios=(height, 3))
    _draw_ranks(figure, above, run, kinds, blocks, found)
    _draw_errors(below, run)
    figure.savefig(out, dpi=150)
    return out


def cells(run: Run) -> tuple[list[str], list[str], dict[tuple[str, str], LayerRecord]]:
    """Kinds and blocks in the order in which they come, and the record at each crossing that there is."""
    found: dict[tuple[str, str], LayerRecord] = {}
    for record in run.layers:
        for name, _ in record.layers:
            path = f".{name}"  # a name may begin with the number
            number = re.search(r"\.(\d+)\.", path)
            if number is not None:
                kind = path[number.end() :]
                block = f"{path[: number.start()].rpartition('.')[2]} {number[1]}".strip()
                found[kind, block] = record
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    blocks = sorted({block for _, block in found}, key=lambda b: (b.split()[:-1], int(b.split()[-1])))
    return kinds, blocks, found


def _draw_ranks(
    figure: Any, axes: Any, run: Run, kinds: list[str], blocks: list[str], found: dict[tuple[str, str], LayerRecord]
) -> None:
    density = [
        [r.numbers / r.dense_numbers if (r := found.get((kind, block))) else float("nan") for block in blocks]
        for kind in kinds
    ]
    image = axes.imshow(density, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (kind, block), record in found.items():
        words = f"{record.rank}{'*' if record.members else ''}" if record.object else "dense"
        light = record.numbers / record.dense_numbers < 0.6
        place = blocks.index(block), kinds.index(kind)
        axes.text(*place, words, ha="center", va="center", fontsize=8, color="white" if light else "black")
    axes.set_xticks(range(len(blocks)), blocks, rotation=45, ha="right")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_title(f"{run.run_id}\nranks (* shared by layers that are joined)", fontsize=9)
    figure.colorbar(image, ax=axes, label="share of numbers kept")


def _draw_errors(axes: Any, run: Run) -> None:
    factored = [record for record in run.layers if record.object is not None]
    places = range(len(factored))
    achieved = [record.truncation for record in factored]
    least = [record.least_error for record in factored]
    for values, marker, label in ((achieved, "o", "achieved"), (least, "_", "least at this rank")):
        known = [(i, v) for i, v in zip(places, values, strict=True) if v]
        axes.plot([i for i, _ in known], [v for _, v in known], marker, label=label)
    axes.set_xlabel("factored layer, in the order of the model")
    axes.set_ylabel("relative error of the weight")
    axes.set_ylim(bottom=0)
    axes.legend()
