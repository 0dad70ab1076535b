"""Named sets of layer shapes, (m, n) = (out_features, in_features)."""

from __future__ import annotations

from pifa_compile.errors import InputError, did_you_mean

SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "llama-2-7b": {"q, k, v, o": (4096, 4096), "gate, up": (11008, 4096), "down": (4096, 11008)},
    "llama-3-8b": {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)},
    "minilm": {"q, k, v, o": (384, 384), "up": (1536, 384), "down": (384, 1536)},
    "square-1024": {"square": (1024, 1024)},
    "square-2048": {"square": (2048, 2048)},
    "square-4096": {"square": (4096, 4096)},
}


def shapes(name: str) -> dict[str, tuple[int, int]]:
    """The shapes of a named set; raises InputError on an unknown name."""
    if name not in SHAPES:
        raise InputError(f"no shapes named {name!r}; known: {', '.join(SHAPES)}{did_you_mean(name, SHAPES)}")
    return SHAPES[name]
