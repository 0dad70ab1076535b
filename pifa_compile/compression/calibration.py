"""What a model is calibrated on: windows of text, sentences, batches, or text that the model samples itself."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pifa_compile.compression.blocks import Batch, token_rows, without_cache
from pifa_compile.compression.moments import GradientMoments
from pifa_compile.errors import InputError
from pifa_compile.evaluation import windows_of
from pifa_compile.layers import layout_of, matrix_shape
from pifa_compile.loading import is_causal
from pifa_compile.texts import read_text

#: A path, a text, texts, windows of token ids (count x length), or ready batches of keyword arguments.
Text = str | os.PathLike[str] | Sequence[str] | Tensor | Iterable[Mapping[str, Any]]

#: Windows or sentences in one call of the model. Part of what a digest is: another size rounds differently.
BATCH = 8
#: Of so many windows or sentences one is held out to measure errors on.
HELD_OUT = 16
#: Gradient samples per output of a layer, at least, where they are made by random projections.
SAMPLES = 4


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

    text       a file (as a Path), a text, a list of texts, token windows (count x length), or ready batches
    tokenizer  needed for text
    windows    how many windows to use at most, spread evenly over the text; of sentences as many as have their tokens
    length     tokens in a window; the most tokens of a sentence

    A causal model reads windows of running text, any other model reads texts one by one (a single text line by line).
    Raises InputError where there is no text, no tokenizer or not even one window.
    """
    if text is None:
        sampled = sample_windows(model, windows, length, seed)
        return _windows(sampled, "self")
    if isinstance(text, Tensor):
        return _windows(_spread(text, windows), "tokens")
    if isinstance(text, str | os.PathLike):
        text = read_text(Path(text)) if isinstance(text, os.PathLike) else text
        pieces: list[Any] = [text] if is_causal(model) else [line.strip() for line in text.splitlines() if line.strip()]
    else:
        pieces = list(text)
    if not any(pieces):
        raise InputError("the calibration text is empty; give some thousand words")
    if not isinstance(pieces[0], str):
        return _calibration(*_apart([dict(batch) for batch in pieces]), "batches")
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
    used, held = ([{"input_ids": torch.stack(ids)} for ids in _batches(part)] for part in _apart(list(windows)))
    return _calibration(used, held, source)


def _sentences(sentences: Sequence[str], tokenizer: Any, length: int) -> Calibration:
    settings = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    used, held = ([dict(tokenizer(group, **settings)) for group in _batches(part)] for part in _apart(sentences))
    return _calibration(used, held, "sentences")


def _apart(items: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What is used, and one in HELD_OUT, at least one of two, that is held out."""
    count = -(-len(items) // HELD_OUT) if len(items) > 1 else 0
    held = {i * len(items) // count + len(items) // count // 2 for i in range(count)}
    return [x for i, x in enumerate(items) if i not in held], [x for i, x in enumerate(items) if i in held]


def _batches(items: Sequence[Any]) -> list[list[Any]]:
    return [list(items[i : i + BATCH]) for i in range(0, len(items), BATCH)]


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
                found.update(content.view(torch.uint8).numpy().tobytes() if content.dim() else repr(content).encode())
    return found.hexdigest()


# --- text that the model samples -------------------------------------------------------------------------------------


@torch.no_grad()
def sample_windows(model: nn.Module, count: int, length: int, seed: int = 0, batch: int = 64) -> Tensor:
    """Windows (count x length) that a causal model samples at temperature 1 from the start of a document.

    Raises InputError for a model that is not causal: it needs a text.
    """
    if not is_causal(model):
        raise InputError(f"{type(model).__name__} cannot sample its own calibration text; give one with text=...")
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


# --- gradients of the loss at every output ---------------------------------------------------------------------------


def gradient_moments(
    model: nn.Module, names: Sequence[str], batches: Sequence[Batch], form: str = "full", seed: int = 0
) -> dict[str, GradientMoments]:
    """E[g g^T] at the output of each named linear module, g the gradient of the loss summed over tokens.

    A causal model has its own loss, the next token of the text. Any other model has random projections of its token
    outputs, one draw of signs per token, as often as it takes to have SAMPLES gradients per output; they estimate how
    far any loss of these outputs can tell. Modules that no gradient reaches are missing from the result.
    """
    found: dict[str, GradientMoments] = {}
    generator = torch.Generator().manual_seed(seed)
    with without_cache(model), _frozen(model), ExitStack() as hooks:
        mask: list[Tensor | None] = [None]
        for name in names:
            module = model.get_submodule(name)
            hooks.callback(module.register_forward_hook(_gradient_hook(found, name, form, mask)).remove)
        for _ in range(_rounds(model, names, batches)):
            for batch in batches:
                mask[0] = batch.get("attention_mask")
                with torch.enable_grad():
                    _loss(model, batch, generator).backward()
    return {name: moments for name, moments in found.items() if moments.samples}


def _gradient_hook(found: dict[str, GradientMoments], name: str, form: str, mask: list[Tensor | None]) -> Any:
    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_().clone()  # a leaf could not be changed in place later on

        def add(gradient: Tensor) -> None:
            rows = token_rows(gradient, module, mask[0])
            if name not in found:
                found[name] = GradientMoments(rows.shape[-1], form, rows.device)
            found[name].add(rows)

        output.register_hook(add)
        return output

    return hook


class _frozen:
    """Inside it no parameter asks for a gradient, so that the backward pass makes those of the outputs only."""

    def __init__(self, model: nn.Module) -> None:
        self._trainable = [p for p in model.parameters() if p.requires_grad]

    def __enter__(self) -> None:
        for p in self._trainable:
            p.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for p in self._trainable:
            p.requires_grad_(True)


def _loss(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    output = model(**batch)
    if is_causal(model):
        ids = batch["input_ids"]
        logits = output.logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    outputs = token_outputs(output).float()
    signs = torch.randint(0, 2, outputs.shape, generator=generator).to(outputs) * 2 - 1
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == outputs.shape[:-1]:
        signs = signs * mask.unsqueeze(-1)
    return (outputs * signs).sum()


def token_outputs(output: Any) -> Tensor:
    """The outputs of a model that is no language model: per token where it has them, else whatever comes first."""
    if isinstance(output, Tensor):
        return output
    found: Tensor | None = getattr(output, "last_hidden_state", None)
    if found is None:
        found = next(t for t in _values(output) if isinstance(t, Tensor) and t.is_floating_point())
    return found


def _values(output: Any) -> Iterable[Any]:
    return output.values() if isinstance(output, Mapping) else output


def _rounds(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> int:
    """How many draws of signs per token give every layer SAMPLES gradients per output; one for a causal model."""
    if is_causal(model):
        return 1
    widest = max((_width(model.get_submodule(name)) for name in names), default=1)
    tokens = sum(_tokens(batch) for batch in batches)
    return min(64, -(-SAMPLES * widest // max(tokens, 1)))


def _width(module: nn.Module) -> int:
    """m of a linear module."""
    layout = layout_of(module)
    assert layout is not None, "only linear modules have an output width"
    assert isinstance(module.weight, Tensor)
    return matrix_shape(module.weight, layout)[0]


def _tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    if mask is not None:
        return int(mask.sum())
    first = next(v for v in batch.values() if isinstance(v, Tensor))
    return first.numel() if first.dim() <= 2 else int(first.shape[0])
