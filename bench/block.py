"""Seconds and memory of calibrated compression, stage by stage, on one block of the shape of Llama 7B.

    python bench/block.py [--width 4096 --mlp 11008 --heads 32 --windows 16 --length 2048 --pieces 1 --no-solve]

The weights are random and so is the text, which changes no size. Each stage is the code that `compress` runs, with
everything it needs made by the stage before. With ``--pieces k`` only one window in k goes through the stages whose
time is proportional to the tokens; their seconds are multiplied by k, and the table says so. The last lines project 32
such blocks, and say what the memory bound was.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from pifa_compile.compression.blocks import Group, find_stacks, watching, without_cache
from pifa_compile.compression.flows import Plan, TwoFlows, capture, find_plan, input_width
from pifa_compile.compression.gradients import BackwardWalk
from pifa_compile.compression.measure import Measure
from pifa_compile.compression.memory import bound, walk_size
from pifa_compile.compression.moments import SecondMoments
from pifa_compile.compression.mpifa import closed_form, output_weighting, whitened_target
from pifa_compile.compression.whitening import whiten
from pifa_compile.factors import rank_for_density
from pifa_compile.layers import linear_weights
from pifa_compile.pivoting import LowRank, factorize
from pifa_compile.recipes import Mpifa
from pifa_compile.store import Store
from pifa_compile.store.scratch import Scratch

BLOCKS = 32


class Clock:
    """Seconds and peak resident memory of stages; a stage that comes again is added to."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}
        self.base = _status("VmRSS")

    def __call__(self, stage: str, work: Callable[[], Any], scale: float = 1.0) -> Any:
        """What ``work()`` returns; its seconds times ``scale`` are those of the stage."""
        Path("/proc/self/clear_refs").write_text("5")
        begun = time.perf_counter()
        found = work()
        row = self.rows.setdefault(stage, {"seconds": 0.0, "peak": 0.0, "scale": scale})
        row["seconds"] += scale * (time.perf_counter() - begun)
        row["peak"] = max(row["peak"], (_status("VmHWM") - self.base) / 2**30)
        return found


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


def make(options: argparse.Namespace) -> nn.Module:
    """A model of two blocks, the fewest that are repeated; only the last one is timed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=options.mlp,
        num_hidden_layers=2,
        num_attention_heads=options.heads,
        vocab_size=options.vocabulary,
        dtype=options.dtype,
    )
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def main() -> None:
    """Print the table and, as the last line, its rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"width": 4096, "mlp": 11008, "heads": 32, "vocabulary": 32000, "windows": 16, "length": 2048, "pieces": 1}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--no-solve", action="store_true", help="end after the moments")
    parser.add_argument("--density", type=float, default=0.6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        run(options, Path(folder))


def run(options: argparse.Namespace, folder: Path) -> None:
    """All stages of the last block."""
    model = make(options)
    (stack,) = find_stacks(model)
    names = [weight.name for weight in linear_weights(model) if weight.reason is None]
    ids = torch.randint(0, options.vocabulary, (max(1, options.windows // options.pieces), options.length))
    batches = [{"input_ids": part} for part in ids.split(max(1, 2048 // options.length))]
    read: dict[str, int] = {}
    with watching(model, names, lambda name, x: read.__setitem__(name, x.shape[:-1].numel())):
        plan = find_plan(model, [stack], names, {"input_ids": ids[:1]})
    read = {name: rows * len(batches[0]["input_ids"]) for name, rows in read.items()}
    told = walk_size(model, plan, read, batches, Mpifa(density=0.6), blockwise=True, units=lambda _: [])
    scale = options.windows / len(ids)
    clock = Clock()
    with without_cache(model):
        _stages(clock, model, plan, batches, options, folder, scale)
    _report(clock, options, bound(told, "full"), scale)


def _stages(
    clock: Clock,
    model: nn.Module,
    plan: Plan,
    batches: list[dict[str, Tensor]],
    options: argparse.Namespace,
    folder: Path,
    scale: float,
) -> None:
    (stack,), scratch = plan.stacks, Scratch(folder, "bench")
    names = [name for name in _names(plan) if name.startswith(stack.prefixes[1])]
    walk = BackwardWalk(model, stack, names, batches, "full", 0, scratch, torch.device("cpu"))
    # Embedding, two blocks and the loss; a block's share of it is half.
    (rows,) = clock("capture (two blocks and the loss)", lambda: capture(model, plan, batches, {}, walk.forward), scale)
    firsts = [group.names[0] for group in plan.inside[0][1]]
    _, gradients, _ = clock("gradients and input moments", lambda: next(walk.blocks(rows, [firsts, firsts])), scale)
    means = {name: gradients.pop(name).mean_().float() for name in list(gradients)}
    hidden = [scratch.get(f"inputs-0-{number}")[0]["hidden"] for number in range(len(batches))]
    prefix, store = stack.prefixes[1], Store(folder / "store")
    flows = clock(
        "two flows",
        lambda: TwoFlows(stack.blocks[1], 1, rows, hidden, list(hidden), [n.removeprefix(prefix) for n in firsts]),
        scale,
    )
    for group in plan.inside[0][1]:
        moments = clock("moments of both flows", lambda g=group: flows.moments(g.names[0].removeprefix(prefix)), scale)
        if not options.no_solve:
            _solve(clock, model, group, moments, means, store, options)
        del moments


def _names(plan: Plan) -> list[str]:
    return [name for group in plan.groups for name in group.names]


def _solve(
    clock: Clock,
    model: nn.Module,
    group: Group,
    moments: SecondMoments,
    gradients: dict[str, Tensor],
    store: Store,
    options: argparse.Namespace,
) -> None:
    n = input_width(model.get_submodule(group.names[0]))
    moments.gram.diagonal().add_(1e-3 * moments.gram.diagonal().mean())  # as if there were tokens enough for all inputs
    measure = Measure(moments.gram.clone())
    drift = moments.drift_(1.0)
    whitening = clock("whiten", lambda: whiten(moments.take_gram(), max(moments.count, n), overwrite=True))
    for name in group.names:
        weight = model.get_submodule(name).weight.detach()
        weighting = clock("weighting", lambda name=name: output_weighting(gradients.pop(name)))
        target = whitened_target(weight, whitening, drift)
        fitted = clock("solve", lambda t=target, w=weighting: closed_form(t, whitening, w))
        r = rank_for_density(*weight.shape, options.density, 16)
        low: LowRank = clock("truncate", lambda f=fitted, r=r: f.truncate(r))
        made = clock("pivot", lambda low=low, w=weight: factorize(low, w.dtype))
        clock("measure", lambda w=weight, made=made, r=r: measure(w, made.factors.weight(), r))
        clock("store", lambda made=made: store.put_factors(made.factors))


def _report(clock: Clock, options: argparse.Namespace, told: Any, scale: float) -> None:
    shape = f"width {options.width}, MLP {options.mlp}, {options.windows} x {options.length} tokens, {options.dtype}"
    print(f"{shape}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows = [{"stage": stage} | row for stage, row in clock.rows.items()]
    labels = {"seconds": "seconds", "peak": "GiB peak beside the model", "scale": "seconds times"}
    table = [{"stage": r["stage"]} | {labels[key]: r[key] for key in labels} for r in rows]
    print(tabulate(table, "keys", floatfmt=".2f"))
    total = sum(row["seconds"] for row in clock.rows.values())
    what = "moments of one block" if options.no_solve else "one block"
    print(f"{what} {total:.0f} s, {BLOCKS} blocks {BLOCKS * total / 3600:.1f} h; text scaled by {scale:g}")
    print(told)
    print(json.dumps({"rows": rows, "seconds": total, "bound GiB": told.beside / 2**30}))


if __name__ == "__main__":
    main()
