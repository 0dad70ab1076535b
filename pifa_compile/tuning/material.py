"""What factors are trained on and judged by: windows of running text for causal models, lines for others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pifa_compile.compression.blocks import Batch
from pifa_compile.errors import InputError
from pifa_compile.evaluation import check_length, windows_of
from pifa_compile.loading import is_causal
from pifa_compile.texts import names_dataset, read_text
from pifa_compile.tuning.settings import Tuning

#: Of so many windows or lines one is held out, at the end of the text, and no more than MOST_HELD_OUT.
SHARE_HELD_OUT, MOST_HELD_OUT = 16, 32

Items = Sequence[Tensor] | Sequence[str]


@dataclass(frozen=True)
class Material:
    """Windows or lines to train on, and others that are held out.

    together  makes a batch of some of them, on the model's device
    """

    items: Items
    held_out: Items
    together: Callable[[Items], Batch]

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Batches to train on, without an end: all items in random order, again and again."""
        generator, places = torch.Generator().manual_seed(seed), list[int]()
        while True:
            while len(places) < size:
                places += torch.randperm(len(self.items), generator=generator).tolist()
            yield self.together([self.items[i] for i in places[:size]])  # type: ignore[arg-type]
            places = places[size:]

    def judged(self, size: int) -> list[Batch]:
        """Batches of what is held out."""
        return [self.together(self.held_out[i : i + size]) for i in range(0, len(self.held_out), size)]


def read(model: nn.Module, text: Any, tokenizer: Any, how: Tuning) -> Material:
    """What a model is trained on; raises InputError for a text that it cannot be."""
    items, device = _items(model, text, tokenizer, how.length), next(model.parameters()).device
    if len(items) < 2:
        what = f"window of {how.length} tokens" if is_causal(model) else "line"
        raise InputError(f"the text has one {what}, and one to judge by is needed too; give a longer text")

    def together(some: Items) -> Batch:
        if isinstance(some[0], Tensor):
            return {"input_ids": torch.stack([t for t in some if isinstance(t, Tensor)]).to(device)}
        settings = {"padding": True, "truncation": True, "max_length": how.length, "return_tensors": "pt"}
        return {key: t.to(device) for key, t in tokenizer(list(some), **settings).items()}

    count = min(MOST_HELD_OUT, max(1, len(items) // SHARE_HELD_OUT))
    return Material(items[:-count], items[-count:], together)


def _items(model: nn.Module, text: Any, tokenizer: Any, length: int) -> Items:
    """Windows of token ids, or lines."""
    if isinstance(text, Tensor):
        if text.dim() != 2 or text.is_floating_point() or not is_causal(model) or not len(text):
            given = f"{tuple(text.shape)} of {text.dtype} for {type(model).__name__}"
            raise InputError(f"token windows are count x length whole numbers for a causal model, not {given}")
        check_length(model, text.shape[1])
        return list(text.long().clone())  # what was made in inference mode could not be trained on
    if isinstance(text, os.PathLike) or names_dataset(text):
        text = read_text(Path(text) if isinstance(text, os.PathLike) else text)
    texts = [text] if isinstance(text, str) else list(text)
    if not all(isinstance(t, str) for t in texts):
        cure = "give a file (as a Path), texts, or windows of tokens; for other data there is transformers' Trainer"
        raise InputError(f"cannot tune on a {type(text).__name__} of other things than texts; {cure}")
    lines = [line.strip() for t in texts for line in t.splitlines() if line.strip()]
    if not lines:
        raise InputError("the text is empty; give some thousand words")
    if tokenizer is None:
        raise InputError("a text needs a tokenizer; give tune(..., tokenizer=...), or token windows")
    if not is_causal(model):
        return lines
    check_length(model, length)
    return list(windows_of("\n".join(texts), tokenizer, length))


def label_of(text: Any) -> str:
    """What a text is called in reports."""
    if isinstance(text, os.PathLike):
        return Path(text).name
    return str(text) if names_dataset(text) else "given tokens" if isinstance(text, Tensor) else "a given text"
