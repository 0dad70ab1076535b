"""How good a model is, dense and with the factors of each compression run, in one table.

Causal language models: perplexity, and how often the likeliest next token is that of the dense model. Other models with
token outputs: similarity of sentence embeddings to the dense model's, and how often the nearest sentence is the same.
"""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from tabulate import tabulate
from torch import Tensor, nn

from pifa_compile import _torch
from pifa_compile.compression.layer import versions
from pifa_compile.digest import digest_many
from pifa_compile.errors import InputError, StoreError, UnknownRunError
from pifa_compile.evaluation import (
    check_length,
    embed,
    neighbour_agreement,
    next_tokens,
    sentence_batches,
    similarity,
    windows_of,
)
from pifa_compile.hf.layers import describe
from pifa_compile.hf.size import size_of
from pifa_compile.layers import linear_weights
from pifa_compile.loading import is_causal
from pifa_compile.modules import factored_layers
from pifa_compile.prepare import apply_
from pifa_compile.store import Evaluation, Run, Store, timestamp

#: A line of text this short is no sentence to embed.
SHORTEST = 20


@dataclass(frozen=True)
class Reading:
    """How texts are read.

    windows  windows of a text at most (sentences, for a model that is not causal), from its beginning
    length   tokens in a window (default 256); the most tokens of a sentence (default 64)
    batch    windows or sentences in one call
    bos      begin every window with the tokenizer's beginning-of-sequence token, in place of the text's first token
    """

    windows: int = 256
    length: int | None = None
    batch: int = 8
    bos: bool = False


@dataclass(frozen=True)
class Variant:
    """The model as it was given (dense, as a rule), or with one run, or a model that has its factors already.

    name           "dense", a run's id, or what ``given_as`` says; one of each in a table, see ``told_apart``
    density        numbers kept over those of the replaced layers
    model_density  the same over the whole model
    figures        by text, by figure
    """

    name: str
    density: float
    model_density: float
    figures: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Quality:
    """The dense model first, then every run, then models that have their factors already, which are never called dense.

    ``protocol`` says, by text, how it was read.
    """

    model: str
    protocol: dict[str, str]
    variants: list[Variant]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        texts = list(self.protocol)
        short = [Path(t).name for t in texts]
        titles = texts if len(set(short)) < len(short) else short
        figures = self.variants[0].figures
        columns = [(text, key) for text in texts for key in figures[text]]
        heads = [f"{title}\n{key.replace('_', ' ')}" for text, title in zip(texts, titles, strict=True)
                 for key in figures[text]]  # fmt: skip
        rows = [
            [v.name, f"{v.density:.4f}", f"{v.model_density:.4f}", *(f"{v.figures[t][k]:.4f}" for t, k in columns)]
            for v in self.variants
        ]
        align = ["left", *["right"] * (2 + len(columns))]
        table = tabulate(
            rows, ["", "density", "whole model", *heads], "simple", disable_numparse=True, colalign=align
        )
        lines = [f"{text}: {how}" for text, how in self.protocol.items()]
        return "\n".join([self.model, table, "", *lines])


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    runs: Sequence[tuple[Store, Run]],
    texts: Mapping[str, str],
    *,
    reading: Reading | None = None,
    name: str = "",
    factored: Mapping[str, nn.Module] | None = None,
    say: Callable[[str], object] | None = None,
) -> Quality:
    """Measure a model on texts (by name), dense and with each run; nothing is compiled, the model stays as it is.

    factored  models that have their factors already (as a folder of ``export`` has), by the names of their places: rows
              beside the dense ``model``
    say       receives a line before each row is measured

    Raises InputError for a run that does not know every linear weight of the model, and for a text that is too short.
    """
    how, others = reading or Reading(), factored or {}
    for _, run in runs:
        if problem := misfit(run, model):
            raise InputError(f"{problem}; name another run, or compress this model first")
    measuring = told_rows(runs, others, say)
    next(measuring)
    tasks = {label: read_with(model, tokenizer, text, how) for label, text in texts.items()}
    variants = [Variant(*given_as(model), {label: task.dense for label, task in tasks.items()})]
    if is_factored(model):  # compared with itself it says nothing
        if not is_causal(model):
            cure = "give that, and this one in factored= (--dense)"
            raise InputError(f"this encoder has its factors already, and is measured against the dense one; {cure}")
        for measured in variants[0].figures.values():
            for key in set(measured) - {"perplexity"}:
                del measured[key]
    for store, run in runs:
        next(measuring)
        variant = with_run(model, store, run)
        figures = {label: task.measure(variant) for label, task in tasks.items()}
        variants.append(Variant(run.run_id, run.density, model_density(run, model), figures))
    for other in others.values():
        next(measuring)
        variants.append(Variant(*given_as(other), {label: task.measure(other) for label, task in tasks.items()}))
    protocol = {label: task.protocol for label, task in tasks.items()}
    return Quality(name or type(model).__name__, protocol, told_apart(variants, runs, others))


def told_rows(
    runs: Sequence[tuple[Store, Run]], factored: Mapping[str, nn.Module], say: Callable[[str], object] | None
) -> Iterator[str]:
    """The rows of a table, one with each step; ``say`` receives a line for it first: to measure it may take minutes."""
    names = ["the model", *(run.run_id for _, run in runs), *factored]
    for number, name in enumerate(names, 1):
        if say is not None:
            say(f"measuring {name} ({number} of {len(names)})")
        yield name


def is_factored(model: nn.Module) -> bool:
    """Whether a model has factored layers of its own."""
    return next(factored_layers(model), None) is not None


def given_as(model: nn.Module) -> tuple[str, float, float]:
    """What the model is called, its density, and that of the whole model: dense, or the run and what became of it."""
    if not is_factored(model):
        return "dense", 1.0, 1.0
    known = getattr(getattr(model, "config", None), "quantization_config", None)
    run, size = getattr(known, "run", None), size_of(model, describe(model))
    name = run or ("imported" if getattr(known, "imported", None) else "factored")
    if getattr(known, "tuned", None):
        name += ", tuned"
    elif run:  # not to be taken for the run in its store
        name += ", exported"
    return name, size.density, size.model_density


def told_apart(
    variants: Sequence[Variant], runs: Sequence[tuple[Store, Run]], factored: Mapping[str, nn.Module]
) -> list[Variant]:
    """The rows of a table (the model's, then those of runs, then of factored models); where several have one name, each
    says which store or folder it is from."""
    places = ["", *(f" in {store.root}" for store, _ in runs), *(f" in {place}" for place in factored)]
    count = Counter(variant.name for variant in variants)
    return [
        replace(variant, name=variant.name + place) if count[variant.name] > 1 else variant
        for variant, place in zip(variants, places, strict=True)
    ]


def keep_figures(
    found: Quality, runs: Sequence[tuple[Store, Run]], texts: Mapping[str, str], model: nn.Module
) -> None:
    """Keep what ``evaluate`` found of each run beside the run, in its store; warns where a store cannot be written.

    A figure that is not finite is left out: JSON has none.
    """
    now, dtype = timestamp(), _torch.dtype_name(next(model.parameters()).dtype)
    for (store, run), variant in zip(runs, found.variants[1 : len(runs) + 1], strict=True):
        for label, text in texts.items():
            evaluation = Evaluation(
                run_id=run.run_id,
                text=label,
                digest=f"sha256:{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()}",
                protocol=found.protocol[label],
                dtype=dtype,
                density=variant.density,
                model_density=variant.model_density,
                figures=_finite(variant.figures[label]),
                dense=_finite(found.variants[0].figures[label]),
                created=now,
                versions=versions(),
            )
            try:
                store.keep_evaluation(evaluation)
            except StoreError as error:
                warnings.warn(f"the figures of {run.run_id} are not kept: {error}", stacklevel=2)


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def find_runs(model: nn.Module, stores: Sequence[Store], wanted: Sequence[str] = ()) -> list[tuple[Store, Run]]:
    """Each wanted run (id, or its beginning) from the first store that has it; without any, all finished runs of the
    stores that know every linear weight of the model. None comes twice. Raises UnknownRunError."""
    if wanted:
        found = [_first(stores, run_id) for run_id in wanted]
    else:
        digests = [] if is_factored(model) else _digests(model)
        known = [(store, run) for store in stores for run in store.runs() if run.complete]
        found = [(store, run) for store, run in known if digests and all(d in run.by_digest for d in digests)]
    return list({(store.root.resolve(), run.run_id): (store, run) for store, run in found}.values())


def _first(stores: Sequence[Store], run_id: str) -> tuple[Store, Run]:
    errors = []
    for store in stores:
        try:
            return store, store.run(run_id)
        except UnknownRunError as error:
            errors.append(error)
    raise errors[0]


def _digests(model: nn.Module) -> list[str]:
    return digest_many([w.parameter.detach() for w in linear_weights(model) if w.reason is None])


def misfit(run: Run, model: nn.Module) -> str | None:
    """What is wrong if the run was not made of all linear weights of the model, else None."""
    digests = _digests(model)
    known = sum(d in run.by_digest for d in digests)
    if known == len(digests):
        return None
    return f"run {run.run_id} knows {known} of the {len(digests)} linear weights of {type(model).__name__}"


def with_run(model: nn.Module, store: Store, run: Run) -> nn.Module:
    """A copy of the model that has the run's factors, and shares everything else with it."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return apply_(copy.deepcopy(model, shared), run=run.run_id, store=store)


def model_density(run: Run, model: nn.Module) -> float:
    """Numbers kept over those of the whole dense model."""
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    return 1 - sum(r.dense_numbers - r.numbers for r in run.layers if r.object is not None) / total


class ReadText(Protocol):
    """One text as the dense model read it: ``protocol`` says how, ``dense`` are its figures."""

    protocol: str
    dense: dict[str, float]

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The figures of another model, some of them against the dense one."""
        ...


def read_with(model: nn.Module, tokenizer: Any, text: str, reading: Reading) -> ReadText:
    """Read a text with the dense model, so that others can be measured against it; raises InputError."""
    return (_Language if is_causal(model) else _Sentences)(model, tokenizer, text, reading)


def windows_for(model: nn.Module, tokenizer: Any, text: str, how: Reading) -> tuple[Tensor, str]:
    """The windows (count x length, int64) of a text for a causal model, and how it was read, in words."""
    length = how.length or 256
    check_length(model, length)
    windows = windows_of(text, tokenizer, length - how.bos, how.windows)
    if how.bos:
        windows = _after_bos(windows, tokenizer)
    first = "each beginning with the BOS token" if how.bos else "no BOS or other special token"
    return windows, (
        f"{len(windows)} windows of {length} tokens from its beginning, no overlap, {first}; "
        f"{windows[:, 1:].numel()} tokens scored (the first of each window is not); {len(text):,} characters; "
        f"{_words(tokenizer)}"
    )


class _Language:
    """Perplexity of windows of running text, and agreement with the dense model's choices."""

    def __init__(self, model: nn.Module, tokenizer: Any, text: str, how: Reading) -> None:
        windows, self.protocol = windows_for(model, tokenizer, text, how)
        self._windows, self._batch = windows.to(_device(model)), how.batch
        found = next_tokens(model, self._windows, self._batch)
        self._choices = found.choices
        self.dense = {"perplexity": found.perplexity, "excess": 0.0, "same_top_1": 1.0}

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Perplexity, what it is above the dense model's, and the share of positions with the same likeliest token."""
        found = next_tokens(model, self._windows, self._batch)
        same = float((found.choices == self._choices).double().mean())
        excess = found.perplexity - self.dense["perplexity"]
        return {"perplexity": found.perplexity, "excess": excess, "same_top_1": same}


def _after_bos(windows: Tensor, tokenizer: Any) -> Tensor:
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        raise InputError("the tokenizer has no beginning-of-sequence token; leave it out")
    return torch.cat([windows.new_full((windows.shape[0], 1), bos), windows], dim=1)


class _Sentences:
    """Similarity of the embeddings of a text's lines."""

    def __init__(self, model: nn.Module, tokenizer: Any, text: str, how: Reading) -> None:
        if how.bos:
            raise InputError("sentences have the special tokens of their tokenizer; leave out the BOS token")
        length = how.length or 64
        lines = [line.strip() for line in text.splitlines() if len(line.strip()) > SHORTEST][: how.windows]
        if len(lines) < 3:
            raise InputError(f"the text has {len(lines)} lines of more than {SHORTEST} characters; give three at least")
        batch = min(how.batch, len(lines))
        device = _device(model)
        batches = sentence_batches(lines, tokenizer, batch, length)
        self._batches = [{key: t.to(device) for key, t in inputs.items()} for inputs in batches]
        self._dense = _embedded(model, self._batches)
        self.dense = similarity(self._dense, self._dense) | {"same_neighbour": 1.0}
        self.protocol = (
            f"{len(self._dense)} lines of more than {SHORTEST} characters from its beginning, cut at {length} "
            f"tokens, embedded as the mean over their tokens; {len(text):,} characters; {_words(tokenizer)}"
        )

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Similarity to the dense model's embeddings, and the share of lines with the same nearest line."""
        found = _embedded(model, self._batches)
        return similarity(self._dense, found) | {"same_neighbour": neighbour_agreement(self._dense, found)}


def _embedded(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    try:
        return embed(model, batches)
    except (AttributeError, TypeError) as error:
        problem = f"{type(model).__name__} has no token outputs (last_hidden_state) of text"
        raise InputError(f"{problem}; only language models and encoders of text can be evaluated") from error


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _words(tokenizer: Any) -> str:
    return f"{type(tokenizer).__name__} of {getattr(tokenizer, 'vocab_size', 'unknown')} tokens"
