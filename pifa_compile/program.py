"""Prepared models as programs of ``torch.export``: they run where neither this package nor the model's code is.

Factored layers are exported as what they are, two linear functions and a gather, in operators of torch alone.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pifa_compile import _torch
from pifa_compile.errors import InputError
from pifa_compile.modules import factored_layers


def export_program(model: nn.Module, inputs: Mapping[str, Tensor]) -> ExportedProgram:
    """The program of a prepared model: a function of a dictionary of tensors that gives a dictionary of tensors.

    inputs  for one call, by the names of forward's arguments, with at least two entries in a batch

    The batch, dimension 0 of every input, may have any size. So may dimension 1 of inputs of whole numbers (tokens),
    unless the model fixes it. Raises InputError for a model without factored layers, and where tracing fails.
    """
    if not any(True for _ in factored_layers(model)):
        raise InputError("the model has no factored layers; make them first: pifa_compile.apply_(model)")
    batch = Dim("batch")
    shapes = {key: {0: batch} | ({1: Dim.AUTO} if _is_tokens(t) else {}) for key, t in inputs.items()}
    with torch.no_grad(), _without_cache(model):
        try:
            return torch.export.export(_Named(model), (dict(inputs),), dynamic_shapes=(shapes,))
        except Exception as error:  # tracing raises many kinds, all of which mean that this model cannot be exported
            first = str(error).strip().splitlines()[0]
            raise InputError(f"{type(model).__name__} cannot be exported by this release of torch: {first}") from error


def save_program(program: ExportedProgram, path: str | os.PathLike[str], *, compiled: bool = False) -> Path:
    """Write a program to a new file that ends in .pt2; returns its path.

    compiled  False: for ``torch.export.load(path).module()``, on any machine. True: compiled ahead of time by
              AOTInductor for this one, for ``torch._inductor.aoti_load_package(path)``
    """
    out = Path(path).expanduser()
    if out.suffix != ".pt2" or out.exists():
        raise InputError(f"{out} is there already; name a new file" if out.exists() else f"{out} must end in .pt2")
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_name(f".{uuid.uuid4().hex}{out.suffix}")
    try:
        if compiled:
            _torch.compile_package(program, new)
        else:
            torch.export.save(program, new)
        new.replace(out)  # whole or not at all
    finally:
        new.unlink(missing_ok=True)
    return out


class _Named(nn.Module):
    """A model as a function of one dictionary, with no classes of its own in what it takes and gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the output by their names; of an output without names, by their places."""
        output = self.model(**inputs)
        if isinstance(output, Tensor):
            output = (output,)
        named = output if isinstance(output, Mapping) else {str(i): t for i, t in enumerate(output)}
        return {key: t for key, t in named.items() if isinstance(t, Tensor)}


def _is_tokens(t: Tensor) -> bool:
    return t.dim() == 2 and not t.is_floating_point()


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """A transformers model inside keeps no keys and values: a program has no state."""
    config: Any = getattr(model, "config", None)
    with ExitStack() as stack:
        if getattr(config, "use_cache", None):
            stack.enter_context(mock.patch.object(config, "use_cache", False))
        yield
