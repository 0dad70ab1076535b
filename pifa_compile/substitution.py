"""For which modules a factored layer may stand in: those that do nothing but apply their linear weight.

A graph shows what is computed, so the backend needs none of this. A module that is exchanged takes its class with it:
routers that choose experts, layers that quantize what they read, a ``forward`` that somebody put on the instance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pifa_compile.layers import as_matrix, layout_of, matrix_shape

READ = "its {owner} reads the weight and does not call the layer"
OWN = "its class {kind} does more than a linear layer"
REPLACED = "somebody put another forward on it"
HOOKED = "it has hooks"


def why_not(model: nn.Module, name: str) -> str | None:
    """Why no other layer may stand in for the linear module (or held weight) ``name`` of a model, or None."""
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(owner, nn.MultiheadAttention):
        return READ.format(owner=type(owner).__name__)
    module = owner.get_submodule(last)
    if "forward" in vars(module):
        return REPLACED
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return HOOKED
    if not _is_linear(module):
        return OWN.format(kind=type(module).__name__)
    return None


def _is_linear(module: nn.Module) -> bool:
    kind = type(module)
    if kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) or layout_of(module) == "in_out":
        return True
    if kind not in _KNOWN:
        _KNOWN[kind] = _acts_linear(module)
    return _KNOWN[kind]


_KNOWN: dict[type[nn.Module], bool] = {}


@torch.no_grad()
def _acts_linear(module: nn.Module) -> bool:
    """Whether a module of an unknown class gives what a linear layer gives, for random weights and inputs."""
    layout = layout_of(module)
    generator = torch.Generator().manual_seed(0)
    given = {name: torch.randn(p.shape, generator=generator) for name, p in module.named_parameters()}
    if layout is None or "weight" not in given or not given.keys() <= {"weight", "bias"}:
        return False
    x = torch.randn(3, 2, matrix_shape(given["weight"], layout)[1], generator=generator)
    wanted = F.linear(x, as_matrix(given["weight"], layout), given.get("bias"))
    points = given["weight"].dim() - 2 if layout == "conv1x1" else 0
    asked = x if layout != "conv1x1" else x.mT.reshape(3, x.shape[-1], 2, *[1] * (points - 1))
    try:
        found = torch.func.functional_call(module, given, (asked,))
    except Exception:  # whatever it wants, it is no plain linear layer
        return False
    if layout == "conv1x1" and isinstance(found, torch.Tensor) and found.dim() == points + 2:
        found = found.flatten(2).mT
    fits = isinstance(found, torch.Tensor) and found.shape == wanted.shape and found.dtype == wanted.dtype
    return fits and bool(torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())))
