"""Models that somebody else's method made low-rank: their pairs of weights become pivoted factors, exactly.

m = out_features, n = in_features, k = inner size of a pair: y = left (right x + inner bias) + bias, right k x n, left
m x k.

A checkpoint has two weights where the architecture has one linear layer. Under which names is a row of FORMATS; the
rest of it loads as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from pifa_compile.checkpoint import Tensors, checkpoint_files, read_into, tensors_of
from pifa_compile.errors import InputError, WeightError, did_you_mean
from pifa_compile.layers import LinearWeight, linear_weights
from pifa_compile.modules import factored_module
from pifa_compile.pivoting import factorize, low_rank_of_pair
from pifa_compile.prepare import empty_model, set_module

#: Names of the two halves of a layer, the one that is applied first before the other. Of "model.layers.0.mlp.up_proj",
#: {layer} is all, {parent} "model.layers.0.mlp", {name} "up_proj" and {stem} "up".
FORMATS: dict[str, str] = {
    "svd-llm": "{parent}.{stem}_v_proj,{parent}.{stem}_u_proj",
    "asvd": "{layer}.BLinear,{layer}.ALinear",
    "sequential": "{layer}.0,{layer}.1",  # nn.Sequential(nn.Linear, nn.Linear) in the layer's place; LoRD and others
}

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_ADAPTERS = ("lora_A", "lora_B", "base_layer")  # a dense path beside the pair
_COMPUTED = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "position_ids")  # of older checkpoints


@dataclass
class ImportReport:
    """What became of a checkpoint: the prepared model, and a row per layer that had a pair.

    source   the checkpoint's base name; where it lay says nothing elsewhere
    formats  keys of FORMATS, or patterns, that its pairs are named by
    """

    model: nn.Module
    rows: list[dict[str, Any]] = field(default_factory=list)
    source: str = ""
    formats: list[str] = field(default_factory=list)

    def origin(self) -> dict[str, Any]:
        """For ``export``: the checkpoint, its formats, and the inner size and error of every pair."""
        layers = {row["name"]: {"inner": row["inner"], "error": row["error"]} for row in self.rows}
        return {"source": self.source, "formats": self.formats, "layers": layers}

    def to_json(self) -> dict[str, Any]:
        """The rows, and their numbers together."""
        return {"source": self.source, "formats": self.formats, "layers": self.rows, **self._totals()}

    def _totals(self) -> dict[str, int]:
        return {key: sum(row[key] for row in self.rows) for key in ("numbers_dense", "numbers_pair", "numbers")}

    def __str__(self) -> str:
        columns = ("name", "m", "n", "inner", "rank", "form", "numbers_pair", "numbers", "error", "reason")
        text = tabulate([[row[c] for c in columns] for row in self.rows], columns, floatfmt=".2g", intfmt=",")
        dense, pair, now = self._totals().values()
        share = f"{pair / dense:.3f} of the dense layers as pairs, {now / dense:.3f} as factors"
        return f"{text}\n\n{len(self.rows)} layers: {share}"


def import_pairs(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    model: str | os.PathLike[str] | None = None,
    *,
    pattern: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    allow_pickle: bool = False,
) -> ImportReport:
    """A prepared model from a checkpoint with low-rank pairs in the place of linear layers; ``report.model`` has it.

    source        folder or file of safetensors, or a state dict
    model         directory or Hugging Face id with the config of the dense architecture; by default the source's own
    pattern       a key of FORMATS or a text like its values; by default the one that the names fit
    dtype         of the model; by default what its config says
    allow_pickle  also read tensors out of a pickle (never anything else: ``weights_only``)

    Raises InputError for names, shapes and dtypes that do not fit, for tensors that are missing or left over, and for
    adapters, whose layers are a sum.
    """
    shown = "the state dict" if isinstance(source, Mapping) else str(source)
    tensors = _tensors(source, allow_pickle)
    if model is None and isinstance(source, Mapping):
        raise InputError("a state dict does not say of which model it is: give model=, a folder with its config.json")
    made = _architecture(_folder(source) if model is None else model, dtype, named=model is not None)
    wanted = next(made.parameters()).dtype
    places = [weight for weight in linear_weights(made) if weight.layout is not None]
    pairs = {p.name: pair for p in places if (pair := _find(p, tensors, _patterns(pattern))) is not None}
    if not pairs:
        known = ", ".join(f"{name} ({text})" for name, text in FORMATS.items())
        tried = f"the pattern {pattern!r}" if pattern else f"any known format: {known}"
        raise InputError(f"{shown} has no pair of weights for a linear layer of {type(made).__name__} by {tried}")
    named = "a state dict" if isinstance(source, Mapping) else Path(source).expanduser().resolve().name
    formats = sorted({_format_name(pair.pattern) for pair in pairs.values()})
    report = ImportReport(made, source=named, formats=formats)
    for place in places:
        if place.name in pairs:
            report.rows.append(_replace(made, place, pairs[place.name], tensors, wanted, device))
    used = {key for pair in pairs.values() for key in pair.keys(tensors)}
    rest = {key: read for key, read in tensors.items() if key not in used}
    factors = {f"{name}.{key}" for name in pairs for key in made.get_submodule(name).state_dict()}
    unknown = _read_rest(made, rest, shown, device, factors)
    if unknown:
        listed = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        cure = "name the model or the pattern that they belong to"
        raise InputError(f"{shown} has tensors that {type(made).__name__} has no place for: {listed}; {cure}")
    made.to(device).eval()
    return report


# --- what a checkpoint has -------------------------------------------------------------------------------------------


def _tensors(source: str | os.PathLike[str] | Mapping[str, Tensor], allow_pickle: bool) -> Tensors:
    if isinstance(source, Mapping):
        return {key: (lambda t=t: t) for key, t in source.items()}  # type: ignore[misc]
    path = Path(source)
    if path.suffix == ".safetensors":
        return tensors_of([path])
    if path.suffix in _PICKLES:
        return _unpickled(path, allow_pickle)
    pickles = [p for p in sorted(path.glob("*")) if p.suffix in _PICKLES] if path.is_dir() else []
    if pickles and not list(path.glob("*.safetensors")):
        if len(pickles) > 1:
            raise InputError(f"{path} has several pickles: {', '.join(p.name for p in pickles)}; name one of them")
        return _unpickled(pickles[0], allow_pickle)
    return tensors_of(checkpoint_files(source))


def _unpickled(path: Path, allowed: bool) -> Tensors:
    convert = (
        "convert it where it was made: safetensors.torch.save_file({k: v.contiguous() for k, v in "
        "model.state_dict().items()}, 'model.safetensors')"
    )
    if not allowed:
        word = "allow_pickle=True (--allow-pickle) reads the tensors of one that is a state dict, and nothing else"
        raise InputError(f"{path} is a pickle, which can run code of whoever made it; {convert}. {word}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises many kinds
        raise InputError(f"{path} is more than tensors, or damaged, and is not unpickled; {convert}") from error
    for key in ("state_dict", "model"):
        found = found[key] if isinstance(found, Mapping) and isinstance(found.get(key), Mapping) else found
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise InputError(f"{path} is no state dict; {convert}")
    return _tensors(found, allowed)


def _architecture(name: str | os.PathLike[str], dtype: torch.dtype | None, *, named: bool) -> nn.Module:
    """The dense model without memory; a checkpoint's own config may name a class that came with its method."""
    try:
        return empty_model(name, dtype)
    except InputError as error:
        if named:
            raise
        raise InputError(
            f"{error}; name the dense model with model= (--model), a folder with its config.json"
        ) from error


def _folder(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> Path | str:
    assert not isinstance(source, Mapping)
    path = Path(source)
    return path.parent if path.is_file() else str(source)


def _read_rest(
    model: nn.Module, tensors: Tensors, shown: str, device: torch.device | str, factors: set[str]
) -> list[str]:
    """Fill what is not factored; returns the keys of the checkpoint that nothing in the model has a place for."""
    given = {key for key in tensors if key in factors}
    if given:  # a dense weight cannot have such a name
        raise InputError(f"{shown} has {min(given)}: it is in this package's own format; use from_pretrained")
    unknown = read_into(model, tensors, shown, device, lambda name, tensor: None, skip=set())
    return [key for key in unknown if not key.endswith(_COMPUTED)]


# --- pairs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """The names of the two halves, without ``.weight`` and ``.bias``, and the pattern that found them."""

    first: str
    second: str
    pattern: str

    def keys(self, tensors: Tensors) -> Iterator[str]:
        """All tensors that belong to the pair."""
        for half in (self.first, self.second):
            yield from (key for key in (f"{half}.weight", f"{half}.bias") if key in tensors)


def _patterns(given: str | None) -> list[str]:
    if given is None:
        return list(FORMATS.values())
    pattern = FORMATS.get(given, given)
    halves = pattern.split(",")
    fields = set(re.findall(r"\{(\w*)\}", pattern))
    if len(halves) != 2 or not fields & {"layer", "name", "stem"} or not fields <= {"layer", "parent", "name", "stem"}:
        example = "'{layer}.first,{layer}.second' with {layer}, {parent}, {name} or {stem}"
        raise InputError(f"{given!r} is no pattern like {example}{did_you_mean(given, FORMATS)}")
    return [pattern]


def _find(place: LinearWeight, tensors: Tensors, patterns: list[str]) -> _Pair | None:
    """The pair that the checkpoint has for a layer; raises InputError where it has half of one, or several."""
    parent, _, name = place.name.rpartition(".")
    known = {"layer": place.name, "parent": parent, "name": name, "stem": name.removesuffix("_proj")}
    found = []
    for pattern in patterns:
        first, second = (half.strip().format(**known).lstrip(".") for half in pattern.split(","))
        there = [f"{half}.weight" in tensors for half in (first, second)]
        if all(there):
            found.append(_Pair(first, second, pattern))
        elif any(there) and not _is_dense(place, tensors):
            has, misses = (first, second) if there[0] else (second, first)
            raise InputError(f"{place.name}: the checkpoint has {has}.weight but no {misses}.weight")
    adapter = next((a for a in _ADAPTERS if any(key.startswith(f"{place.name}.{a}") for key in tensors)), None)
    if adapter is not None:
        cure = "merge it (merge_and_unload in PEFT) and compress the merged model"
        raise InputError(
            f"{place.name}: {adapter} is of an adapter, a pair beside a dense layer and not in its place; {cure}"
        )
    if len(found) > 1:
        names = " and ".join(f"{pair.first}, {pair.second}" for pair in found)
        raise InputError(f"{place.name}: the checkpoint has several pairs ({names}); name one as pattern")
    return found[0] if found else None


def _format_name(pattern: str) -> str:
    return next((name for name, text in FORMATS.items() if text == pattern), pattern)


def _is_dense(place: LinearWeight, tensors: Tensors) -> bool:
    return f"{place.name}.weight" in tensors


def _replace(
    model: nn.Module,
    place: LinearWeight,
    pair: _Pair,
    tensors: Tensors,
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, Any]:
    """Put the factors of a pair into the layer's place; returns the layer's row."""
    (m, n), module = place.shape, model.get_submodule(place.name)
    if f"{place.name}.weight" in tensors:
        raise InputError(f"{place.name}: the checkpoint has a dense weight and a pair ({pair.first}, {pair.second})")
    right, left = (tensors[f"{half}.weight"]() for half in (pair.first, pair.second))
    _check(place, pair, right, left)
    inner, outer = (
        tensors[key]() if (key := f"{half}.bias") in tensors else None for half in (pair.first, pair.second)
    )
    for bias, size, half in ((inner, right.shape[0], pair.first), (outer, m, pair.second)):
        if bias is not None and tuple(bias.shape) != (size,):
            raise InputError(f"{place.name}: {half}.bias has shape {tuple(bias.shape)}, not ({size},)")
    bias = _bias(left, inner, outer, dtype)
    if bias is None and module._parameters.get("bias") is not None:
        raise InputError(
            f"{place.name}: {type(model).__name__} has a bias there, and the checkpoint has no {pair.second}.bias"
        )
    try:
        made = factorize(low_rank_of_pair(left, right, place.name), dtype)
    except WeightError as error:
        raise InputError(f"{place.name}: {error}") from error
    factors = made.factors.to(device=torch.device(device))
    replacement = factored_module(factors, bias, layout=place.layout, channel=place.channel)
    set_module(model, place.name, replacement.train(module.training))
    k = right.shape[0]
    return {
        "name": place.name, "m": m, "n": n, "inner": k, "rank": factors.rank, "form": factors.form,
        "numbers_dense": m * n, "numbers_pair": k * (m + n), "numbers": factors.numbers,
        "error": made.error, "reason": made.reason,
    }  # fmt: skip


def _check(place: LinearWeight, pair: _Pair, right: Tensor, left: Tensor) -> None:
    (m, n), shapes = place.shape, f"{pair.first}.weight {tuple(right.shape)}, {pair.second}.weight {tuple(left.shape)}"
    for half, t in ((pair.first, right), (pair.second, left)):
        if t.dim() != 2 or not t.is_floating_point():
            cure = "only matrices of floating point numbers can be imported"
            raise InputError(f"{place.name}: {half}.weight is {t.dtype} of shape {tuple(t.shape)}; {cure}")
    if right.dtype != left.dtype:
        raise InputError(f"{place.name}: {pair.first}.weight is {right.dtype}, {pair.second}.weight {left.dtype}")
    if right.shape[1] == n and left.shape[0] == m and right.shape[0] == left.shape[1]:
        return
    if left.shape[1] == n and right.shape[0] == m and left.shape[0] == right.shape[1]:
        cure = f"the other one is applied first: write the pattern the other way round, as in {FORMATS['sequential']!r}"
        raise InputError(f"{place.name}: {shapes} make no {m} x {n} weight in this order; {cure}")
    cure = "name the model that the checkpoint was made of"
    raise InputError(f"{place.name}: {shapes} make no {m} x {n} weight; {cure}")


def _bias(left: Tensor, inner: Tensor | None, outer: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias of both halves together, left inner + outer."""
    if inner is None:
        return None if outer is None else outer.to(dtype)
    moved = left.double() @ inner.double()
    return (moved if outer is None else moved + outer.double()).to(dtype)
