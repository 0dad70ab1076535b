"""Where the gradient moments H of a run are: made from the last block to the first, read from the first to the last.

Prices need H and the input moments of a layer at the same time, the solver needs H again when the forward walk comes to
the layer. For a 7B model H of all layers has 78 GiB in float64, of one block 2.4. So prices come out of the backward
walk, where both moments of one block are at hand, and afterwards a block's H is kept on disk, in float32 (which changes
it by 6e-8 of itself, where a tenth of its mean is added as damping), as long as all of them fit into KEPT_BYTES. Above
that, the gradients at the block's output are kept instead, 0.13 GiB for 16,384 tokens in 16 bit against 1.2 for H, and
one more run of the block forwards and backwards makes H again from them: bit by bit the same, since it is the same
computation on the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pifa_compile.compression.blocks import Batch
from pifa_compile.compression.devices import on_device
from pifa_compile.compression.flows import Captured, Plan
from pifa_compile.compression.gradients import (
    BackwardWalk,
    BlockVisit,
    gradient_moments,
    gradients_name,
    runs_apart,
)
from pifa_compile.compression.losses import output_width
from pifa_compile.compression.memory import KEPT_BYTES
from pifa_compile.compression.moments import GradientMoments, SecondMoments
from pifa_compile.store.scratch import Scratch

_PLAN = "plan"


class OutputMoments:
    """H at the outputs of the layers of one run.

    names    linear modules whose moments are asked for
    form     "full" or "diagonal"
    walked   whether blocks are walked backwards one at a time, see ``blockwise``; else the model has one graph
    again    whether ``of_block`` will be called after the backward walk
    scratch  what is kept there is enough to go on with the run in another process: see ``plan``
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        names: Sequence[str],
        batches: Sequence[Batch],
        *,
        form: str,
        walked: bool,
        seed: int,
        scratch: Scratch,
        device: torch.device,
        again: bool,
    ) -> None:
        self._model, self._names, self._batches = model, names, batches
        self.form, self._seed, self._scratch, self._device, self.again = form, seed, scratch, device, again
        self._walk: BackwardWalk | None = None
        if walked:
            self._walk = BackwardWalk(model, plan.stacks[0], names, batches, form, seed, scratch, device)
        self.kept: dict[str, Tensor] = {}
        self.plan: list[Any] | None = None
        if scratch.has(_PLAN):
            self._resume()

    @property
    def walked(self) -> bool:
        """Whether blocks are walked backwards one at a time; else the whole model has one graph."""
        return self._walk is not None

    def forward(self, batch: Batch) -> None:
        """Run the model on the next batch, for ``capture``; a block-wise backward pass begins here."""
        if self._walk is not None and self.plan is None:
            self._walk.forward(batch)
        else:
            self._model(**batch)

    def blocks(
        self, rows: Sequence[Captured], readers: Sequence[Sequence[str]]
    ) -> Iterator[tuple[int, dict[str, Tensor], dict[str, SecondMoments]]]:
        """The backward pass: each block's number, H at the outputs of its layers, and moments of what ``readers`` read.

        Where blocks are not walked backwards nothing is yielded. ``kept`` is there in the end.
        """
        if self._walk is None:
            with on_device(self._model, self._device):
                found = gradient_moments(self._model, self._names, self._batches, self.form, self._seed)
            self._keep(found)
            return
        for index, sums, moments in self._walk.blocks(rows, readers):
            means = _means(sums)
            if self.again and self._keeps_moments:
                self._scratch.put(f"moments-{index}", means)
            if not self.again or self._keeps_moments:
                self._drop_gradients(index + 1)
            yield index, means, moments
        self._drop_gradients(0)
        self._keep(self._walk.outside)

    def of_block(self, index: int, rows: Sequence[Captured], hidden: Sequence[Tensor]) -> dict[str, Tensor]:
        """H at the outputs of a block's layers, for the solver.

        hidden  what enters the block in the dense model, of every batch
        """
        if self._walk is None:
            return {}
        if self._keeps_moments:
            return self._scratch.get(f"moments-{index}", self._device)[0]
        visit: BlockVisit = self._walk.visit(index)
        for number, (row, states) in enumerate(zip(rows, hidden, strict=True)):
            visit.add(row, states, self._walk.gradients(index + 1, number))
        return _means(visit.found)

    def finish(self, plan: list[Any]) -> None:
        """After the backward pass: remember, for another attempt, what was planned with it (JSON)."""
        self.plan = plan
        self._scratch.put(_PLAN, self.kept, {"plan": self.plan, "files": self._files(), "form": self.form})

    def _resume(self) -> None:
        """Take over what an earlier attempt planned, if all that the walk will read is still there."""
        kept, facts = self._scratch.get(_PLAN, self._device)
        files = self._files()
        if facts["form"] == self.form and facts["files"] == files and all(map(self._scratch.has, files)):
            self.kept, self.plan = kept, facts["plan"]

    def _files(self) -> list[str]:
        """Names in the scratch that ``of_block`` reads."""
        if self._walk is None or not self.again:
            return []
        count = len(self._walk.stack.blocks)
        if self._keeps_moments:
            return [f"moments-{index}" for index in range(count)]
        return [gradients_name(index + 1, number) for index in range(count) for number in range(len(self._batches))]

    @property
    def _keeps_moments(self) -> bool:
        widths = [output_width(self._model.get_submodule(name)) for name in self._names]
        return sum(4 * (m * m if self.form == "full" else m) for m in widths) <= KEPT_BYTES

    def _keep(self, found: dict[str, GradientMoments]) -> None:
        self.kept = _means(found)

    def _drop_gradients(self, k: int) -> None:
        for number in range(len(self._batches)):
            self._scratch.drop(gradients_name(k, number))


def blockwise(model: nn.Module, plan: Plan, names: Sequence[str], batch: Batch) -> bool:
    """Whether gradients can walk the model block by block: it has one stack, which they enter at one place only."""
    if len(plan.stacks) != 1:
        return False
    outside = [name for name in names if not name.startswith(plan.stacks[0].prefixes)]
    return runs_apart(model, plan.stacks[0], outside, batch)


def _means(found: dict[str, GradientMoments]) -> dict[str, Tensor]:
    """H, in float32, of every layer that the loss depends on, as far as the gradients tell. ``found`` is empty then."""
    means: dict[str, Tensor] = {}
    for name in list(found):
        h = found.pop(name).mean_()
        if 0 < float(h.sum() if h.dim() == 1 else h.trace()) < math.inf:
            means[name] = h.float()
    return means
