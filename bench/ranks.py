"""What each layer of a run keeps, as a picture: python bench/ranks.py RUN OUT.png [--store DIR].

A cell per layer: a row for every kind of layer (the last part of its name), a column for every block, in it the density
that the layer keeps and its rank. Layers that share a factorization show what they keep together. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import matplotlib

from pifa_compile.store import LayerRecord, Run, Store

matplotlib.use("Agg")
from matplotlib import pyplot


def cells(run: Run) -> tuple[list[str], list[str], dict[tuple[str, str], LayerRecord]]:
    """Kinds and blocks in the order in which they come, and the record at each crossing that there is."""
    found: dict[tuple[str, str], LayerRecord] = {}
    for record in run.layers:
        for name, _ in record.layers:
            number = re.search(r"\.(\d+)\.", name)
            if number is not None:
                kind = name[number.end() :]
                block = f"{name[: number.start()].rpartition('.')[2]} {number[1]}"
                found[kind, block] = record
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    blocks = sorted({block for _, block in found}, key=lambda b: (b.split()[0], int(b.split()[1])))
    return kinds, blocks, found


def draw(run: Run, out: Path) -> None:
    """Write the picture; the file's ending chooses the format."""
    kinds, blocks, found = cells(run)
    density = [
        [r.numbers / r.dense_numbers if (r := found.get((kind, block))) else float("nan") for block in blocks]
        for kind in kinds
    ]
    figure, axes = pyplot.subplots(figsize=(2.6 + 0.8 * len(blocks), 1.4 + 0.45 * len(kinds)), layout="constrained")
    image = axes.imshow(density, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (kind, block), record in found.items():
        words = f"{record.rank}{'*' if record.members else ''}" if record.object else "dense"
        light = record.numbers / record.dense_numbers < 0.6
        place = blocks.index(block), kinds.index(kind)
        axes.text(*place, words, ha="center", va="center", fontsize=8, color="white" if light else "black")
    axes.set_xticks(range(len(blocks)), blocks, rotation=45, ha="right")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_title(f"{run.run_id}\nranks (* shared by layers that are joined)", fontsize=9)
    figure.colorbar(image, label="share of numbers kept")
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="The ranks of a run, as a picture.")
    parser.add_argument("run", help="id of the run, or its beginning")
    parser.add_argument("out", type=Path, help="picture to write, .png or .svg")
    parser.add_argument("--store", type=Path, help="directory of the compression cache")
    options = parser.parse_args()
    draw(Store(options.store).run(options.run), options.out)


if __name__ == "__main__":
    main()
