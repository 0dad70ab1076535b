"""Fixtures for all tests: a clean environment, a store of its own for each test, float64 oracles and golden files."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported: no test may use the network

import pytest
import torch
from torch import Tensor

from pifa_compile.factors import Factors, PifaFactors
from pifa_compile.store import Store

ACCEPT = os.environ.get("PIFA_ACCEPT") == "1"
GOLDEN = Path(__file__).parent / "golden"


def forget_compiled() -> None:
    """Compiled code and counters, where a test has made some."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
        sys.modules["torch._dynamo"].utils.counters.clear()


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No setting from outside, nothing left of another test, and ``tmp_path / "store"`` as the default store."""
    for name in [name for name in os.environ if name.startswith("PIFA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIFA_CACHE_DIR", str(tmp_path / "store"))
    torch.manual_seed(0)
    forget_compiled()
    yield
    forget_compiled()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store, the one that is used where none is named."""
    return Store(tmp_path / "store")


def counting_compiler(folder: Path, *, compiles: bool = True) -> tuple[Path, Callable[[], list[str]]]:
    """The compiler that Inductor takes by default, for CXX, and what tells its calls with something to compile.

    Not ``compiles``: it answers what it is, and fails at every source.
    """
    path, calls = folder / "g++", folder / "calls.txt"
    calls.write_text("")
    refuse = "" if compiles else 'case "$*" in *.cpp*) exit 1 ;; esac\n'
    path.write_text(f'#!/bin/sh\necho "$@" >> {shlex.quote(str(calls))}\n{refuse}exec {shutil.which("g++")} "$@"\n')
    path.chmod(0o755)
    return path, lambda: [line for line in calls.read_text().splitlines() if ".cpp" in line]


def byte_tokenizer() -> Any:
    """A tokenizer of bytes, whose token 0 begins a sequence, and is what sentences are padded with."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=alphabet[0], pad_token=alphabet[0])


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="session")
def language_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random two-block Llama (width 32) with a tokenizer of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("language")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=256, max_position_embeddings=256)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random two-block BERT (width 32) with a tokenizer of bytes."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(1)
    BertModel(BertConfig(**SMALL, vocab_size=256, max_position_embeddings=128)).eval().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_matrix() -> Callable[..., Tensor]:
    """``random_matrix(m, n, rank=None, decay=0, seed=0, dtype=torch.float32)``: with singular values that fall evenly
    (on a logarithmic scale) from 1 by ``decay`` decades; computed in float64, then rounded."""

    def make(m, n, rank=None, decay=0.0, seed=0, dtype=torch.float32):
        g = torch.Generator().manual_seed(seed)
        r = min(m, n) if rank is None else rank
        left = torch.linalg.qr(torch.randn(m, r, generator=g, dtype=torch.float64)).Q
        right = torch.linalg.qr(torch.randn(n, r, generator=g, dtype=torch.float64)).Q
        return (left * torch.logspace(0, -decay, r, dtype=torch.float64) @ right.T).to(dtype)

    return make


@pytest.fixture
def tf32() -> Iterator[None]:
    """Float32 products may round their inputs to TF32 on CUDA."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture(scope="session")
def relative() -> Callable[[Tensor, Tensor], float]:
    """``relative(found, wanted)``: Frobenius norm of the difference over that of ``wanted``, in float64."""
    return lambda found, wanted: float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.fixture(scope="session")
def applied() -> Callable[[Factors, Tensor], Tensor]:
    """``applied(factors, x)``: what the definition of the factors makes of x, row by row, in float64."""

    def apply(factors, x):
        if not isinstance(factors, PifaFactors):
            return x.double() @ factors.right.double().T @ factors.left.double().T
        y_p = x.double() @ factors.pivot_rows.double().T
        parts = torch.cat([y_p, y_p @ factors.coefficients.double().T], dim=-1)
        y = torch.full_like(parts, torch.nan)
        for position, row in enumerate(factors.row_order.tolist()):
            y[..., row] = parts[..., position]
        return y

    return apply


@pytest.fixture(scope="session")
def best_error() -> Callable[[Tensor, int], float]:
    """``best_error(weight, r)``: the relative error of the nearest weight of rank r (Eckart and Young), in float64."""

    def least(weight, r):
        s = torch.linalg.svdvals(weight.detach().double())
        return float(s[r:].norm() / s.norm())

    return least


@pytest.fixture(scope="session")
def golden() -> Callable[[str, str], None]:
    """``golden(name, text)``: the text must be that of tests/golden/<name>; PIFA_ACCEPT=1 writes it there instead."""

    def compare(name, text):
        path = GOLDEN / name
        if ACCEPT:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is missing; PIFA_ACCEPT=1 writes it"
        assert text == path.read_text(encoding="utf-8"), f"{path} differs; PIFA_ACCEPT=1 accepts the new text"

    return compare
