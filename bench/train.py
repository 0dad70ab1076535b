"""A small language model to measure quality on, where none can be downloaded: python bench/train.py OUT.

A Llama of 3.7 million parameters is trained from scratch on Python sources that are installed anyway: the standard
library and site-packages. OUT becomes a checkpoint folder (config, safetensors, tokenizer) with texts, split by file:

    calibration.txt  files that were trained on
    validation.txt   files that were not
    other.txt        one package of which no file was trained on
    training.json    settings, versions, losses and perplexities

The seed is fixed: the same files, settings and threads give the same model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from pifa_compile.evaluation import perplexity, windows_of
from pifa_compile.layers import linear_weights

END = "<|end|>"
LENGTH = 256
BATCH = 8
#: Longer files are mostly tables.
LONGEST_FILE = 150_000
#: Characters of the texts that are written.
CALIBRATION, HELD_OUT = 2_000_000, 1_200_000
#: Characters that the tokenizer is trained on.
TOKENIZER = 4_000_000


@dataclass(frozen=True)
class Sources:
    """Texts of whole files, each once: to train on, held out, and of the package that is left out."""

    training: list[str]
    validation: list[str]
    other: list[str]


def installed() -> list[Path]:
    """The folders of the standard library and of installed packages."""
    return list(dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")))


def find_sources(folders: Sequence[Path], other: str, characters: int, seed: int) -> Sources:
    """Python files in random order; of ``characters`` one in twenty is held out.

    other  a top-level package (in one of the folders) whose files are kept apart
    """
    files = sorted({path for folder in folders for path in folder.rglob("*.py")})
    random.Random(seed).shuffle(files)
    seen: set[str] = set()
    found: dict[str, list[str]] = {"training": [], "validation": [], "other": []}
    room = {"training": characters, "validation": max(characters // 20, 20 * LENGTH), "other": HELD_OUT}
    for path in files:
        inside = other in {path.relative_to(folder).parts[0] for folder in folders if path.is_relative_to(folder)}
        part = "other" if inside else "validation" if _share(path) < 0.05 else "training"
        if room[part] <= 0 or (text := _read(path)) is None:
            continue
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            found[part].append(text)
            room[part] -= len(text)
    return Sources(**found)


def _share(path: Path) -> float:
    """A number from 0 to 1 that depends on the name alone, so that a new package moves no file between the parts."""
    return int(hashlib.sha256("/".join(path.parts[-3:]).encode()).hexdigest()[:8], 16) / 0xFFFFFFFF


def _read(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text if 200 < len(text) < LONGEST_FILE else None


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer (Sennrich et al. 2016) whose token 0 ends a file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_upto(texts, TOKENIZER), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END
    )


def _upto(texts: Sequence[str], characters: int) -> list[str]:
    found, size = [], 0
    for text in texts:
        found.append(text)
        size += len(text)
        if size >= characters:
            break
    return found


def tokens_of(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """All token ids of the texts, each ended by token 0."""
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.cat([torch.tensor([*ids, 0]) for ids in encoded])


def build(vocabulary: int, width: int, layers: int) -> nn.Module:
    """A Llama with random weights: heads of 64 (of 16 below width 64), an MLP of 2.75 widths, tied embeddings."""
    heads = max(1, width // 64) if width >= 64 else max(1, width // 16)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=True,
    )
    return transformers.LlamaForCausalLM(config)


def train(model: nn.Module, ids: Tensor, steps: int, seed: int, say: Callable[[str], None]) -> list[float]:
    """The losses on random windows, with warm-up and cosine decay: Muon (Jordan et al. 2024) for the linear layers,
    AdamW (Loshchilov and Hutter 2019) for the rest.

    A model of width 128 had a loss of 5.07 after 245,000 tokens that way, and 6.18 with AdamW alone.
    """
    generator = torch.Generator().manual_seed(seed)
    linear = [w.parameter for w in linear_weights(model) if w.reason is None]
    rest = [p for p in model.parameters() if not any(p is q for q in linear)]
    optimizers = [
        torch.optim.Muon(linear, lr=0.04, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    warm = max(1, steps // 20)
    rate = lambda i: min((i + 1) / warm, 0.5 * (1 + math.cos(math.pi * i / steps)))  # noqa: E731
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    losses, started = [], time.perf_counter()
    model.train()
    for step in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=generator)
        windows = torch.stack([ids[i : i + LENGTH] for i in starts])
        logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        losses.append(float(loss.detach()))
        if step % 50 == 0 or step + 1 == steps:
            recent = sum(losses[-50:]) / len(losses[-50:])
            say(f"step {step}: loss {recent:.3f}, {time.perf_counter() - started:.0f} s")
    model.eval()
    return losses


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, write the folder, and print what came of it."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    sources = find_sources(options.folder or installed(), options.other, options.characters, options.seed)
    parts = {name: sum(map(len, texts)) for name, texts in vars(sources).items()}
    print(", ".join(f"{name} {size / 1e6:.1f} M characters" for name, size in parts.items()), flush=True)
    tokenizer = train_tokenizer(sources.training, options.vocabulary)
    ids = tokens_of(sources.training, tokenizer)
    torch.manual_seed(options.seed)
    model = build(len(tokenizer), options.width, options.layers)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.2f} M parameters, {len(ids) / 1e6:.2f} M tokens, {options.steps} steps", flush=True)
    losses = train(model, ids, options.steps, options.seed, lambda line: print(line, flush=True))
    texts = _write(options.out, model, tokenizer, sources)
    found = {name: perplexity(model, windows_of(text, tokenizer, LENGTH, 256)) for name, text in texts.items()}
    facts = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        | {"folder": [str(path) for path in options.folder or installed()]},
        "characters": parts,
        "parameters": count,
        "tokens": len(ids),
        "losses": losses,
        "perplexity": found,
        "seconds": time.perf_counter() - started,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__}
        | {"python": platform.python_version()},
    }
    (options.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    words = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    print(f"perplexity ({LENGTH} tokens): {words}; {facts['seconds']:.0f} s; {options.out}")


def _write(out: Path, model: nn.Module, tokenizer: Any, sources: Sources) -> dict[str, str]:
    """The checkpoint and its texts; returns those that perplexity is measured on."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)  # type: ignore[operator]
    tokenizer.save_pretrained(out)
    texts = {
        "calibration": "\n\n".join(_upto(sources.training, CALIBRATION)),
        "validation": "\n\n".join(_upto(sources.validation, HELD_OUT)),
        "other": "\n\n".join(_upto(sources.other, HELD_OUT)),
    }
    for name, text in texts.items():
        (out / f"{name}.txt").write_text(text, encoding="utf-8")
    return {name: texts[name] for name in ("validation", "other")}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=1200, help=f"of {BATCH} windows of {LENGTH} tokens (default 1200)")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--characters", type=int, default=24_000_000, help="to train on at most (default 24 million)")
    parser.add_argument("--other", default="scipy", help="the package of other.txt (default scipy)")
    parser.add_argument("--folder", type=Path, action="append", help="Python sources (default: those installed)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()
