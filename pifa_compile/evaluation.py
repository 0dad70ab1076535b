"""How good a compressed model still is: perplexity of language models, similarity of sentence embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from pifa_compile.errors import InputError


def windows_of(text: str, tokenizer: Any, length: int = 256, most: int | None = None) -> Tensor:
    """Non-overlapping windows (count x length, int64) of a text, cut from running text without special tokens.

    Raises InputError if the text is shorter than one window.
    """
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    count = min(ids.shape[0] // length, most or ids.shape[0])
    if count == 0:
        raise InputError(f"the text has {ids.shape[0]} tokens, less than one window of {length}; give a longer one")
    windows: Tensor = ids[: count * length].view(count, length)
    return windows


def check_length(model: Any, length: int) -> None:
    """Raise InputError unless a causal model can read windows of this many tokens."""
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if length < 2 or (isinstance(most, int) and length > most):
        raise InputError(f"a window cannot have {length} tokens; give 2 to {most or 'what the model can read'}")


@dataclass(frozen=True, eq=False)
class NextTokens:
    """How a causal model continues windows of text: its perplexity, and its likeliest token at every position that is
    scored (windows x length - 1, int64)."""

    perplexity: float
    choices: Tensor


@torch.no_grad()
def next_tokens(model: Callable[..., Any], windows: Tensor, batch: int = 8) -> NextTokens:
    """Score all tokens of the windows (count x length) but the first of each; perplexity is exp of their mean loss."""
    total, choices = 0.0, []
    for ids in windows.split(batch):
        logits = model(ids).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        total += float(loss)
        choices.append(logits.argmax(-1))
    return NextTokens(perplexity_of(total / windows[:, 1:].numel()), torch.cat(choices))


def perplexity_of(loss: float) -> float:
    """exp of a mean loss in nats; infinite where it is larger than any float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def perplexity(model: Callable[..., Any], windows: Tensor, batch: int = 8) -> float:
    """exp of the mean loss over all tokens of the windows (count x length) but the first of each.

    The last batch is dropped only if it is the smaller one of several, so that a compiled model sees one shape.
    """
    size = min(batch, windows.shape[0])
    return next_tokens(model, windows[: windows.shape[0] // size * size], size).perplexity


def sentence_batches(sentences: Sequence[str], tokenizer: Any, batch: int, length: int = 64) -> list[dict[str, Tensor]]:
    """Tokenised batches of equal shape (batch x length): padded and cut; sentences over a whole batch are dropped."""
    full = len(sentences) // batch * batch
    settings = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    return [dict(tokenizer(list(sentences[i : i + batch]), **settings)) for i in range(0, full, batch)]


@torch.no_grad()
def embed(model: Callable[..., Any], batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """Unit-length sentence embeddings (sentences x width): the mean of the token outputs under the mask."""
    found = []
    for inputs in batches:
        hidden = model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(-1)
        found.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


def similarity(dense: Tensor, compressed: Tensor) -> dict[str, float]:
    """How embeddings (sentences x width, unit length) compare with the dense model's: mean and worst cosine between
    them, and Spearman's rank correlation of the similarities of all pairs of sentences."""
    cosine = (dense * compressed).sum(-1)
    rows, columns = torch.triu_indices(len(dense), len(dense), 1)
    pairs = [(e @ e.T)[rows, columns].cpu().numpy() for e in (dense, compressed)]
    return {
        "mean_cosine": float(cosine.mean()),
        "worst_cosine": float(cosine.min()),
        "rank_correlation": float(spearmanr(*pairs).statistic),
    }


def neighbour_agreement(dense: Tensor, compressed: Tensor) -> float:
    """Share of sentences whose nearest other sentence, by cosine, is the same in both sets of embeddings (sentences x
    width, unit length)."""
    nearest = []
    for embeddings in (dense, compressed):
        similarities = embeddings @ embeddings.T
        similarities.fill_diagonal_(-math.inf)
        nearest.append(similarities.argmax(-1))
    return float((nearest[0] == nearest[1]).double().mean())
