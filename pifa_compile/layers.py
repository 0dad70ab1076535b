"""Which parameters of a model are linear weights, and how each parameter holds its m x n matrix.

m = out_features, n = in_features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

#: "out_in": m x n as in nn.Linear; "in_out": n x m as in GPT-2's Conv1D; "conv1x1": m x n x 1 ... of a convolution.
Layout = Literal["out_in", "in_out", "conv1x1"]


@dataclass(frozen=True)
class LinearWeight:
    """A parameter that is the weight of a linear layer, under the name its model gives it.

    reason  why it must stay dense (output embedding, not floating point ...), None if it may be replaced
    """

    name: str
    parameter: Tensor
    layout: Layout = "out_in"
    reason: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return matrix_shape(self.parameter, self.layout)

    @property
    def channel(self) -> int:
        """The dimension of the layer's input that holds the features, from the end."""
        return 1 - self.parameter.dim() if self.layout == "conv1x1" else -1


def matrix_shape(parameter: Tensor, layout: Layout) -> tuple[int, int]:
    """(m, n) of the matrix that a parameter holds."""
    rows, columns = parameter.shape[0], parameter.shape[1:].numel()
    return (columns, rows) if layout == "in_out" else (rows, columns)


def as_matrix(parameter: Tensor, layout: Layout) -> Tensor:
    """The m x n matrix that a parameter holds, as a view."""
    flat = parameter.detach().flatten(1)
    return flat.T if layout == "in_out" else flat


def layout_of(module: nn.Module) -> Layout | None:
    """How the module's weight holds a linear layer's matrix, or None if the module is no linear layer."""
    if isinstance(module, nn.Linear):
        return "out_in"
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int):
        return "in_out"  # transformers.pytorch_utils.Conv1D; by name, so that transformers is not imported here
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and _is_pointwise(module):
        return "conv1x1"
    return None


def _is_pointwise(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    unit = all(k == 1 for k in module.kernel_size) and all(s == 1 for s in module.stride)
    unpadded = module.padding in ("valid", "same") or all(p == 0 for p in module.padding)
    return unit and unpadded and module.groups == 1


def linear_weights(model: nn.Module) -> Iterator[LinearWeight]:
    """Every linear weight of a model once, in module order, with the reason where it must stay dense.

    Among these are the weights of modules of other kinds that look like one (routers of experts): left dense, but known
    to a run, so that it is a run of the whole model.
    """
    output = output_embedding(model)
    seen: set[int] = set()
    others = {id(p) for m in model.modules() if layout_of(m) is None for p in m.parameters(recurse=False)}
    for name, module in model.named_modules():
        layout = layout_of(module)
        weight = module._parameters.get("weight")
        if weight is None or id(weight) in seen or (layout is None and not _looks_linear(module, weight)):
            continue
        seen.add(id(weight))
        if layout is None:
            reason = f"the weight of {type(module).__name__}, which is no linear layer"
            yield LinearWeight(name, weight, reason=reason)
            continue
        is_output = module is output or weight is getattr(output, "weight", None)
        yield LinearWeight(name, weight, layout, _reason(name, weight, is_output, id(weight) in others))


def held_weights(model: nn.Module) -> Iterator[LinearWeight]:
    """Weights of linear layers that are no modules of their own: the input projections of nn.MultiheadAttention.

    A graph shows them as layers. Nobody can see what they read by watching modules, or put a module in their place.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            for name, weight in module.named_parameters(path, recurse=False):
                if name.endswith("proj_weight"):
                    yield LinearWeight(name, weight, reason=_reason(name, weight, is_output=False, shared=False))


def _looks_linear(module: nn.Module, weight: Tensor) -> bool:
    """Whether the weight of a module that is not of torch's own kinds may be that of a linear layer inside of it."""
    own = type(module).__module__.startswith("torch.") or isinstance(module, nn.Embedding)
    return not own and weight.dim() == 2 and weight.is_floating_point()


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The module that makes a language model's logits, by the model's own word, or None."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        found = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):  # transformers' base classes raise where a model has none
        return None
    return found if isinstance(found, nn.Module) else None


def is_output_embedding_name(name: str) -> bool:
    """Whether a layer's name is one that language models give their output embedding."""
    return name.rsplit(".", 1)[-1] in ("lm_head", "embed_out")


def _reason(name: str, weight: Tensor, is_output: bool, shared: bool) -> str | None:
    if is_output or is_output_embedding_name(name):
        return "output embedding, left dense by default"
    if shared:
        return "shared with a module that is no linear layer"
    if not is_plain(weight) or weight.dim() < 2:
        kind = f"{type(weight).__name__} of shape {tuple(weight.shape)} on {weight.device} ({weight.layout})"
        return f"the weight is a {kind}, not a plain matrix"
    if not supported_dtype(weight.dtype):
        return f"{weight.dtype} weight: only float64, float32, float16 and bfloat16 are replaced"
    return None


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is an ordinary tensor with content: not quantized, sparse or on the meta device."""
    return type(weight) in (nn.Parameter, Tensor) and weight.layout == torch.strided and not weight.is_meta


def supported_dtype(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype can be replaced."""
    return dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
