"""The model card: what the model was, how it was compressed, what each layer lost, and how it is loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import nn

from pifa_compile.hf.config import REQUIRES, LayerForm
from pifa_compile.hf.size import numbers, size_of
from pifa_compile.modules import FactoredLinear, factored_layers
from pifa_compile.store import Run


def model_card(
    model: nn.Module,
    forms: Mapping[str, LayerForm],
    source: str | os.PathLike[str] | None,
    run: Run | None,
    recipe: Mapping[str, Any] | None,
    tuned: Sequence[Mapping[str, Any]] = (),
    imported: Mapping[str, Any] | None = None,
) -> str:
    """The text of README.md. Figures are of this model; errors are there where the run or the import says what they
    were, and the factors were not trained since."""
    name, on_hub = _origin(source, run)
    told = origin_metadata(source)
    base = name if on_hub else told.pop("base_model", None)
    if source is None and imported is not None:
        name = str(imported["source"])
    name = str(base or name)
    layers = dict(factored_layers(model))
    size = size_of(model, forms)
    figures = tabulate(
        [
            [f"the {len(layers)} compressed layers", f"{size.dense:,}", f"{size.kept:,}", f"{size.density:.4f}"],
            ["the whole model", f"{size.whole_dense:,}", f"{size.whole_kept:,}", f"{size.model_density:.4f}"],
        ],
        ["numbers", "dense", "here", "kept"],
        "github",
        disable_numparse=True,
        colalign=("left", "right", "right", "right"),
    )
    head = {"library_name": "transformers", "tags": ["pifa", "pifa-compile", "low-rank"]}
    head |= ({"base_model": base} if base else {}) | told
    front = [f"{key}: {json.dumps(value)}" for key, value in head.items()]
    parts = [
        "\n".join(["---", *front, "---"]),
        f"# {name.rsplit('/', 1)[-1]} in pivoting-factorization form",
        (_WHAT if imported is None else _IMPORTED).format(name=name, maker=_maker()),
        figures,
        _HOW.format(name=type(model).__name__, requires=REQUIRES),
    ]
    if recipe is not None:
        parts.append(_made(recipe, run))
    if imported is not None:
        parts.append(_taken(imported))
    if tuned:
        parts.append("\n\n".join(["## How it was tuned", *_tunings(tuned)]))
    trained = any(told["best"] for told in tuned)
    parts += ["## Layers", _layers(layers, forms, None if trained else run, imported, trained)]
    return "\n\n".join(parts) + "\n"


_WHAT = """{name}, its linear layers factored by {maker}: a weight of rank r is kept as r of its own rows and the
coefficients that make the others from them ([Zhao et al., ICML 2025](https://arxiv.org/abs/2501.19090))."""

_IMPORTED = """{name}, whose linear layers another method had made low-rank; {maker} turned their pairs of weights into
factors: a weight of rank r is kept as r of its own rows and the coefficients that make the others from them
([Zhao et al., ICML 2025](https://arxiv.org/abs/2501.19090))."""

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


def origin_metadata(source: str | os.PathLike[str] | None) -> dict[str, Any]:
    """``license`` and ``base_model`` as the dense model's folder says them, in its card or else in its config.

    A name that is a path says nothing elsewhere and is left out.
    """
    folder = Path("" if source is None else source).expanduser()
    if source is None or not folder.is_dir():
        return {}
    card, config = _front_matter(folder / "README.md"), _object(folder / "config.json")
    found = {key: value for key in _LICENCE if (value := card.get(key) or config.get(key))}
    base = card.get("base_model") or config.get("base_model") or config.get("_name_or_path")
    if isinstance(base, str) and _HUB_ID.fullmatch(base):
        found["base_model"] = base
    return {key: value for key, value in found.items() if isinstance(value, str)}


#: What a card of the hub says of a licence.
_LICENCE = ("license", "license_name", "license_link")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def _front_matter(path: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(path)
    except Exception:  # none, or none that can be read: YAML has errors of its own
        return {}
    return found or {}


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _taken(imported: Mapping[str, Any]) -> str:
    """Which checkpoint the pairs are of, and how they were named there."""
    told = f"Pairs of the checkpoint {imported['source']}, in the format {' and '.join(imported['formats'])}."
    return f"## Where it comes from\n\n{told}"


def _tunings(tuned: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tunings in their order, each with a heading where there are several."""
    if len(tuned) == 1:
        return [_tuned(tuned[0])]
    return [f"### Tuning {number}\n\n{_tuned(told)}" for number, told in enumerate(tuned, 1)]


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
    return f"{told}\n\n{table}\n\n```json\n{json.dumps(dict(how), indent=1)}\n```"


def _layers(
    layers: Mapping[str, FactoredLinear],
    forms: Mapping[str, LayerForm],
    run: Run | None,
    imported: Mapping[str, Any] | None,
    trained: bool,
) -> str:
    records = {} if run is None else run.by_name
    pairs: Mapping[str, Any] = {} if imported is None else imported["layers"]
    rows = []
    for name, layer in layers.items():
        record = records.get(name)
        pair = pairs.get(name, {})
        errors = (None, None if trained else pair.get("error")) if record is None else (record.truncation, record.error)
        size = layer.out_features, layer.in_features
        shared = ", ".join(f"{key} of {owner}" for key, owner in forms[name].shares.items())
        rows.append(
            [name, f"{size[0]} x {size[1]}", forms[name].form, str(layer.rank), f"{numbers(layer, forms[name]):,}"]
            + [f"{e:.1e}" if e is not None else "" for e in errors]
            + [shared]
            + ([str(pair.get("inner", ""))] if pairs else [])
        )
    headers = ["layer", "m x n", "form", "rank", "numbers", "truncation", "rounding", "shares"]
    align = ["left"] * 3 + ["right"] * 4 + ["left"]
    if pairs:
        headers, align = [*headers, "of pair"], [*align, "right"]
    table = tabulate(rows, headers, "github", disable_numparse=True, colalign=align)
    if pairs:
        note = "The last column is the inner size of the pair in the checkpoint"
        shown = "" if trained else "; rounding is the relative error (Frobenius) of the factors against the pair"
        return f"{table}\n\n{note}{shown}."
    note = (
        "Errors are relative (Frobenius): truncation of the low-rank weight against the dense one, rounding of the "
        "stored factors against the low-rank weight; layers that share a factorization have those of the group. They "
        "are of weights and say little of the model's quality: measure that with `pifa eval`."
    )
    return table if run is None else f"{table}\n\n{note}"
