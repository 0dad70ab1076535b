"""What a model is calibrated on: windows of text, sentences, batches, or text that the model samples itself."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pifa_compile.compression.blocks import Batch
from pifa_compile.compression.sources import read_source
from pifa_compile.digest import digest_many, memory_of
from pifa_compile.errors import InputError
from pifa_compile.evaluation import windows_of
from pifa_compile.loading import is_causal
from pifa_compile.texts import names_dataset, read_text

#: A path, a text, the name of a dataset, texts, windows of token ids (count x length), inputs, or what ``read_source``
#: takes: batches, a DataLoader, rows of a dataset.
Text = str | os.PathLike[str] | Sequence[str] | Tensor | Iterable[Any]

#: Windows or sentences in one call of the model, and tokens if they are longer than that allows: what a block keeps for
#: its backward pass grows with them. Part of what a digest is, since another size rounds differently.
BATCH = 8
BATCH_TOKENS = 2048
#: Of so many windows or sentences one is held out to measure errors on.
HELD_OUT = 16


@dataclass(frozen=True)
class Calibration:
    """Batches to calibrate on and batches held out to measure on, each a mapping of keyword arguments.

    identity  what they are, as JSON, so that a run can be found again
    """

    batches: tuple[Batch, ...]
    held_out: tuple[Batch, ...]
    identity: dict[str, Any]

    def to(self, device: torch.device) -> Calibration:
        """The same with all tensors on a device."""
        moved = [
            tuple({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in part)
            for part in (self.batches, self.held_out)
        ]
        return Calibration(moved[0], moved[1], self.identity)


def calibrate_on(
    model: nn.Module,
    text: Text | None,
    tokenizer: Any = None,
    *,
    windows: int = 64,
    length: int = 256,
    seed: int = 0,
) -> Calibration:
    """The calibration of a model on a text, or on what it samples itself where ``text`` is None (causal models).

    text       a file (as a Path) or dataset (``datasets:NAME``, see ``texts.read_dataset``), a text, texts, token
               windows (count x length), floating point inputs (count x ...), or an iterable of texts, batches or rows
               of a dataset, e.g. a torch DataLoader: see ``sources.read_source``
    tokenizer  needed for text
    windows    how many windows to use at most, spread evenly over the text; of sentences and of batches as many as have
               their tokens
    length     tokens in a window; the most tokens of a sentence

    A causal model reads windows of running text, any other model reads texts one by one (a single text line by line).
    Raises InputError where there is no text, no tokenizer or not even one window.
    """
    if text is None:
        return SelfText(model, windows, length, seed).to(next(model.parameters()).device)
    if isinstance(text, Tensor) and not text.is_floating_point():
        return _windows(_spread(text, windows), "tokens")
    if isinstance(text, str | os.PathLike):
        text = read_text(Path(text)) if isinstance(text, os.PathLike) or names_dataset(text) else text
        pieces: list[Any] = [text] if is_causal(model) else [line.strip() for line in text.splitlines() if line.strip()]
    else:
        given = text.split(BATCH) if isinstance(text, Tensor) else text
        pieces = read_source(given, model, windows * length, length)
    if not any(pieces):
        raise InputError("the calibration text is empty; give some thousand words")
    if not isinstance(pieces[0], str):
        return _calibration(*_apart(pieces), "batches")
    if tokenizer is None:
        raise InputError("a calibration text needs a tokenizer; give compress(..., tokenizer=...), or token windows")
    if is_causal(model):
        found = windows_of("\n".join(pieces), tokenizer, length)
        return _windows(_spread(found, windows), "text")
    most = math.ceil(windows * length / _mean_tokens(pieces, tokenizer, length))
    return _sentences([pieces[i] for i in _places(len(pieces), most)], tokenizer, length)


def _places(count: int, most: int) -> list[int]:
    """``most`` of ``count`` places, spread evenly."""
    taken = min(count, most)
    return [i * count // taken for i in range(taken)]


def _spread(windows: Tensor, most: int) -> Tensor:
    return windows[_places(windows.shape[0], most)]


def _mean_tokens(sentences: Sequence[str], tokenizer: Any, length: int) -> float:
    """Tokens in a sentence, from a thousand of them."""
    sample = [sentences[i] for i in _places(len(sentences), 1000)]
    encoded = tokenizer(sample, padding=True, truncation=True, max_length=length, return_tensors="pt")
    counted = encoded["attention_mask"].sum() if "attention_mask" in encoded else encoded["input_ids"].numel()
    return max(1.0, float(counted) / len(sample))


def _windows(windows: Tensor, source: str) -> Calibration:
    length = windows.shape[1]
    used, held = ([{"input_ids": torch.stack(ids)} for ids in _batches(part, length)] for part in _apart(list(windows)))
    return _calibration(used, held, source)


def _sentences(sentences: Sequence[str], tokenizer: Any, length: int) -> Calibration:
    settings = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    parts = (_batches(part, length) for part in _apart(sentences))
    used, held = ([dict(tokenizer(group, **settings)) for group in groups] for groups in parts)
    return _calibration(used, held, "sentences")


def _apart(items: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What is used, and one in HELD_OUT, at least one of two, that is held out."""
    count = -(-len(items) // HELD_OUT) if len(items) > 1 else 0
    held = {i * len(items) // count + len(items) // count // 2 for i in range(count)}
    return [x for i, x in enumerate(items) if i not in held], [x for i, x in enumerate(items) if i in held]


def _batches(items: Sequence[Any], length: int) -> list[list[Any]]:
    """Items of at most ``length`` tokens, as many together as one call of the model gets."""
    size = max(1, min(BATCH, BATCH_TOKENS // length))
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def _calibration(used: Sequence[Batch], held_out: Sequence[Batch], source: str) -> Calibration:
    if not used:
        raise InputError("there is not one batch to calibrate on; give a longer text")
    facts = {"source": source, "batches": len(used), "held_out": len(held_out), "digest": _digest([*used, *held_out])}
    return Calibration(tuple(used), tuple(held_out), facts)


def _digest(batches: Sequence[Batch]) -> str:
    """Of every tensor that the model is called with."""
    found = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            value = batch[key]
            content = value.detach().cpu().contiguous() if isinstance(value, Tensor) else None
            head = (key, repr(value)) if content is None else (key, str(content.dtype), str(tuple(content.shape)))
            found.update("|".join(head).encode())
            if content is not None:
                found.update(memory_of(content) if content.dim() else repr(content).encode())
    return found.hexdigest()


# --- text that the model samples -------------------------------------------------------------------------------------


class SelfText:
    """Text that a causal model samples itself: known by ``identity`` before it is sampled, which takes a while.

    windows, length  how many windows of how many tokens
    Raises InputError for a model that is not causal: it needs a text.
    """

    def __init__(self, model: nn.Module, windows: int, length: int, seed: int) -> None:
        if not is_causal(model):
            raise InputError(f"{type(model).__name__} cannot sample its own calibration text; give one with text=...")
        self._model, self._sizes = model, {"windows": windows, "length": length, "seed": seed}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the text follows from, as JSON: sizes, seed and the digest of everything in the model."""
        return {"source": "self", "model": _model_digest(self._model), **self._sizes}

    def to(self, device: torch.device) -> Calibration:
        """Sample the text; its tensors are on a device."""
        sampled = sample_windows(self._model, self._sizes["windows"], self._sizes["length"], self._sizes["seed"])
        return replace(_windows(sampled, "self"), identity=self.identity).to(device)


def _model_digest(model: nn.Module) -> str:
    """Of every parameter and buffer and of the configuration, its labels left out."""
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    to_dict = getattr(getattr(model, "config", None), "to_dict", dict)
    settings: dict[str, Any] = to_dict()
    for label in ("_name_or_path", "transformers_version", "architectures", "use_cache"):
        settings.pop(label, None)
    found = dict(zip(tensors, digest_many([t.detach() for t in tensors.values()]), strict=True))
    text = json.dumps([type(model).__name__, settings, found], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@torch.no_grad()
def sample_windows(model: nn.Module, count: int, length: int, seed: int = 0, batch: int = 64) -> Tensor:
    """Windows (count x length) that a causal model samples at temperature 1 from the start of a document."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        sizes = [min(batch, count - start) for start in range(0, count, batch)]
        return torch.cat([_sample(model, size, length, generator, device) for size in sizes])
    finally:
        model.train(training)


def _sample(model: nn.Module, count: int, length: int, generator: torch.Generator, device: torch.device) -> Tensor:
    ids = torch.full((count, 1), start_token(model), dtype=torch.int64, device=device)
    windows, cache = [], None
    for _ in range(length):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        likely = torch.softmax(output.logits[:, -1].double().cpu(), dim=-1)
        ids = torch.multinomial(likely, 1, generator=generator).to(device)
        windows.append(ids)
    return torch.cat(windows, dim=1).cpu()


def start_token(model: nn.Module) -> int:
    """The token that begins a document: that of the beginning of a sequence, else that of its end, else 0."""
    config = getattr(model, "config", None)
    for name in ("bos_token_id", "decoder_start_token_id", "eos_token_id"):
        found = getattr(config, name, None)
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, int):
            return found
    return 0
