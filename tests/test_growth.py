"""Nothing piles up: not over calls of compiled code, and not over compilations that are thrown away."""

from __future__ import annotations

import gc

import psutil
import pytest
import torch
from torch import Tensor, nn

import pifa_compile
from pifa_compile import Svd

WIDTH = 512
FACTORS = 2 * 4 * 0.5 * WIDTH * 2 * WIDTH  # bytes of the factors of the model at density 0.5
NOISE = 8e6  # bytes by which the process grows without any compiled code: what looks for tensors, and torch itself


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.fixture(params=["transparent", "prepared"])
def model(request):
    made = Mlp().eval()
    pifa_compile.compress(made, Svd(density=0.5), progress=False)
    return made if request.param == "transparent" else pifa_compile.apply_(made)


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return psutil.Process().memory_info().rss


def living() -> tuple[int, int]:
    """How many tensors there are, and the bytes that they hold, shared ones once."""
    gc.collect()
    found = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and type(o) in (Tensor, nn.Parameter)]
    found = [t for t in found if t.layout == torch.strided]  # others, of whoever ran before, have no storage
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found if t.device.type == "cpu"}
    return len(found), sum(storages.values())


@torch.no_grad()
def test_a_thousand_calls_leave_nothing_behind(model):
    compiled = torch.compile(model, backend="pifa")
    inputs = [torch.randn(size, WIDTH) for size in (2, 3, 7, 30)]
    for number in range(100):
        compiled(inputs[number % 4])
    tensors, before = living(), resident()
    for number in range(1000):
        compiled(inputs[number % 4])
    assert living() == tensors
    assert resident() - before < NOISE, "the inputs alone have 21 MB"


@pytest.mark.parametrize(
    ("cycles", "inner"), [(8, "eager"), pytest.param(50, "inductor", marks=pytest.mark.slow)], ids=["few", "many"]
)
@torch.no_grad()
def test_compilations_that_are_thrown_away_leave_nothing_behind(model, cycles, inner):
    x = torch.randn(3, WIDTH)

    def cycle():
        torch.compile(model, backend="pifa", options={"inner": inner})(x)
        torch.compiler.reset()

    for _ in range(3):
        cycle()
    tensors, before = living(), resident()
    for _ in range(cycles):
        cycle()
    count, held = living()
    assert held <= tensors[1], "factors of earlier compilations are still there"
    assert count <= tensors[0]
    assert resident() - before < cycles * FACTORS / 4 + NOISE  # torch itself keeps some code of each compilation


@torch.no_grad()
def test_factors_are_let_go_with_the_compiled_code(model):
    before = living()[1]
    compiled = torch.compile(model, backend="pifa", options={"inner": "eager"})
    compiled(torch.randn(3, WIDTH))
    del compiled
    torch.compiler.reset()
    assert living()[1] <= before + 4 * 3 * WIDTH
