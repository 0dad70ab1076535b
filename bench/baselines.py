"""What low rank is compared with, and what it is applied to: 2:4 pruning, half of all weights pruned, int8 rounding.

2:4 keeps two of every four neighbouring inputs of a row. With 16-bit numbers and two bits for each place that is 0.5625
of the bytes, so it is compared with low rank at density 0.5625.

    magnitude  the largest |W| (Zhu and Gupta 2017)
    wanda      the largest |W| ||X||, ||X|| the norm of the input over the tokens (Sun et al. 2023, arXiv 2306.11695)
    sparsegpt  column by column, what is left makes up for what is taken away (Frantar and Alistarh 2023, arXiv
               2301.00774)

m = out_features, n = in_features. A score, a mask or an update needs the weight (m x n) and the second moments of its
inputs, G = X X^T (n x n).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pifa_compile.compression.blocks import Batch, Group, find_stacks, runs_in_order, without_cache
from pifa_compile.compression.flows import capture, find_plan, input_width, watch_block
from pifa_compile.compression.moments import SecondMoments
from pifa_compile.layers import as_matrix, layout_of, linear_weights

#: Share of the bytes that a 2:4 weight has of a dense one, in 16 bit.
BYTES_2_4 = 0.5625
#: Damping of SparseGPT, relative to the mean of the diagonal of G.
DAMPING = 0.01
#: Columns of SparseGPT that are done before the rest is updated.
COLUMNS = 128

Pruner = Callable[[Tensor, Tensor], Tensor]


def keep_two_of_four(scores: Tensor) -> Tensor:
    """The mask (m x n, bool) of the two largest scores of every four neighbours in a row; n is a multiple of 4."""
    m, n = scores.shape
    places = scores.view(m, n // 4, 4).topk(2, dim=-1).indices
    return torch.zeros(m, n // 4, 4, dtype=torch.bool, device=scores.device).scatter_(2, places, True).view(m, n)


def magnitude(weight: Tensor, gram: Tensor) -> Tensor:
    """The weight with two of four kept by size."""
    return weight * keep_two_of_four(weight.abs())


def wanda(weight: Tensor, gram: Tensor) -> Tensor:
    """The weight with two of four kept by size times the norm of the input."""
    return weight * keep_two_of_four(weight.abs() * gram.diagonal().clamp_min(0).sqrt())


def sparsegpt(weight: Tensor, gram: Tensor) -> Tensor:
    """The weight with two of four kept, and updated so that the outputs change least.

    With H = G + damping and the upper Cholesky factor R of H^-1, the error of taking w_j away is w_j^2 / R_jj^2, and
    the columns after j change by -w_j / R_jj R_j: the updates of optimal brain surgery in a fixed order of columns.
    """
    left = weight.clone()
    dead = gram.diagonal() == 0
    hessian = gram + torch.diag(DAMPING * gram.diagonal().mean() + dead.to(gram))
    left[:, dead] = 0
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    m, n = weight.shape
    for start in range(0, n, COLUMNS):
        end = min(start + COLUMNS, n)
        part, own = left[:, start:end], factor[start:end, start:end]
        errors = torch.zeros_like(part)
        mask = torch.ones(m, end - start, dtype=torch.bool, device=weight.device)
        for j in range(end - start):
            if j % 4 == 0:
                mask[:, j : j + 4] = keep_two_of_four((part[:, j : j + 4] / own.diagonal()[j : j + 4]).square())
            errors[:, j] = torch.where(mask[:, j], 0.0, part[:, j]) / own[j, j]
            part[:, j:] -= errors[:, j : j + 1] * own[j, j:]
        part *= mask
        left[:, end:] -= errors @ factor[start:end, end:]
    return left


PRUNERS: dict[str, Pruner] = {"magnitude 2:4": magnitude, "wanda 2:4": wanda, "sparsegpt 2:4": sparsegpt}


@torch.no_grad()
def prune_(model: nn.Module, pruner: Pruner, batches: Sequence[Batch]) -> float:
    """Prune the linear layers of a model in place, block after block, each behind the pruned blocks before it.

    Returns the sum over the layers of ||(W' - W) X||^2 / ||W X||^2, X what the layer read when it was pruned.
    """
    names = [w.name for w in linear_weights(model) if w.reason is None]
    total = 0.0
    with without_cache(model):
        stacks = [stack for stack in find_stacks(model) if runs_in_order(model, stack, batches[0])]
        plan = find_plan(model, stacks, names, batches[0])
        outside = _no_moments(model, plan.outside)
        rows = capture(model, plan, batches, outside)
        total += sum(_prune_group(model, group, outside[group.names[0]].gram, pruner) for group in plan.outside)
        for stack, captured, blocks in zip(plan.stacks, rows, plan.inside, strict=True):
            hidden = [row.hidden for row in captured]
            for index, (prefix, block, groups) in enumerate(zip(stack.prefixes, stack.blocks, blocks, strict=True)):
                moments = _no_moments(model, groups)
                seen = {name.removeprefix(prefix): found.add for name, found in moments.items()}
                watch_block(block, index, captured, hidden, seen)
                total += sum(_prune_group(model, group, moments[group.names[0]].gram, pruner) for group in groups)
                hidden = watch_block(block, index, captured, hidden, {})
    return total


def _no_moments(model: nn.Module, groups: Sequence[Group]) -> dict[str, SecondMoments]:
    widths = {group.names[0]: input_width(model.get_submodule(group.names[0])) for group in groups}
    device = next(model.parameters()).device
    return {name: SecondMoments.zeros(n, device=device) for name, n in widths.items()}


def _prune_group(model: nn.Module, group: Group, gram: Tensor, pruner: Pruner) -> float:
    total = 0.0
    for name in group.names:
        matrix = _matrix(model.get_submodule(name))
        dense = matrix.double()
        pruned = pruner(dense, gram)
        total += output_error(pruned, dense, gram)
        matrix.copy_(pruned)
    return total


def output_error(changed: Tensor, weight: Tensor, gram: Tensor) -> float:
    """||(W' - W) X||^2 / ||W X||^2."""
    difference = changed - weight
    return float((difference @ gram * difference).sum() / (weight @ gram * weight).sum())


def _matrix(module: nn.Module) -> Tensor:
    layout = layout_of(module)
    assert layout is not None and isinstance(module.weight, Tensor)
    return as_matrix(module.weight, layout)


# --- models to begin with ---------------------------------------------------------------------------------------------


def largest_half(weight: Tensor) -> Tensor:
    """The weight without the smaller half of its numbers, wherever they are."""
    order = weight.abs().flatten().argsort(stable=True)
    pruned = weight.flatten().clone()
    pruned[order[: weight.numel() // 2]] = 0
    return pruned.view_as(weight)


def int8_rounded(weight: Tensor) -> Tensor:
    """The weight rounded to 255 steps per row, from -127 to 127 times max |row| / 127."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return torch.where(scale > 0, (weight / scale).round() * scale, weight)


#: What a compression may begin with, by name: what it makes of every linear weight.
STARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda weight: weight,
    "pruned": largest_half,
    "pruned-2:4": lambda weight: magnitude(weight, weight),
    "int8": int8_rounded,
}


@torch.no_grad()
def begin_with_(model: nn.Module, start: str) -> nn.Module:
    """Change every linear weight of a model in place as STARTS says; returns the model."""
    for weight in linear_weights(model):
        if weight.reason is None:
            matrix = as_matrix(weight.parameter, weight.layout)
            matrix.copy_(STARTS[start](matrix.double()))
    return model
