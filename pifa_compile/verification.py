"""Is a store what it says it is: every object whole, every run of this model, and how good the model is with it."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pifa_compile.digest import digest_many
from pifa_compile.evaluation import embed, perplexity, sentence_batches, similarity, windows_of
from pifa_compile.layers import linear_weights
from pifa_compile.loading import is_causal
from pifa_compile.prepare import apply_
from pifa_compile.store import Run, Store
from pifa_compile.texts import read_text


@dataclass
class Verification:
    """What was found: one line per problem, and the quality figures of each run that could be applied."""

    store: Path
    runs: list[str]
    problems: list[str] = field(default_factory=list)
    quality: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON."""
        return {"store": str(self.store), "runs": self.runs, "problems": self.problems, "quality": self.quality}

    def __str__(self) -> str:
        lines = [f"problem: {p}" for p in self.problems]
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
    text: Path | None = None,
) -> Verification:
    """Read and check every object of one run, or of all.

    model  also check that the runs were made of its weights
    text   also measure the model dense and with each run: perplexity of a causal language model on the text, similarity
           of an encoder's embeddings of the text's lines to the dense model's
    """
    with warnings.catch_warnings(record=True) as unreadable:
        warnings.simplefilter("always")
        runs = store.runs() if run is None else [store.run(run)]
    found = Verification(store.root, [r.run_id for r in runs], [str(w.message) for w in unreadable])
    for each in runs:
        found.problems += store.verify(each.run_id)
    if model is not None:
        found.problems += [problem for r in runs if (problem := _of_another_model(r, model))]
        if text is not None and not found.problems:
            found.quality = _quality(store, runs, model, tokenizer, read_text(text))
    return found


def _of_another_model(run: Run, model: nn.Module) -> str | None:
    weights = [w for w in linear_weights(model) if w.reason is None]
    digests = digest_many([w.parameter.detach() for w in weights])
    known = sum(d in run.by_digest for d in digests)
    if known == len(weights):
        return None
    return f"run {run.run_id} knows {known} of the {len(weights)} linear weights of {type(model).__name__}"


def _quality(store: Store, runs: list[Run], model: nn.Module, tokenizer: Any, text: str) -> dict[str, dict[str, float]]:
    if is_causal(model):
        windows = windows_of(text, tokenizer, most=64)
        variants = {"dense": model} | {r.run_id: _with(r, store, model) for r in runs}
        return {name: {"perplexity": perplexity(variant, windows)} for name, variant in variants.items()}
    lines = [line for line in text.splitlines() if len(line) > 20][:256]
    batches = sentence_batches(lines, tokenizer, min(32, len(lines)))
    dense = embed(model, batches)
    return {r.run_id: similarity(dense, embed(_with(r, store, model), batches)) for r in runs}


def _with(run: Run, store: Store, model: nn.Module) -> nn.Module:
    return apply_(copy.deepcopy(model), run=run.run_id, store=store)
