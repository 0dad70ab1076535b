"""Whole blocks and models through the backend, against dense compiled alike; and how long compiling takes."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from pifa_compile import _torch
from pifa_compile.bench.factors import put_random_factors
from pifa_compile.bench.report import Report, Row
from pifa_compile.bench.timing import beyond_caches, in_turns
from pifa_compile.errors import InputError, did_you_mean
from pifa_compile.loading import load_model
from pifa_compile.passes import lookup, pipeline
from pifa_compile.prepare import apply_, restore_
from pifa_compile.store import Store

#: Blocks that take turns at most: all of them are compiled.
MOST_BLOCKS = 8

LAYER_COLUMNS = (
    "model", "dtype", "density", "N", "freezing", "without", "ms dense", "ms", "of dense", "error", "right",
)  # fmt: skip
COMPILE_COLUMNS = ("model", "caches", "s dense", "s", "of dense", "s hashing", "s reading")


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), as in Llama."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return down


class Mlp(nn.Module):
    """down(gelu(up(x))), as in BERT and GPT-2."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return down


class Block(nn.Module):
    """A Llama-shaped block: attention with heads of 64 and a gated MLP, each behind a norm and beside a residual.

    x has a batch dimension, as in a model: without it attention is no fused kernel.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.mlp = GatedMlp(width, inner)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        q, k, v = (p(h).unflatten(-1, (-1, 64)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norms[1](x))
        return out


class Several(nn.Module):
    """Blocks with weights of their own, each on an input of its own, so that they are no siblings."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [block(x) for block, x in zip(self.blocks, inputs, strict=True)]


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "mlp-1024": lambda: Mlp(1024, 4096),
    "mlp-2048": lambda: Mlp(2048, 8192),
    "gated-2048": lambda: GatedMlp(2048, 5504),
    "gated-4096": lambda: GatedMlp(4096, 11008),
    "block-1024": lambda: Block(1024, 2816),
    "block-2048": lambda: Block(2048, 5504),
}


def bench_layers(
    blocks: Sequence[str],
    *,
    densities: Sequence[float] = (0.55,),
    tokens: Sequence[int] = (1, 128, 512),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    freezing: Sequence[bool] = (False, True),
    without: Sequence[str] = (),
    rounds: int = 5,
    cold: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Time named blocks of layers, transparent through the backend, with random factors of the density's ranks.

    N        tokens, in one sequence
    without  names of graph passes: for each there are rows in which it is left out
    cold     several blocks take turns, so that weights come from memory; else one, with what the caches hold of it
    """
    caches = "cold" if cold else "warm"
    report = Report(f"blocks of layers, caches {caches}, medians of {rounds} turns", LAYER_COLUMNS)
    for name, dtype in product(blocks, dtypes):
        if name not in BLOCKS:
            raise InputError(f"no block named {name!r}; known: {', '.join(BLOCKS)}{did_you_mean(name, BLOCKS)}")
        say(f"{name}, {_torch.dtype_name(dtype)}")
        torch.manual_seed(0)
        for density in densities:
            first = BLOCKS[name]()
            size = density * dtype.itemsize * sum(p.numel() for p in first.parameters())
            count = beyond_caches(size, MOST_BLOCKS) if cold else 1
            model = Several([first, *(BLOCKS[name]() for _ in range(count - 1))]).to(dtype).requires_grad_(False).eval()
            width = next(p.shape[1] for p in model.parameters() if p.dim() == 2)
            inputs = {N: {"inputs": [torch.randn(1, N, width).to(dtype) for _ in range(count)]} for N in tokens}
            report.rows += _compare(name, model, inputs, density, freezing, rounds, without, count)
    return report


def bench_model(
    name: str,
    *,
    densities: Sequence[float] = (0.8, 0.6),
    batches: Sequence[int] = (1, 32),
    length: int = 64,
    dtype: torch.dtype | None = None,
    freezing: Sequence[bool] = (False,),
    without: Sequence[str] = (),
    rounds: int = 5,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Time a model that reads text, end to end, at batches of ``length`` random tokens.

    name     a directory, a Hugging Face id, or one of RANDOM: a small model with random weights
    without  names of graph passes: for each there are rows in which it is left out
    """
    report = Report(f"{name} end to end, {length} tokens a sequence, medians of {rounds} turns", LAYER_COLUMNS)
    model = _model(name, dtype)
    inputs = {b: {"input_ids": torch.randint(1, 99, (b, length))} for b in batches}
    for density in densities:
        say(f"density {density:g}")
        report.rows += _compare(name, model, inputs, density, freezing, rounds, without)
    report.notes.append("N counts sequences; factors are random, so this is about time alone")
    return report


def _compare(
    name: str,
    model: nn.Module,
    inputs: Mapping[int, Mapping[str, Any]],
    density: float,
    freezing: Sequence[bool],
    rounds: int,
    without: Sequence[str],
    blocks: int = 1,
) -> list[Row]:
    """Rows of times per block, of so many that the model has."""
    if unknown := sorted(set(without) - set(OPTIONAL)):
        raise InputError(f"no pass {unknown[0]!r} can be left out; those that can: {', '.join(OPTIONAL)}")
    rows: list[Row] = []
    dtype = next(model.parameters()).dtype
    with tempfile.TemporaryDirectory() as folder:
        put_random_factors(model, density, Store(Path(folder)))
        exact = restore_(apply_(copy.deepcopy(model), store=folder)).double()
        for frozen, (N, given) in product(freezing, inputs.items()):
            torch.compiler.reset()
            with torch.no_grad():
                options: dict[str, Any] = {"store": folder, "freezing": frozen}
                dense = torch.compile(_torch.own_frame(model), dynamic=False)
                runs, errors = {"dense": functools.partial(dense, **given)}, {}
                with _torch.freezing(frozen):  # of the model's own parameters, which Dynamo must know of
                    runs["dense"]()
                wanted = exact(**_in_double(given))
                for left_out in ("", *without):
                    ours = torch.compile(_torch.own_frame(model), backend="pifa", dynamic=False, options=options)
                    runs[left_out] = functools.partial(ours, **given)
                    with _without(left_out):
                        errors[left_out] = _error(runs[left_out](), wanted)
                taken = {run: took / blocks for run, took in in_turns(runs, rounds=rounds, seconds=0.2).items()}
            known = {"model": name, "blocks": blocks, "dtype": _torch.dtype_name(dtype), "density": density}
            known |= {"N": N, "freezing": frozen}
            rows += [
                known
                | {"without": left_out, "ms dense": taken["dense"] * 1e3, "ms": taken[left_out] * 1e3}
                | {"of dense": taken[left_out] / taken["dense"], "error": error}
                | {"right": error < (1e-4 if dtype == torch.float32 else 5e-2)}
                for left_out, error in errors.items()
            ]
    return rows


#: Passes that only make a graph faster.
OPTIONAL = ("fold", "group", "decompose")


@contextmanager
def _without(name: str) -> Iterator[None]:
    """Inside, graphs are compiled without the pass of this name."""
    steps = pipeline.PIPELINE
    pipeline.PIPELINE = tuple(step for step in steps if step.name != name)
    try:
        yield
    finally:
        pipeline.PIPELINE = steps


def _in_double(given: Mapping[str, Any]) -> dict[str, Any]:
    def double(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t

    return {name: double(t) if isinstance(t, Tensor) else [*map(double, t)] for name, t in given.items()}


def _error(found: Any, wanted: Any) -> float:
    """Relative difference of the (first) output."""
    a, b = (y if isinstance(y, Tensor) else y[0] for y in (found, wanted))
    return float((a.double() - b.double()).norm() / b.double().norm())


#: Small models with random weights, by name: the keyword arguments of a LlamaConfig.
RANDOM: dict[str, dict[str, Any]] = {
    "random-llama-256": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4},
    "random-llama-1024": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4},
    "random-llama-1024x16": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16},
}


def _model(name: str, dtype: torch.dtype | None) -> nn.Module:
    if name in RANDOM:
        import transformers

        sizes = RANDOM[name]
        config = transformers.LlamaConfig(**sizes, num_attention_heads=sizes["hidden_size"] // 64, vocab_size=8192)
        model: nn.Module = transformers.LlamaForCausalLM(config)
        return model.to(dtype or torch.float32).requires_grad_(False).eval()
    found, _ = load_model(name, dtype, need_tokenizer=False)
    return found.requires_grad_(False).eval()


# --- compile time ----------------------------------------------------------------------------------------------------

_CHILD = """
import json, sys
from pathlib import Path
from pifa_compile.bench.models import compile_once
print(json.dumps(compile_once(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
"""


def bench_compile(name: str, *, rounds: int = 3, say: Callable[[str], None] = lambda _: None) -> Report:
    """Seconds of the first call, cold and warm (caches on disk), against plain Inductor; factors are in the store.

    Every call is in a process of its own, with caches of its own; imports are not counted. Of our seconds those are
    shown apart in which weights are hashed and factors are read and verified: they grow with the model's bytes.
    """
    report = Report(f"seconds of the first call, medians of {rounds} processes", COMPILE_COLUMNS)
    taken: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        torch.manual_seed(0)
        put_random_factors(_model(name, None), 0.6, Store(store))
        for turn, backend in product(range(rounds), ("inductor", "pifa")):
            caches = Path(folder) / f"{backend}-{turn}"
            for state in ("cold", "warm"):
                say(f"{backend}, {state}, {turn + 1} of {rounds}")
                taken.setdefault((backend, state), []).append(_in_child(name, backend, store, caches))
    for state in ("cold", "warm"):
        dense, ours = (
            {key: median(seconds[key] for seconds in taken[backend, state]) for key in ("s", "s hashing", "s reading")}
            for backend in ("inductor", "pifa")
        )
        known = {"model": name, "caches": state, "s dense": dense["s"], "of dense": ours["s"] / dense["s"]}
        report.rows.append(known | ours)
    return report


def _in_child(name: str, backend: str, store: Path, caches: Path) -> dict[str, float]:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(caches)}
    command = [sys.executable, "-c", _CHILD, name, backend, str(store)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"the process that compiles ended with {done.returncode}: {done.stderr[-500:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compile_once(name: str, backend: str, store: Path) -> dict[str, float]:
    """Seconds of the first call of the compiled model in this process, and of what in it grows with the bytes."""
    _torch.inductor()  # its import takes seconds, which are not the question
    torch.manual_seed(0)
    model, ids = _model(name, None), torch.ones(1, 64, dtype=torch.int64)
    options: dict[str, Any] | None = {"store": str(store)} if backend == "pifa" else None
    compiled = torch.compile(model, backend=backend, dynamic=False, options=options)
    found = {"s hashing": 0.0, "s reading": 0.0}
    hashing = _timing(lookup, "digest_many", found, "s hashing")
    reading = _timing(Store, "factors", found, "s reading")
    with torch.no_grad(), hashing, reading:
        begun = time.perf_counter()
        compiled(input_ids=ids)
        return found | {"s": time.perf_counter() - begun}


@contextmanager
def _timing(owner: Any, name: str, found: dict[str, float], key: str) -> Iterator[None]:
    """Inside, the seconds of calls of a function are added to ``found[key]``."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            found[key] += time.perf_counter() - begun

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, original)
