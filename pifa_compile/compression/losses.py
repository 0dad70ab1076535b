"""What a model is differentiated by: its own loss, or random projections of its token outputs.

A causal model has its own loss, the next token of the text, summed over tokens. Any other model has random projections
of its token outputs, one draw of signs per token, as often as it takes to have SAMPLES gradients per output of a layer;
they estimate how far any loss of these outputs can tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pifa_compile.compression.blocks import Batch
from pifa_compile.layers import layout_of, matrix_shape
from pifa_compile.loading import is_causal

#: Gradient samples per output of a layer, at least, where they are made by random projections.
SAMPLES = 4
#: Draws of signs per token at most.
MOST_ROUNDS = 64


def losses(model: nn.Module, output: Any, batch: Batch, generator: torch.Generator, count: int) -> Iterator[Tensor]:
    """The losses of one call of a model: its own one, or ``count`` random projections drawn from ``generator``."""
    if is_causal(model):
        logits = _at_least_float32(output.logits[:, :-1])
        wanted = batch["input_ids"][:, 1:].flatten()
        yield torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum")
        return
    outputs = _at_least_float32(token_outputs(output))
    mask = batch.get("attention_mask")
    for _ in range(count):
        signs = torch.randint(0, 2, outputs.shape, generator=generator).to(outputs) * 2 - 1
        if mask is not None and mask.shape == outputs.shape[:-1]:
            signs = signs * mask.unsqueeze(-1)
        yield (outputs * signs).sum()


def draws(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> int:
    """How many losses of each batch give every layer SAMPLES gradients per output; one for a causal model."""
    if is_causal(model):
        return 1
    widest = max((output_width(model.get_submodule(name)) for name in names), default=1)
    tokens = sum(token_count(batch) for batch in batches)
    return min(MOST_ROUNDS, -(-SAMPLES * widest // max(tokens, 1)))


def token_outputs(output: Any) -> Tensor:
    """The outputs of a model that is no language model: per token where it has them, else whatever comes first."""
    if isinstance(output, Tensor):
        return output
    found: Tensor | None = getattr(output, "last_hidden_state", None)
    if found is None:
        found = next(t for t in _values(output) if isinstance(t, Tensor) and t.is_floating_point())
    return found


def output_width(module: nn.Module) -> int:
    """m of a linear module."""
    layout = layout_of(module)
    assert layout is not None, "only linear modules have an output width"
    assert isinstance(module.weight, Tensor)
    return matrix_shape(module.weight, layout)[0]


def token_count(batch: Batch) -> int:
    """The tokens of a batch that count; its rows where it has no tokens."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return int(mask.sum())
    first = next(v for v in batch.values() if isinstance(v, Tensor))
    return first.numel() if first.dim() <= 2 else int(first.shape[0])


def _values(output: Any) -> Iterable[Any]:
    return output.values() if isinstance(output, Mapping) else output


def _at_least_float32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
