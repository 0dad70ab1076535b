"""What a model is moved towards: the next token of a text, or what the dense model makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from pifa_compile.compression.blocks import Batch
from pifa_compile.compression.losses import token_outputs
from pifa_compile.errors import InputError
from pifa_compile.evaluation import embed, similarity
from pifa_compile.loading import is_causal
from pifa_compile.tuning.objectives import divergence, next_token_loss, output_error
from pifa_compile.tuning.settings import Tuning


class Task(Protocol):
    """A model, and what it is moved towards."""

    def loss(self, batch: Batch) -> Tensor:
        """What a step makes smaller."""
        ...

    def measure(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Figures of held-out batches by name, the mean ``loss`` among them."""
        ...


def task_of(model: nn.Module, teacher: nn.Module | None, how: Tuning) -> Task:
    """The task that the settings ask for; raises InputError where the model cannot have it."""
    if how.loss == "lm":
        if not is_causal(model):
            cure = "use Tuning(loss='distill') and give the dense model as teacher=..."
            raise InputError(f"{type(model).__name__} does not continue text, so it has no loss 'lm'; {cure}")
        if teacher is not None:
            raise InputError("the loss 'lm' has no use for a teacher; leave it out, or use Tuning(loss='distill')")
        return _NextTokens(model)
    if teacher is None:
        other = ", or use Tuning(loss='lm')" if is_causal(model) else ""
        raise InputError(f"the loss 'distill' needs the dense model; give it as teacher=...{other}")
    return _Distributions(model, teacher, how) if is_causal(model) else _Outputs(model, teacher)


class _NextTokens:
    """A causal model, moved towards the next token of the text."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def loss(self, batch: Batch) -> Tensor:
        return next_token_loss(_logits(self._model, batch), batch["input_ids"])

    @torch.no_grad()
    def measure(self, batches: Sequence[Batch]) -> dict[str, float]:
        loss = _mean([self.loss(batch) for batch in batches], batches)
        return {"loss": loss, "perplexity": _perplexity(loss)}


class _Distributions:
    """A causal model, moved towards the distribution of the next token that the dense model has."""

    def __init__(self, model: nn.Module, teacher: nn.Module, how: Tuning) -> None:
        self._model, self._teacher, self._how = model, teacher, how

    def loss(self, batch: Batch) -> Tensor:
        logits = _logits(self._model, batch)
        loss = (1 - self._how.mix) * self._divergence(logits, batch)
        return loss + self._how.mix * next_token_loss(logits, batch["input_ids"]) if self._how.mix else loss

    @torch.no_grad()
    def measure(self, batches: Sequence[Batch]) -> dict[str, float]:
        divergences, losses = [], []
        for batch in batches:
            logits = _logits(self._model, batch)
            divergences.append(self._divergence(logits, batch))
            losses.append(next_token_loss(logits, batch["input_ids"]))
        apart, token = _mean(divergences, batches), _mean(losses, batches)
        mixed = (1 - self._how.mix) * apart + self._how.mix * token
        return {"loss": mixed, "perplexity": _perplexity(token), "divergence": apart}

    def _divergence(self, logits: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = _logits(self._teacher, batch)
        _check_shapes(logits, wanted)
        return divergence(logits, wanted, self._how.temperature)


class _Outputs:
    """A model with token outputs, such as an encoder, moved towards those of the dense model."""

    def __init__(self, model: nn.Module, teacher: nn.Module) -> None:
        self._model, self._teacher = model, teacher

    def loss(self, batch: Batch) -> Tensor:
        found = token_outputs(self._model(**batch))
        with torch.no_grad():
            wanted = token_outputs(self._teacher(**batch))
        _check_shapes(found, wanted)
        return output_error(found, wanted, batch.get("attention_mask"))

    @torch.no_grad()
    def measure(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Beside the loss, cosines between the means over the tokens of each line."""
        inputs = [dict(batch) for batch in batches]
        found = similarity(embed(self._teacher, inputs), embed(self._model, inputs))
        cosines = {name: found[name] for name in ("mean_cosine", "worst_cosine")}
        return {"loss": _mean([self.loss(batch) for batch in batches], batches)} | cosines


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    found: Tensor = model(**batch, use_cache=False).logits
    return found


def _check_shapes(found: Tensor, wanted: Tensor) -> None:
    if found.shape != wanted.shape:
        problem = f"the teacher's outputs are {tuple(wanted.shape)}, the model's {tuple(found.shape)}"
        raise InputError(f"{problem}; give the dense model that this one was made of")


def _mean(values: Sequence[Tensor], batches: Sequence[Batch]) -> float:
    """The mean over all windows or lines of means over batches."""
    sizes = [len(batch["input_ids"]) for batch in batches]
    return sum(float(v) * size for v, size in zip(values, sizes, strict=True)) / sum(sizes)


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
