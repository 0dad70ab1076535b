"""Quality of every method and baseline over densities, measured in one way: python bench/quality.py MODEL [TEXT ...].

    python bench/quality.py MODEL validation.txt other.txt --calibration calibration.txt --json rows.json --plot r.svg
    python bench/quality.py MODEL validation.txt --calibration calibration.txt --table solver --densities 0.5625

Causal models: perplexity of each text. Encoders: 1 - mean cosine to the dense model's sentence embeddings; without a
text they are calibrated on docstrings of one half of the standard library's files and judged on the other half's.

--table names one of the tables of bench/tables.py. All but `methods` also judge on the last eighth of the calibration
text, which is not calibrated on then. Rows that are in the JSON file already are not computed again.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from baselines import BYTES_2_4, PRUNERS, STARTS, begin_with_, prune_
from tables import DEFAULTS, DENSITIES, METHODS, ORDER, Case
from tabulate import tabulate
from torch import nn

from pifa_compile.compression import compress
from pifa_compile.compression.blocks import Batch
from pifa_compile.compression.calibration import calibrate_on
from pifa_compile.digest import digest_many
from pifa_compile.layers import linear_weights
from pifa_compile.loading import is_causal, load_model
from pifa_compile.quality import Reading, ReadText, read_with, with_run
from pifa_compile.recipes import Calibrated
from pifa_compile.store import Run, Store
from pifa_compile.texts import read_text, standard_library_docstrings

#: Of the calibration text, the part at its end that DEFAULTS judge on.
HELD_OUT = 8
#: Relative differences below it are no difference.
TOLERANCE = 0.005

Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model, the texts that it is judged by as the dense model read them, and what it is calibrated on.

    start     what was done to the model after it had read the texts, one of STARTS
    identity  of model and texts, so that a row can be found again
    """

    model: nn.Module
    start: str
    tokenizer: Any
    texts: Mapping[str, ReadText]
    calibration: str | list[str] | None
    windows: int
    store: Store
    identity: str


def score(figures: Mapping[str, float]) -> float:
    """What is the less the better: perplexity, or 1 - mean cosine."""
    return figures["perplexity"] if "perplexity" in figures else 1 - figures["mean_cosine"]


def start_row(subject: Subject, name: str) -> Row:
    """The row of the dense model, or of what the compression begins with in its place."""
    facts: Row = {"case": name, "density": 1.0, "achieved": 1.0, "seconds": 0.0}
    return facts | _scores(subject, None if name == "dense" else subject.model)


def case_row(subject: Subject, name: str, case: Case, density: float) -> Row:
    """Compress or prune a copy of the model, and measure it; ``seconds`` are those of the first of the two."""
    started = time.perf_counter()
    facts: Row = {"case": name, "density": density}
    if case.kind is None:
        variant = copy.deepcopy(subject.model)
        error = prune_(variant, PRUNERS[name], _batches(subject))
        facts |= {"achieved": BYTES_2_4, "layer_error": error}
    else:
        recipe = case.recipe(density, subject.windows)
        seen: dict[str, Any] = {}
        if isinstance(recipe, Calibrated) and not case.own_text:
            seen = {"text": subject.calibration, "tokenizer": subject.tokenizer}
        run = compress(subject.model, recipe, store=subject.store, progress=False, **seen).run
        variant = with_run(subject.model, subject.store, run)
        facts |= {"achieved": _density(subject.model, run), "run": run.run_id, "recipe": recipe.to_json()}
    return facts | {"seconds": time.perf_counter() - started} | _scores(subject, variant)


def _batches(subject: Subject) -> tuple[Batch, ...]:
    size = {"windows": subject.windows, "length": 256}
    found = calibrate_on(subject.model, subject.calibration, subject.tokenizer, **size)
    return found.to(next(subject.model.parameters()).device).batches


def _density(model: nn.Module, run: Run) -> float:
    """Numbers kept over those of all layers that may be replaced, those that the allocation leaves dense among them."""
    weights = [w for w in linear_weights(model) if w.reason is None]
    records = {id(r): r for d in digest_many([w.parameter.detach() for w in weights]) for r in [run.by_digest[d]]}
    return sum(r.numbers for r in records.values()) / sum(r.dense_numbers for r in records.values())


def _scores(subject: Subject, variant: nn.Module | None) -> Row:
    """Scores by text and what they are above the dense model's, and all figures."""
    figures = {name: t.dense if variant is None else t.measure(variant) for name, t in subject.texts.items()}
    scores = {name: score(found) for name, found in figures.items()}
    excess = {name: value - score(subject.texts[name].dense) for name, value in scores.items()}
    return {"scores": scores, "excess": excess, "figures": figures}


# --- all rows ---------------------------------------------------------------------------------------------------------


def measure(
    subject: Subject, cases: Mapping[str, Case], densities: Sequence[float], file: Path | None, facts: Row
) -> list[Row]:
    """The rows of the cases at each density, the dense one first; those that the file has are taken from there.

    file   JSON with all rows ever made, written after every new one; None: nothing is kept
    facts  of this machine and these sources, added to the rows that are made
    """
    known = json.loads(file.read_text()) if file is not None and file.exists() else []
    kept: dict[str, Row] = {row["key"]: row for row in known}
    rows = []
    uncompressed = dict.fromkeys(["dense", subject.start])
    for name, case, density in [*((name, None, 1.0) for name in uncompressed), *_wanted(cases, densities)]:
        key = _key(subject, name, case, density)
        if key not in kept:
            row = start_row(subject, name) if case is None else case_row(subject, name, case, density)
            kept[key] = {"key": key} | row | {"made": facts}
            if file is not None:
                write_rows(file, list(kept.values()))
            print(f"{name} {density:g}: {kept[key]['scores']}, {row['seconds']:.1f} s", flush=True)
        rows.append(kept[key])
    return rows


def _wanted(cases: Mapping[str, Case], densities: Sequence[float]) -> list[tuple[str, Case, float]]:
    baselines = [(name, case, BYTES_2_4) for name, case in cases.items() if case.kind is None]
    return [(name, case, d) for d in densities for name, case in cases.items() if case.kind is not None] + baselines


def _key(subject: Subject, name: str, case: Case | None, density: float) -> str:
    """What a row follows from, as a digest."""
    recipe = case.recipe(density, subject.windows).to_json() if case is not None and case.kind is not None else None
    own = case is not None and case.own_text
    text = json.dumps([subject.identity, subject.windows, name, recipe, own], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_rows(file: Path, rows: list[Row]) -> None:
    """Write all rows at once, so that an interrupted process leaves the file whole."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(new, file)  # noqa: PTH105


# --- what is printed --------------------------------------------------------------------------------------------------


def render(rows: Sequence[Row], scale: str) -> str:
    """A table of rows; ``scale`` is what scores are called."""
    texts = list(rows[0]["scores"])
    heads = ["", "density", "achieved", *(f"{text}\n{word}" for text in texts for word in (scale, "excess")), "s"]
    body = [
        [r["case"], f"{r['density']:g}", f"{r['achieved']:.4f}"]
        + [f"{r[part][text]:.4f}" for text in texts for part in ("scores", "excess")]
        + [f"{r['seconds']:.1f}"]
        for r in rows
    ]
    align = ["left", *["right"] * (len(heads) - 1)]
    return tabulate(body, heads, "simple", disable_numparse=True, colalign=align)


def check_order(rows: Sequence[Row]) -> list[str]:
    """What is not in the order that ORDER expects, at each density and on each text, beyond TOLERANCE."""
    found = []
    by_place = {(r["case"], r["density"]): r["scores"] for r in rows}
    for density in sorted({d for _, d in by_place}, reverse=True):
        names = [name for name in ORDER if (name, density) in by_place]
        for better, worse in itertools.pairwise(names):
            for text, value in by_place[better, density].items():
                other = by_place[worse, density][text]
                if value > other * (1 + TOLERANCE):
                    found.append(f"{better} {value:.4f} is above {worse} {other:.4f} at density {density:g} on {text}")
    return found


def check_baselines(rows: Sequence[Row]) -> str | None:
    """Whether SparseGPT errs less than Wanda, and that less than magnitude, over all layers; None without the three."""
    errors = {r["case"]: r["layer_error"] for r in rows if "layer_error" in r}
    if len(errors) < len(PRUNERS):
        return None
    values = [errors[name] for name in reversed(PRUNERS)]
    words = " < ".join(f"{name} {errors[name]:.4f}" for name in reversed(PRUNERS))
    return f"summed layer output error, {words}: {'holds' if values == sorted(set(values)) else 'FAILS'}"


def plot(rows: Sequence[Row], scale: str, file: Path) -> None:
    """Excess over the dense model against density, a panel per text, as a picture of the kind that the name says."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    texts = list(rows[0]["excess"])
    figure, panels = pyplot.subplots(1, len(texts), figsize=(5 * len(texts), 4), squeeze=False, layout="constrained")
    for text, panel in zip(texts, panels[0], strict=True):
        for name in dict.fromkeys(r["case"] for r in rows if "recipe" in r or "layer_error" in r):
            points = sorted((r["achieved"], r["excess"][text]) for r in rows if r["case"] == name)
            panel.plot(*zip(*points, strict=True), "x" if len(points) == 1 else "o-", label=name, markersize=4)
        panel.set(title=text, xlabel="density", ylabel=f"{scale} above dense", yscale="symlog")
        panel.grid(alpha=0.3)
    panels[0][0].legend()
    figure.savefig(file)


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns 1 where the baselines are not in the order that their papers promise."""
    options = _parser().parse_intermixed_args(arguments)
    transformers.logging.disable_progress_bar()
    cases = METHODS if options.table == "methods" else DEFAULTS[options.table]
    cases = {name: case for name, case in cases.items() if not options.methods or name in options.methods}
    if missing := set(options.methods or ()) - set(cases):
        raise SystemExit(f"no case {', '.join(sorted(missing))} in table {options.table}")
    subject = open_subject(options)
    for name, text in subject.texts.items():
        print(f"{name}: {text.protocol}")
    densities = options.densities or (DENSITIES if options.table == "methods" else (BYTES_2_4, 0.4))
    rows = measure(subject, cases, densities, options.json, _facts(options))
    scale = "perplexity" if is_causal(subject.model) else "1 - cosine"
    own = "its own text" if is_causal(subject.model) else "docstrings of other files"
    print(f"\n{options.model}, {options.start}, calibrated on {options.calibration or own}\n")
    print(render(rows, scale))
    compared = [name for name in ORDER if name in cases]
    if len(compared) > 1:
        holds = f"order holds: {' <= '.join(compared)} at every density (within {TOLERANCE:.1%})"
        print("\n" + ("\n".join(f"order FAILS: {line}" for line in check_order(rows)) or holds))
    errors = check_baselines(rows)
    if errors:
        print(errors)
    if options.plot:
        plot(rows, scale, options.plot)
    return int(errors is not None and errors.endswith("FAILS"))


def open_subject(options: argparse.Namespace) -> Subject:
    """The model as ``--start`` wants it, and its texts."""
    model, tokenizer = load_model(options.model)
    judged_by = {Path(place).name: read_text(place) for place in options.texts}
    calibration: str | list[str] | None = read_text(options.calibration) if options.calibration else None
    if not is_causal(model) and not judged_by:
        calibration, judged = _docstrings()
        judged_by = {"docstrings": "\n".join(judged)}
    if not judged_by:
        raise SystemExit("give a text to judge by")
    if options.table != "methods" and isinstance(calibration, str):
        cut = len(calibration) * (HELD_OUT - 1) // HELD_OUT
        calibration, judged_by["held-out calibration"] = calibration[:cut], calibration[cut:]
    reading = Reading(windows=options.windows, batch=min(8, options.windows))
    texts = {name: read_with(model, tokenizer, text, reading) for name, text in judged_by.items()}
    begin_with_(model, options.start)
    weights = digest_many([w.parameter.detach() for w in linear_weights(model)])
    known = [weights, options.start, calibration, judged_by, options.windows]
    identity = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    store = Store(options.store or tempfile.mkdtemp(prefix="pifa-quality-"))
    windows = options.calibration_windows
    return Subject(model, options.start, tokenizer, texts, calibration, windows, store, identity)


def _docstrings() -> tuple[list[str], list[str]]:
    """Docstrings to calibrate on and to judge by, split by file."""

    def even(path: str) -> bool:
        return hashlib.sha256(path.encode()).digest()[0] % 2 == 0

    first = standard_library_docstrings(chosen=even)
    second = standard_library_docstrings(chosen=lambda path: not even(path))
    judged = [line for line in second if line not in set(first)]
    return first, judged[:: max(1, len(judged) // 256)]


def _facts(options: argparse.Namespace) -> Row:
    """Of this measurement, this machine and these sources."""
    model = {"model": options.model, "start": options.start, "texts": options.texts}
    model |= {"calibration": options.calibration, "calibration_windows": options.calibration_windows}
    return model | machine_facts()


def machine_facts() -> Row:
    """Of this machine and these sources."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown"
    machine = {"system": platform.platform(), "machine": platform.machine(), "threads": torch.get_num_threads()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    python = {"python": platform.python_version()}
    return {"revision": revision, "machine": machine, "versions": versions | python}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or Hugging Face id")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="to judge by; encoders have docstrings without one")
    parser.add_argument("--calibration", help="text to calibrate on (default: what a causal model samples itself)")
    parser.add_argument("--table", choices=("methods", *DEFAULTS), default="methods")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="rows of the table by name (default: all)")
    parser.add_argument("--densities", nargs="+", type=float, help=f"default: {DENSITIES}, of other tables 0.5625 0.4")
    parser.add_argument("--start", choices=tuple(STARTS), default="dense", help="what is done to the model before")
    parser.add_argument("--windows", type=int, default=256, help="windows (sentences) of each text (default 256)")
    parser.add_argument("--calibration-windows", type=int, default=64, help="windows to calibrate on (default 64)")
    parser.add_argument("--store", type=Path, help="of the runs (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="rows, kept and added to")
    parser.add_argument("--plot", type=Path, help="picture (png, svg, pdf ...); needs the extra 'plot'")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
