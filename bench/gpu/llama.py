"""A model of Llama's shape with random weights and a static cache: plain PyTorch, so that nothing of a model library is
measured, and every call can be captured in a CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu.cases import Case, random_factors
from pifa_compile.factors import Form, rank_for_density
from pifa_compile.modules import PifaLinear


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    name: str
    width: int
    inner: int
    heads: int
    kv_heads: int
    blocks: int
    vocabulary: int


LLAMA_2_7B = Shape("Llama-2-7B", 4096, 11008, 32, 32, 32, 32000)
TINY = Shape("tiny", 64, 160, 4, 2, 2, 100)


@dataclass(frozen=True)
class Weights:
    """How the linear layers of blocks keep their weights; a form other than dense has the rank of a density, or half of
    the full rank."""

    form: Form = "dense"
    density: float | None = None

    def __str__(self) -> str:
        if self.form == "dense":
            return "dense"
        return f"{self.form} {self.density:g}" if self.density else f"{self.form}, r = w/2"

    def linear(self, m: int, n: int, dtype: torch.dtype, device: str) -> nn.Module:
        """A layer with random weights, on the default device, which ``device`` names too."""
        rank = rank_for_density(m, n, self.density, 16, self.form) if self.density else min(m, n) // 2
        if self.form == "pifa":
            return PifaLinear(random_factors(Case("", "", m, n, rank), dtype, device))
        sizes = [(n, m)] if self.form == "dense" else [(n, rank), (rank, m)]
        layers = [nn.Linear(*size, bias=False, dtype=dtype).requires_grad_(False) for size in sizes]
        return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


class Norm(nn.Module):
    """Root mean square normalization."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * self.weight


class Block(nn.Module):
    """One decoder block with its cache, made on the default device, which ``device`` names too."""

    def __init__(
        self, shape: Shape, tokens: int, batch: int, weights: Weights, dtype: torch.dtype, device: str
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = shape.heads, shape.kv_heads, shape.width // shape.heads
        kv = shape.kv_heads * self.head

        def linear(m: int, n: int) -> nn.Module:
            return weights.linear(m, n, dtype, device)

        self.q, self.k, self.v = linear(shape.width, shape.width), linear(kv, shape.width), linear(kv, shape.width)
        self.o = linear(shape.width, shape.width)
        self.gate, self.up = linear(shape.inner, shape.width), linear(shape.inner, shape.width)
        self.down = linear(shape.width, shape.inner)
        self.before, self.between = Norm(shape.width).to(dtype), Norm(shape.width).to(dtype)
        for name in ("cached_k", "cached_v"):
            self.register_buffer(name, torch.zeros(batch, shape.kv_heads, tokens, self.head, dtype=dtype))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """x: batch x tokens x width. Without a mask the tokens see each other causally, with one the cache."""
        batch, tokens, _ = x.shape
        h = self.before(x)
        q, k, v = (t.view(batch, tokens, -1, self.head).transpose(1, 2) for t in (self.q(h), self.k(h), self.v(h)))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        self.cached_k.index_copy_(2, position, k)
        self.cached_v.index_copy_(2, position, v)
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        else:
            grouped = self.heads != self.kv_heads
            y = F.scaled_dot_product_attention(q, self.cached_k, self.cached_v, mask, enable_gqa=grouped)
        x = x + self.o(y.transpose(1, 2).reshape(batch, tokens, -1))
        h = self.between(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Model(nn.Module):
    """Blocks between an embedding and a head; ``run_block`` may be a compiled form of a block's forward."""

    def __init__(
        self, shape: Shape, tokens: int, batch: int, weights: Weights, dtype: torch.dtype, device: str
    ) -> None:
        super().__init__()
        self.shape, self.tokens = shape, tokens
        self.embedding = nn.Embedding(shape.vocabulary, shape.width, dtype=dtype)
        self.blocks = nn.ModuleList(Block(shape, tokens, batch, weights, dtype, device) for _ in range(shape.blocks))
        self.norm = Norm(shape.width).to(dtype)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False, dtype=dtype)
        angles = torch.arange(tokens)[:, None] / 10000 ** (torch.arange(0, shape.width // shape.heads, 2) / 128)
        angles = torch.cat([angles, angles], -1)
        self.register_buffer("cos", angles.cos().to(dtype))
        self.register_buffer("sin", angles.sin().to(dtype))
        self.requires_grad_(False)

    def compile_blocks(self, backend: Any) -> None:
        """Compile the forward of all blocks; they share one compilation, because their weights are inputs of it."""
        for block in self.blocks:
            block.compile(backend=backend, fullgraph=True, dynamic=False)

    def forward(self, words: Tensor, position: Tensor) -> Tensor:
        """Scores of the last token: of a prefill from nothing (several words), or of a decoding step (one word)."""
        mask = None
        if words.shape[1] == 1:
            mask = (torch.arange(self.tokens, device=words.device) <= position)[None, None, None]
        x = self.embedding(words)
        cos, sin = self.cos[position], self.sin[position]
        for block in self.blocks:
            x = block(x, cos, sin, position, mask)
        return self.head(self.norm(x[:, -1:]))

    def linear_bytes(self) -> int:
        """Bytes of the linear layers of the blocks."""
        return sum(
            t.nbytes
            for block in self.blocks
            for name in ("q", "k", "v", "o", "gate", "up", "down")
            for t in [*getattr(block, name).parameters(), *getattr(block, name).buffers()]
        )
