"""Is a store what it says it is: every object whole, every run of this model, and how good the model is with it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pifa_compile.layer_errors import RULE, RunCheck, check_layers
from pifa_compile.quality import Reading, evaluate, misfit
from pifa_compile.store import Store
from pifa_compile.texts import read_text

#: Windows or lines of the text that are read.
WINDOWS = 64


@dataclass
class Verification:
    """What was found: one line per problem; with a text the quality of each run and the errors of its layers."""

    store: Path
    runs: list[str]
    problems: list[str] = field(default_factory=list)
    quality: dict[str, dict[str, float]] = field(default_factory=dict)
    layers: list[RunCheck] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON."""
        facts = {"store": str(self.store), "runs": self.runs, "problems": self.problems, "quality": self.quality}
        return facts | {"layers": [check.to_json() for check in self.layers]}

    def __str__(self) -> str:
        lines = [f"{check}\n" for check in self.layers]
        lines += [RULE] if self.layers else []
        lines += [f"problem: {p}" for p in self.problems]
        for name, figures in self.quality.items():
            words = (f"{key.replace('_', ' ')} {value:.4f}" for key, value in figures.items())
            lines.append(f"{name}: {', '.join(words)}")
        state = f"{len(self.problems)} problems in" if self.problems else "verified: every object is whole and fits,"
        return "\n".join([*lines, f"{state} {len(self.runs)} runs of {self.store}"])


def verify(
    store: Store,
    run: str | None = None,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    text: Path | str | None = None,
) -> Verification:
    """Read and check every object of one run, or of all.

    model  also check that the runs were made of its weights
    text   also measure the model dense and with each run, as ``evaluate`` does, and compute the errors of every layer
           again on this text; figures that RULE calls wrong are problems
    """
    with warnings.catch_warnings(record=True) as unreadable:
        warnings.simplefilter("always")
        runs = store.runs() if run is None else [store.run(run)]
    found = Verification(store.root, [r.run_id for r in runs], [str(w.message) for w in unreadable])
    for each in runs:
        found.problems += store.verify(each.run_id)
    if model is not None:
        found.problems += [problem for r in runs if (problem := misfit(r, model))]
        if text is not None and not found.problems:
            texts, reading = {str(text): read_text(text)}, Reading(windows=WINDOWS)
            measured = evaluate(model, tokenizer, [(store, r) for r in runs], texts, reading=reading)
            found.quality = {variant.name: variant.figures[str(text)] for variant in measured.variants}
            found.layers = [check_layers(store, r, model, tokenizer, text) for r in runs]
            found.problems += [problem for check in found.layers for problem in check.problems]
    return found
