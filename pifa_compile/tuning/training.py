"""The loop: AdamW on float32 copies of what has 16 bits; the best state by the held-out part is kept."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pifa_compile.errors import InputError
from pifa_compile.tuning.material import Material
from pifa_compile.tuning.settings import Tuning, TuningReport
from pifa_compile.tuning.tasks import Task

log = logging.getLogger(__name__)

#: What a loss is multiplied by at first, and its gradients divided by, where float16 would lose them.
FIRST_SCALE = 2.0**12


def train(
    task: Task, material: Material, trained: Sequence[nn.Parameter], how: Tuning, source: str, progress: bool
) -> TuningReport:
    """Train parameters that require gradients, in place; they end in the best state that was measured, or as they were.

    Raises InputError if the loss is not finite before the first step.
    """
    started, judged = time.perf_counter(), material.judged(how.batch)
    before = after = task.measure(judged)
    if not math.isfinite(before["loss"]):
        raise InputError(f"the held-out loss is {before['loss']} before the first step; the model itself is broken")
    masters = _Masters(trained)
    kept, done, best, interrupted = masters.state(), 0, 0, False
    course = [(0, before["loss"])]
    every = max(1, how.steps // how.checks)
    with tqdm(total=how.steps, desc="tune", unit="step", disable=not progress, dynamic_ncols=True) as bar:
        try:
            for loss in _steps(task, material, masters, how):
                done += 1
                if not math.isfinite(loss):
                    log.warning("the loss of step %d is %s: the training ends; use a lower learning rate", done, loss)
                    break
                if done % every == 0 or done == how.steps:
                    found = task.measure(judged)
                    course.append((done, found["loss"]))
                    if found["loss"] < after["loss"]:
                        kept, best, after = masters.state(), done, found
                    bar.set_postfix({"loss": f"{loss:.4f}", "held out": f"{found['loss']:.4f}"}, refresh=False)
                bar.update()
        except KeyboardInterrupt:
            interrupted = True
            log.warning("interrupted after step %d; the best state so far, that of step %d, is kept", done, best)
        finally:
            masters.restore(kept)
    if best == 0:
        cure = "give more steps or text, a larger batch, or a lower learning rate"
        log.warning("no state was better than the start on the held-out text, so the model is as it was; %s", cure)
    return TuningReport(
        tuning=how,
        source=source,
        items=len(material.items),
        held_out=len(material.held_out),
        numbers=sum(p.numel() for p in trained),
        before=before,
        after=after,
        done=done,
        best=best,
        course=course,
        seconds=time.perf_counter() - started,
        interrupted=interrupted,
    )


def _steps(task: Task, material: Material, masters: _Masters, how: Tuning) -> Iterator[float]:
    """Make the steps one by one; gives the loss of each, as it was before."""
    optimizer = torch.optim.AdamW(masters.masters, lr=how.lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, how.rate)
    half = any(p.dtype == torch.float16 for p in masters.parameters)
    scaler = torch.amp.GradScaler(masters.parameters[0].device.type, init_scale=FIRST_SCALE, enabled=half)
    for _, batch in zip(range(how.steps), material.batches(how.batch, how.seed), strict=False):
        loss = task.loss(batch)
        scaler.scale(loss).backward()
        masters.take_gradients()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(masters.masters, how.clip)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
        masters.round()
        yield float(loss.detach())


class _Masters:
    """What the optimizer changes: the parameters, but for those of 16 bits float32 copies that are rounded into them.

    A step is often smaller than half the distance of two 16-bit numbers, and would be lost without the copies.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.masters = [p if p.dtype.itemsize > 2 else p.detach().float().requires_grad_() for p in parameters]
        self._rounded = [(p, m) for p, m in zip(parameters, self.masters, strict=True) if m is not p]

    def take_gradients(self) -> None:
        """Move the gradients of parameters to their copies."""
        for p, master in self._rounded:
            master.grad, p.grad = None if p.grad is None else p.grad.float(), None

    @torch.no_grad()
    def round(self) -> None:
        """Give the parameters what their copies have become."""
        for p, master in self._rounded:
            p.copy_(master)

    def state(self) -> list[Tensor]:
        """The parameters as they are now."""
        return [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def restore(self, state: Sequence[Tensor]) -> None:
        """Make the parameters what they were, and let go of their gradients."""
        for p, kept in zip(self.parameters, state, strict=True):
            p.copy_(kept)
            p.grad = None
