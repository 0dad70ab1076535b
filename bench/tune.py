"""What a short tuning wins back: python bench/tune.py MODEL TEXT [TEXT ...] --calibration FILE --json rows.json.

A causal model is compressed with the default recipe, calibrated on a text, and tuned on the same text with each loss;
the dense, the compressed and the tuned models are judged by the other texts, as ``pifa eval`` does. Rows that are in
the JSON file already are not computed again, so that a long table can be made in parts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from quality import Row, machine_facts, write_rows
from tabulate import tabulate
from torch import nn

from pifa_compile import Mpifa, Tuning, apply_, compress, tune
from pifa_compile.loading import load_model
from pifa_compile.quality import Reading, ReadText, read_with
from pifa_compile.store import Store
from pifa_compile.texts import read_text


@dataclass(frozen=True)
class Subject:
    """A dense model, the texts that judge, as it read them, and the text for calibration and tuning."""

    name: str
    model: nn.Module
    tokenizer: Any
    texts: Mapping[str, ReadText]
    calibration: Path
    store: Store


def rows_of(
    subject: Subject, densities: Sequence[float], tunings: Sequence[Tuning], kept: Mapping[str, Row]
) -> Iterator[Row]:
    """The dense model, then at each density the compressed one and what every tuning makes of it."""
    yield _row(subject, "dense", 1.0, None, kept)
    for density in densities:
        for tuning in (None, *tunings):
            yield _row(subject, tuning.loss if tuning else "compressed", density, tuning, kept)


def _row(subject: Subject, case: str, density: float, tuning: Tuning | None, kept: Mapping[str, Row]) -> Row:
    key = _key(subject, density, tuning)
    if key in kept:
        return kept[key]
    row: Row = {"key": key, "case": case, "density": density}
    if case == "dense":
        return row | {"scores": {name: text.dense["perplexity"] for name, text in subject.texts.items()}}
    recipe = Mpifa(density=density)
    told = {"text": subject.calibration, "tokenizer": subject.tokenizer}
    run = compress(subject.model, recipe, store=subject.store, progress=False, **told).run
    model, _ = load_model(subject.name, need_tokenizer=False)
    apply_(model, run=run.run_id, store=subject.store)
    if tuning is not None:
        teacher = subject.model if tuning.loss == "distill" else None
        report = tune(model, tuning, teacher=teacher, **told).to_json()
        row |= {"tuning": report, "seconds": report["seconds"]}
    scores = {name: text.measure(model)["perplexity"] for name, text in subject.texts.items()}
    return row | {"run": run.run_id, "recipe": recipe.to_json(), "scores": scores}


def _key(subject: Subject, density: float, tuning: Tuning | None) -> str:
    """What a row follows from, as a digest."""
    texts = {name: [text.protocol, text.dense] for name, text in subject.texts.items()}
    known = [texts, subject.calibration.name, density, None if tuning is None else tuning.to_json()]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def render(rows: Sequence[Row]) -> str:
    """A table of perplexities."""
    texts = list(rows[0]["scores"])
    body = [
        [r["case"], f"{r['density']:g}", *(f"{r['scores'][t]:.2f}" for t in texts), f"{r.get('seconds', 0):.0f}"]
        for r in rows
    ]
    align = ["left", *["right"] * (2 + len(texts))]
    return tabulate(body, ["", "density", *texts, "s"], "simple", disable_numparse=True, colalign=align)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = _parser().parse_args(arguments)
    transformers.logging.disable_progress_bar()
    model, tokenizer = load_model(options.model)
    reading = Reading(windows=options.windows)
    texts = {Path(place).name: read_with(model, tokenizer, read_text(place), reading) for place in options.texts}
    store = Store(options.store or tempfile.mkdtemp(prefix="pifa-tune-"))
    subject = Subject(options.model, model, tokenizer, texts, options.calibration, store)
    settings = {key: getattr(options, key) for key in ("steps", "length", "lr") if getattr(options, key) is not None}
    tunings = [Tuning(loss=loss, **settings) for loss in options.losses]
    known = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    kept: dict[str, Row] = {row["key"]: row for row in known}
    facts = {"model": options.model, "calibration": options.calibration.name} | machine_facts()
    rows = []
    for row in rows_of(subject, options.densities, tunings, kept):
        rows.append(kept.setdefault(row["key"], row | {"made": facts}))
        if options.json:
            write_rows(options.json, list(kept.values()))
    for name, text in texts.items():
        print(f"{name}: {text.protocol}")
    print(render(rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or Hugging Face id of a causal model")
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="to judge by")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate and to tune on")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5625, 0.4], help="default: 0.5625 0.4")
    parser.add_argument("--losses", nargs="+", default=["lm", "distill"], choices=("lm", "distill"))
    parser.add_argument("--steps", type=int, help="of a tuning; these three by default as in Tuning")
    parser.add_argument("--length", type=int, help="tokens in its windows")
    parser.add_argument("--lr", type=float, help="its learning rate")
    parser.add_argument("--windows", type=int, default=64, help="of each text to judge by (default: 64)")
    parser.add_argument("--store", type=Path, help="of the runs (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="rows, kept and added to")
    return parser


if __name__ == "__main__":
    main()
