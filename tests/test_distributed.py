"""Models wrapped for several processes: data parallel (DDP) and sharded (FSDP2), two processes over gloo."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters

import pifa_compile
from pifa_compile import PifaLinear, Svd

pytestmark = pytest.mark.slow


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).eval()


def inputs() -> torch.Tensor:
    """Other ones in each process."""
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(dist.get_rank()))


def exact() -> nn.Module:
    """The dense model with the weights that the factors stand for."""
    return pifa_compile.restore_(pifa_compile.apply_(model()))


def close(y, wanted):
    assert torch.allclose(y, wanted, atol=1e-5), float((y - wanted).abs().max())


# --- what each of two processes does ---------------------------------------------------------------------------------


def ddp_transparent():
    from torch.nn.parallel import DistributedDataParallel

    wrapped, x = DistributedDataParallel(model()), inputs()
    compiled = torch.compile(wrapped, backend="pifa", options={"inner": "eager"})
    with torch.no_grad():
        for _ in range(2):
            close(compiled(x), exact()(x))
    assert counters["pifa"]["replaced"] == 4


def ddp_prepared_and_trained():
    """Factors that are trained get the mean of the gradients of both processes."""
    from torch.nn.parallel import DistributedDataParallel

    prepared = pifa_compile.apply_(model(), trainable=True)
    alone = copy.deepcopy(prepared)
    wrapped, x = DistributedDataParallel(prepared), inputs()
    torch.compile(wrapped, backend="pifa", options={"inner": "eager"})(x).square().sum().backward()
    alone(x).square().sum().backward()
    for parameter, own in zip(prepared.parameters(), alone.parameters(), strict=True):
        mean = own.grad.clone()
        dist.all_reduce(mean)
        assert torch.allclose(parameter.grad, mean / 2, atol=1e-4)


def fsdp_transparent():
    """Weights are put together anew for each call: they stay dense, or are trusted to stay what they are."""
    from torch.distributed.fsdp import fully_shard

    wrapped, x = model(), inputs()
    for block in wrapped:
        fully_shard(block)
    fully_shard(wrapped)
    with torch.no_grad():
        compiled = torch.compile(wrapped, backend="pifa", options={"inner": "eager"})
        close(compiled(x), model()(x))
        assert (counters["pifa"]["replaced"], counters["pifa"]["skipped"]) == (0, 2)  # one graph serves both blocks
        rows = pifa_compile.dry_run(wrapped, x).rows
        assert len(rows) == 2 and all("gathered by FSDP for every call" in row["reason"] for row in rows)
        counters.clear()
        torch.compiler.reset()
        compiled = torch.compile(wrapped, backend="pifa", options={"inner": "eager", "staleness": "off"})
        for _ in range(3):
            close(compiled(x), exact()(x))
        assert (counters["pifa"]["replaced"], counters["pifa"]["skipped"]) == (4, 0)


def fsdp_prepared():
    from torch.distributed.fsdp import fully_shard

    wrapped, x = pifa_compile.apply_(model(), trainable=True), inputs()
    alone = copy.deepcopy(wrapped)
    for block in wrapped:
        fully_shard(block)
    fully_shard(wrapped)
    assert all(isinstance(block.up, PifaLinear) for block in wrapped)
    close(wrapped(x), alone(x))
    wrapped(x).square().sum().backward()
    alone(x).square().sum().backward()
    for parameter, own in zip(wrapped.parameters(), alone.parameters(), strict=True):
        mean = own.grad.clone()
        dist.all_reduce(mean)
        assert torch.allclose(parameter.grad.full_tensor(), mean / 2, atol=1e-4)


def sharded_weights_are_left_alone():
    """A DTensor is a part of a weight: it has no content of its own to be known by."""
    from torch.distributed.fsdp import fully_shard

    wrapped = model()
    fully_shard(wrapped)
    report = pifa_compile.compress(wrapped, Svd(density=0.6), store="elsewhere", progress=False)
    assert [r.object for r in report.run.layers] == [None] * 4
    assert all("DTensor" in r.reason for r in report.run.layers)


TASKS = (ddp_transparent, ddp_prepared_and_trained, fsdp_transparent, fsdp_prepared, sharded_weights_are_left_alone)


# --- the test --------------------------------------------------------------------------------------------------------


def main() -> int:
    """One of the processes: every task in turn; those that failed are printed."""
    dist.init_process_group("gloo")
    failed = 0
    for task in TASKS:
        torch.compiler.reset()
        counters.clear()
        try:
            task()
        except Exception:
            failed += 1
            print(f"--- {task.__name__} in process {dist.get_rank()}\n{traceback.format_exc()}", flush=True)
        dist.barrier()
    dist.destroy_process_group()
    return failed


def test_two_processes(store, tmp_path):
    pifa_compile.compress(model(), Svd(density=0.6, rank_multiple=1), progress=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).resolve().parents[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    shared |= {"PYTHONPATH": f"{root}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import sys, test_distributed; sys.exit(test_distributed.main())"]
    started = [
        subprocess.Popen(
            command, env=shared | {"RANK": str(rank)}, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=240)[0].decode() for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(told)
