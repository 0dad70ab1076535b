"""What the card can do, measured: bytes per second of a copy, FLOP per second of large matrix products, and how long a
launch takes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bench.gpu.timing import seconds_per_call


@dataclass(frozen=True)
class Roof:
    """Measured bytes per second, FLOP per second by dtype, and seconds of a kernel that has next to nothing to do."""

    bytes_per_second: float
    flop_per_second: dict[str, float] = field(default_factory=dict)
    launch_seconds: float = 0.0

    def seconds(self, nbytes: float, flop: float, dtype: str) -> float:
        """The least time in which the bytes can be moved and the operations done, whichever takes longer."""
        return max(nbytes / self.bytes_per_second, flop / self.flop_per_second[dtype])


def measure(device: str, tiny: bool, dtypes: tuple[torch.dtype, ...]) -> Roof:
    """The roof of a device."""
    size = 1 << (16 if tiny else 30)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    copying = seconds_per_call([lambda: target.copy_(source)], device).median
    rates = {}
    for dtype in dtypes:
        w = 64 if tiny else 8192
        a, b = (torch.randn(w, w, device=device).to(dtype) for _ in range(2))
        rates[str(dtype).removeprefix("torch.")] = 2 * w**3 / seconds_per_call([lambda a=a, b=b: a @ b], device).median
    small = torch.zeros(8, device=device)
    launch = seconds_per_call([lambda: small.add_(1)] * 50, device).median
    return Roof(2 * size / copying, rates, launch)
