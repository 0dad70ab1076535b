"""Hugging Face checkpoints read tensor by tensor, so that a weight that is not wanted is never held."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pifa_compile.errors import InputError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def checkpoint_files(source: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files of a directory or Hugging Face id; raises InputError if there are none."""
    folder = Path(source)
    if not folder.is_dir():
        folder = _snapshot(str(source))
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text())
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    raise InputError(f"{source} has no {_SINGLE}; save it with model.save_pretrained(..., safe_serialization=True)")


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub raises many kinds, all of which mean: not there
        first = str(error).strip().splitlines()[0]
        raise InputError(f"cannot load the checkpoint {name}: {first}") from error


def read_into(
    model: nn.Module,
    files: list[Path],
    device: torch.device | str,
    inspect: Callable[[str, Tensor], None],
    skip: set[str],
) -> None:
    """Fill the meta parameters and buffers of ``model`` from checkpoint files, tensor by tensor, in the model's dtypes.

    skip     names that are shown to ``inspect`` one at a time and let go
    Raises InputError naming what the checkpoint has not. Tied weights are tied again afterwards.
    """
    wanted = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    names = set(wanted) | skip
    prefix = getattr(model, "base_model_prefix", "") + "."
    seen: set[str] = set()
    for key, read in _tensors(files):
        name = next((n for n in (key, prefix + key, key.removeprefix(prefix)) if n in names), None)
        if name is None:
            continue
        seen.add(name)
        tensor = read()
        if name in skip:
            inspect(name, tensor)
        else:
            _assign(model, name, tensor.to(device=device, dtype=wanted[name].dtype, copy=True))
        del tensor
    if callable(tie := getattr(model, "tie_weights", None)):
        tie()
    left = [name for name, p in model.named_parameters() if p.is_meta]
    if left or skip - seen:
        absent = ", ".join(sorted({*left, *(skip - seen)})[:5])
        raise InputError(f"the checkpoint {files[0].parent} has no {absent}; load the model and use apply_ instead")


def _tensors(files: list[Path]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            keys = list(opened.keys())
        for key in keys:
            yield key, functools.partial(_read, file, key)


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
