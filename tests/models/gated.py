"""A block with siblings and a gated MLP for golden files: its line numbers stand in them."""

import torch
import torch.nn.functional as F
from torch import nn


class Gated(nn.Module):
    def __init__(self, width: int = 32, inner: int = 64) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))
