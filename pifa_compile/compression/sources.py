"""Iterables that a user may calibrate on, brought into one of two forms: texts, or batches of keyword arguments.

Taken as they come: lists and generators, torch's DataLoader, Hugging Face's Dataset and IterableDataset.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pifa_compile.compression.blocks import Batch
from pifa_compile.errors import InputError
from pifa_compile.texts import MOST_CHARACTERS, texts_of


def read_source(given: Iterable[Any], model: nn.Module, tokens: int, length: int) -> list[str] | list[Batch]:
    """Texts, or batches to call the model with, from an iterable of any of these, all alike:

    str, list of str       texts, or batches of texts
    mapping with strings   rows of a dataset (or batches of rows): the column ``text``, else the only one of strings;
                           not where there are ``input_ids`` or floating point tensors
    other mappings         keyword arguments of the model; where ``input_ids`` is one row of numbers, a batch of one
    tensor                 the model's first argument
    tuple or list          the first element alone: in torch's data sets the others are labels. For a mask give mappings

    Reading ends when texts have MOST_CHARACTERS, or batches (two at least) have ``tokens`` tokens; a sample of more
    dimensions than tokens and features, such as an image, counts as ``length``. Raises InputError for anything else.
    """
    items = iter(given)
    first = next(items, None)
    if first is None:
        return []
    everything = chain([first], items)
    if isinstance(first, Mapping) and _has_text(first):
        return texts_of(everything)
    if _is_texts(first):
        return _texts(everything)
    found: list[Batch] = []
    seen = 0
    for item in everything:
        found.append(_batch(item, model))
        seen += _tokens(found[-1], length)
        if seen >= tokens and len(found) > 1:
            break
    return found


def _has_text(row: Mapping[str, Any]) -> bool:
    """Whether a mapping is about text: it has some, and nothing that a model could be called with instead."""
    inputs = "input_ids" in row or any(isinstance(v, Tensor) and v.is_floating_point() for v in row.values())
    return not inputs and any(_is_texts(value) for value in row.values())


def _is_texts(item: object) -> bool:
    return isinstance(item, str) or (isinstance(item, list | tuple) and bool(item) and isinstance(item[0], str))


def _texts(items: Iterable[Any]) -> list[str]:
    found: list[str] = []
    size = 0
    for item in items:
        if not _is_texts(item):
            raise InputError(f"there is a {type(item).__name__} among the texts; give texts only")
        new = [item] if isinstance(item, str) else list(item)
        found += new
        size += sum(map(len, new))
        if size >= MOST_CHARACTERS:
            break
    return found


def _batch(item: object, model: nn.Module) -> Batch:
    if isinstance(item, Mapping):
        return _of_one_row(item) if _is_row(item.get("input_ids")) else dict(item)
    value = item[0] if isinstance(item, list | tuple) and item else item
    if not isinstance(value, Tensor) or not value.dim():
        kind = f"{type(item).__name__} with a {type(value).__name__}" if value is not item else type(item).__name__
        raise InputError(f"cannot calibrate on a {kind}; give texts, tensors, or mappings of the model's arguments")
    return {_first_argument(model): value}


def _is_row(value: object) -> bool:
    """Whether token ids are those of one text, not of a batch."""
    if isinstance(value, Tensor):
        return value.dim() == 1
    return isinstance(value, list) and bool(value) and isinstance(value[0], int)


def _of_one_row(row: Mapping[str, Any]) -> Batch:
    """A batch of the row of a tokenised data set; columns that are no numbers are left out."""
    numbers = {key: v for key, v in row.items() if isinstance(v, Tensor) or _is_row(v)}
    return {key: torch.as_tensor(value).unsqueeze(0) for key, value in numbers.items()}


def _first_argument(model: nn.Module) -> str:
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            return name
    raise InputError(f"{type(model).__name__}.forward has no named argument for a tensor; give mappings")


def _tokens(batch: Batch, length: int) -> int:
    """How many tokens a batch has, of which a sample that is no sequence has ``length``."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor):
        return int(mask.sum())
    first = next((v for v in batch.values() if isinstance(v, Tensor) and v.dim()), None)
    if first is None:
        return 0
    if first.dim() > 3:
        return first.shape[0] * length
    return first.shape[:-1].numel() if first.is_floating_point() else first.numel()
