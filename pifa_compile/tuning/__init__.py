"""Tuning: a short training of a prepared model's factors, which wins back a part of what compression lost."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from pifa_compile.errors import InputError
from pifa_compile.modules import factored_layers
from pifa_compile.tuning.material import label_of, read
from pifa_compile.tuning.settings import Tuning, TuningReport
from pifa_compile.tuning.tasks import task_of
from pifa_compile.tuning.training import train

__all__ = ["Tuning", "TuningReport", "tune"]


def tune(
    model: nn.Module,
    tuning: Tuning | None = None,
    *,
    text: str | os.PathLike[str] | Sequence[str] | Tensor,
    tokenizer: Any = None,
    teacher: nn.Module | None = None,
    progress: bool = True,
) -> TuningReport:
    """Train the factors of a prepared model, in place, on a text; it keeps the best state by a held-out part of that.

    model      as ``apply_``, ``load`` or ``from_pretrained`` make it; it runs in eval mode, without dropout
    text       a file (as a Path) or dataset (``datasets:NAME``), a text, texts, or token windows (count x length).
               A causal model reads windows of running text, any other model lines
    tokenizer  needed for text
    teacher    the dense model, for the loss "distill"; a model that is not causal has no other loss

    Where no state is better than the start, the model is as it was, and a warning says so. Ctrl-C ends the training
    early, with the best state so far. The same model, text, settings and threads give the same factors.

    Raises InputError for a model without factored layers, or whose parameters cannot be trained, for a text of less
    than two windows, and for a teacher that is missing, shares what is trained, or has other outputs.
    """
    how = tuning or Tuning()
    with torch.inference_mode(False), torch.enable_grad():
        trained = _trained(model, how.also)
        task = task_of(model, teacher, how)
        if teacher is not None:
            _check_apart(teacher, trained)
        material = read(model, text, tokenizer, how)
        with _only_trained(model, trained.values()), _in_eval_mode(model, teacher):
            return train(task, material, list(trained.values()), how, label_of(text), progress)


def _trained(model: nn.Module, also: Sequence[str]) -> dict[str, nn.Parameter]:
    """By name, each once: the parameters of factored layers, and those that a pattern names."""
    if "_orig_mod" in dict(model.named_children()):
        cure = "give the model itself, compiled in place if at all: model.compile(...)"
        raise InputError(f"torch.compile has wrapped the model; {cure}")
    factored = {id(p) for _, layer in factored_layers(model) for p in layer.parameters()}
    if not factored:
        raise InputError("the model has no factored layers; make them first: pifa_compile.apply_(model)")
    named = dict(model.named_parameters())
    for pattern in also:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise InputError(f"no parameter has a name like {pattern!r}; there is e.g. {next(iter(named))}")
    found = {n: p for n, p in named.items() if id(p) in factored or any(fnmatchcase(n, a) for a in also)}
    for name, p in found.items():
        if p.is_inference():
            cure = "make or load the model outside of it"
            raise InputError(f"{name} was made under torch.inference_mode() and cannot be trained; {cure}")
        if p.is_meta or not p.is_floating_point():
            cure = "load the model with all its weights, in floating point"
            raise InputError(f"{name} is {p.dtype} on {p.device} and cannot be trained; {cure}")
    return found


def _check_apart(teacher: nn.Module, trained: dict[str, nn.Parameter]) -> None:
    own = {id(p) for p in teacher.parameters()}
    shared = next((name for name, p in trained.items() if id(p) in own), None)
    if shared is not None:
        cure = "prepare a copy: pifa_compile.apply_(copy.deepcopy(model))"
        raise InputError(f"{shared} is the teacher's own too, and would change under it; {cure}")


@contextmanager
def _only_trained(model: nn.Module, trained: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, these parameters alone require gradients."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)
        yield
    finally:
        for p, required in before:
            p.requires_grad_(required)


@contextmanager
def _in_eval_mode(*models: nn.Module | None) -> Iterator[None]:
    """Inside, the models run without dropout and with the statistics that they have."""
    before = [(module, module.training) for model in models if model is not None for module in model.modules()]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training
