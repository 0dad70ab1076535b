"""Hugging Face checkpoints read tensor by tensor, so that a weight that is not wanted is never held."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pifa_compile.errors import InputError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def checkpoint_files(source: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files of a directory or Hugging Face id; raises InputError if there are none."""
    folder = Path(source)
    if not folder.is_dir():
        folder = _snapshot(str(source))
    if (folder / _INDEX).is_file():
        return _shards(folder / _INDEX)
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    raise InputError(f"{source} has no {_SINGLE}; save it with model.save_pretrained(..., safe_serialization=True)")


def _shards(index: Path) -> list[Path]:
    """The files that an index names, all of them beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is no index of a checkpoint's files; get it or save the model again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index} names {name!r}, which is not a file beside it; get it or save the model again")
        if not (index.parent / name).is_file():
            raise InputError(f"{index} names {name}, which is not there; get it or save the model again")
    return [index.parent / name for name in names]


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub raises many kinds, all of which mean: not there
        first = str(error).strip().splitlines()[0]
        raise InputError(f"cannot load the checkpoint {name}: {first}") from error


Tensors = Mapping[str, Callable[[], Tensor]]


def tensors_of(files: Sequence[Path]) -> Tensors:
    """What reads each tensor of safetensors files, by its key; raises InputError for a file that is damaged."""
    found: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                keys = list(opened.keys())
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} is no safetensors file, or is damaged: {error}") from error
        found |= {key: functools.partial(_read, file, key) for key in keys}
    return found


def read_into(
    model: nn.Module,
    tensors: Tensors,
    source: str | os.PathLike[str],
    device: torch.device | str,
    inspect: Callable[[str, Tensor], None],
    skip: set[str],
) -> list[str]:
    """Fill the meta parameters and buffers of ``model`` from a checkpoint, tensor by tensor, in the model's dtypes.

    source   the checkpoint's name, for messages
    skip     names that are shown to ``inspect`` one at a time and let go

    Returns the keys that the model has no place for. Raises InputError naming what the checkpoint has not. Tied weights
    are tied again afterwards.
    """
    wanted = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    names = set(wanted) | skip
    prefix = getattr(model, "base_model_prefix", "") + "."
    seen: set[str] = set()
    unknown: list[str] = []
    for key, read in tensors.items():
        name = next((n for n in (key, prefix + key, key.removeprefix(prefix)) if n in names), None)
        if name is None:
            unknown.append(key)
            continue
        seen.add(name)
        tensor = read()
        if name in skip:
            inspect(name, tensor)
        elif tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)} in {source}, and {tuple(wanted[name].shape)} in {type(model).__name__}"
            raise InputError(f"{name} is {shapes}; name the model that the checkpoint belongs to")
        else:
            _assign(model, name, tensor.to(device=device, dtype=wanted[name].dtype, copy=True))
        del tensor
    if callable(tie := getattr(model, "tie_weights", None)):
        tie()
    left = [name for name, p in model.named_parameters() if p.is_meta]
    if left or skip - seen:
        absent = ", ".join(sorted({*left, *(skip - seen)})[:5])
        cure = "where transformers loads it all the same, do so and use apply_"
        raise InputError(f"the checkpoint {source} has no {absent}; {cure}")
    return unknown


def _read(file: Path, key: str) -> Tensor:
    """One tensor through a mapping of its own: pages that were read count as memory until their mapping ends."""
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(key)
        return tensor


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, last = name.rpartition(".")
    module: Any = model.get_submodule(path)
    if last in module._parameters:
        module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[last] = tensor
