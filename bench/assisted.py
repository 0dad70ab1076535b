"""Assisted generation: how many tokens drafted by a compressed model its dense model accepts, and that none is lost.

    python bench/assisted.py MODEL TEXT --calibration FILE --densities 0.8 0.6 0.4

The dense model decodes greedily, first alone and then with the compressed one as its assistant; the tokens must be the
same. Calls of the dense model cost time on a device that waits for memory, so they are counted: each call that checks k
drafted tokens gives from 1 to k + 1 tokens.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import pifa_compile
from pifa_compile.loading import load_model


@dataclass(frozen=True)
class Acceptance:
    """Over all prompts: tokens generated, calls of the dense model, tokens drafted; whether all were equal."""

    tokens: int
    calls: int
    drafted: int
    lossless: bool

    @property
    def accepted(self) -> float:
        """The fraction of drafted tokens that the dense model kept; each of its calls adds one of its own."""
        return (self.tokens - self.calls) / self.drafted


class Calls:
    """Calls of a model's forward while it is watched."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        self._hook = model.register_forward_hook(self._called)

    def _called(self, *_: Any) -> None:
        self.count += 1

    def stop(self) -> int:
        self._hook.remove()
        return self.count


def measure(dense: Any, small: Any, prompts: Sequence[Tensor], new_tokens: int, draft: int) -> Acceptance:
    """Decode every prompt (1 x tokens) with and without the small model's help."""
    small.generation_config.num_assistant_tokens = draft
    small.generation_config.num_assistant_tokens_schedule = "constant"
    small.generation_config.assistant_confidence_threshold = 0.0
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    tokens, equal = 0, True
    alone = [dense.generate(prompt, **settings) for prompt in prompts]
    checks, drafts = Calls(dense), Calls(small)
    for prompt, expected in zip(prompts, alone, strict=True):
        found = dense.generate(prompt, assistant_model=small, **settings)
        equal &= torch.equal(found, expected)
        tokens += found.shape[1] - prompt.shape[1]
    return Acceptance(tokens, checks.stop(), drafts.stop(), equal)


def cut(ids: Tensor, length: int, count: int) -> list[Tensor]:
    """``count`` prompts of ``length`` tokens from all over a text."""
    step = max(len(ids) // count, 1)
    return [ids[i : i + length][None] for i in range(0, len(ids) - length, step)][:count]


def main(arguments: Sequence[str] | None = None) -> list[tuple[float, Acceptance]]:
    """Run from the command line; prints a table and returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or Hugging Face id of a causal language model")
    parser.add_argument("text", type=Path, help="text file that the prompts are cut from")
    parser.add_argument("--calibration", type=Path, help="text file (default: the model samples its own)")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--draft", type=int, default=4, help="tokens drafted at a time")
    options = parser.parse_args(arguments)
    dense, tokenizer = load_model(options.model)
    ids = tokenizer(options.text.read_text(), return_tensors="pt", add_special_tokens=False).input_ids[0]
    prompts, found = cut(ids, options.length, options.prompts), []
    with tempfile.TemporaryDirectory() as store:
        for density in options.densities:
            recipe = pifa_compile.Mpifa(density=density)
            report = pifa_compile.compress(
                dense, recipe, text=options.calibration, tokenizer=tokenizer, store=store, progress=False
            )
            small = pifa_compile.apply_(copy.deepcopy(dense), run=report.run_id, store=store)
            found.append((density, measure(dense, small, prompts, options.tokens, options.draft)))
    rows = [[d, f"{a.accepted:.3f}", f"{a.tokens / a.calls:.2f}", a.tokens, a.lossless] for d, a in found]
    print(tabulate(rows, ["density", "accepted", "tokens per dense call", "tokens", "same tokens"], "github"))
    return found


if __name__ == "__main__":
    main()
