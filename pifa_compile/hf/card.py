"""The model card: what the model was, how it was compressed, what each layer lost, and how it is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import nn

from pifa_compile.hf.config import REQUIRES, LayerForm
from pifa_compile.modules import FactoredLinear, factored_layers
from pifa_compile.store import Run


def model_card(
    model: nn.Module,
    forms: Mapping[str, LayerForm],
    source: str | os.PathLike[str] | None,
    run: Run | None,
    recipe: Mapping[str, Any] | None,
    tuned: Mapping[str, Any] | None = None,
) -> str:
    """The text of README.md. Figures are of this model; errors are there where the run says what they were, and the
    factors were not trained since."""
    name, on_hub = _origin(source, run)
    layers = dict(factored_layers(model))
    dense = sum(layer.out_features * layer.in_features for layer in layers.values())
    kept = sum(_numbers(layers[place], form) for place, form in forms.items())
    pivots = sum(_pivots(layers[place], form) for place, form in forms.items())
    every = sum(p.numel() for p in model.parameters()) + pivots
    whole = every - kept + dense
    figures = tabulate(
        [
            [f"the {len(layers)} compressed layers", f"{dense:,}", f"{kept:,}", f"{kept / dense:.4f}"],
            ["the whole model", f"{whole:,}", f"{every:,}", f"{every / whole:.4f}"],
        ],
        ["numbers", "dense", "here", "kept"],
        "github",
        disable_numparse=True,
        colalign=("left", "right", "right", "right"),
    )
    head = {"library_name": "transformers", "tags": ["pifa", "pifa-compile", "low-rank"]}
    front = [f"{key}: {json.dumps(value)}" for key, value in (head | ({"base_model": name} if on_hub else {})).items()]
    parts = [
        "\n".join(["---", *front, "---"]),
        f"# {name.rsplit('/', 1)[-1]} in pivoting-factorization form",
        _WHAT.format(name=name, maker=_maker()),
        figures,
        _HOW.format(name=type(model).__name__, requires=REQUIRES),
    ]
    if recipe is not None:
        parts.append(_made(recipe, run))
    if tuned is not None:
        parts.append(_tuned(tuned))
    trained = tuned is not None and tuned["best"]
    parts += ["## Layers", _layers(layers, forms, None if trained else run)]
    return "\n\n".join(parts) + "\n"


_WHAT = """{name}, its linear layers factored by {maker}: a weight of rank r is kept as r of its own rows and the
coefficients that make the others from them ([Zhao et al., ICML 2025](https://arxiv.org/abs/2501.19090))."""

_HOW = """## Use

```
pip install pifa-compile
```

```python
{requires}  # makes transformers know the layers
from transformers import {name}

model = {name}.from_pretrained("this folder")
```

The import is needed. Without it transformers says that it skips the quantization, and stops because of shapes that do
not match; let it never go on with `ignore_mismatched_sizes=True`, which would draw the weights at random. Auto classes
with `trust_remote_code=True` import it themselves, where the package is installed.

`torch.compile(model, backend="pifa")` runs the layers on kernels that are made for this form.
`model.dequantize()` makes them dense again, from their factors."""


def _maker() -> str:
    try:
        return f"pifa-compile {version('pifa-compile')}"
    except PackageNotFoundError:  # a source tree that is not installed
        return "pifa-compile"


def _origin(source: str | os.PathLike[str] | None, run: Run | None) -> tuple[str, bool]:
    """The dense model's name, and whether it is one of the hub: a folder's path says nothing elsewhere."""
    name = str(source) if source is not None else run.header.model if run is not None else ""
    if not name or Path(name).expanduser().is_dir() or name.startswith(("/", ".", "~")):
        return Path(name).name or "a model", False
    return name, True


def _made(recipe: Mapping[str, Any], run: Run | None) -> str:
    told = [f"## How it was made\n\n```json\n{json.dumps(dict(recipe), indent=1)}\n```"]
    if run is not None:
        header = run.header
        told.append(f"Run `{header.run_id}`, {header.created}, with " + ", ".join(
            f"{package} {number}" for package, number in header.versions.items()) + ".")  # fmt: skip
        if header.calibration is not None:
            told.append(f"Calibration: `{json.dumps(header.calibration)}`")
    return "\n\n".join(told)


def _tuned(tuned: Mapping[str, Any]) -> str:
    """What was trained on and what it gave."""
    how, before, after = tuned["tuning"], tuned["before"], tuned["after"]
    rows = [[name.replace("_", " "), f"{before[name]:.4f}", f"{after[name]:.4f}"] for name in before]
    towards = "the next token of the text" if how["loss"] == "lm" else "the outputs of the dense model"
    kept = f"the state of step {tuned['best']}" if tuned["best"] else "the start, since no state was better"
    told = (
        f"The factors were trained towards {towards}: {tuned['done']} steps on {tuned['items']} windows or lines of "
        f"{tuned['source']}; kept is {kept}. Judged by {tuned['held_out']} others from its end:"
    )
    table = tabulate(rows, ["held out", "before", "after"], "github", disable_numparse=True)
    return f"## How it was tuned\n\n{told}\n\n{table}\n\n```json\n{json.dumps(dict(how), indent=1)}\n```"


def _layers(layers: Mapping[str, FactoredLinear], forms: Mapping[str, LayerForm], run: Run | None) -> str:
    records = {} if run is None else run.by_name
    rows = []
    for name, layer in layers.items():
        record = records.get(name)
        errors = (None, None) if record is None else (record.truncation, record.error)
        size = layer.out_features, layer.in_features
        shared = ", ".join(f"{key} of {owner}" for key, owner in forms[name].shares.items())
        rows.append(
            [name, f"{size[0]} x {size[1]}", forms[name].form, str(layer.rank), f"{_numbers(layer, forms[name]):,}"]
            + [f"{e:.1e}" if e is not None else "" for e in errors]
            + [shared]
        )
    headers = ["layer", "m x n", "form", "rank", "numbers", "truncation", "rounding", "shares"]
    align = ("left", "left", "left", "right", "right", "right", "right", "left")
    table = tabulate(rows, headers, "github", disable_numparse=True, colalign=align)
    note = (
        "Errors are relative (Frobenius): truncation of the low-rank weight against the dense one, rounding of the "
        "stored factors against the low-rank weight; layers that share a factorization have those of the group. They "
        "are of weights and say little of the model's quality: measure that with `pifa eval`."
    )
    return table if run is None else f"{table}\n\n{note}"


def _numbers(layer: FactoredLinear, form: LayerForm) -> int:
    """Numbers that the layer keeps by itself: its matrices, and one per pivot for the row order; bias excluded."""
    own = [getattr(layer, key) for key in form.tensors if key != "bias" and key not in form.shares]
    numbers: int = sum(t.numel() for t in own if t.dim() == 2)
    return numbers + _pivots(layer, form)


def _pivots(layer: FactoredLinear, form: LayerForm) -> int:
    return layer.rank if form.form == "pifa" and "pivot_rows" not in form.shares else 0
