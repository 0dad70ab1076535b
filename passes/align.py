"""On CUDA, tell the operator which row orders move whole aligned groups of rows.

    before   y = pifa::linear(x, P, C, order)
    after    y = pifa::linear(x, P, C, order, aligned=8)

The kernel that writes the output then stores 16 bytes at once, where free pivots make one store of every number: 4 and
32 stores of a thread in one tile of 16-bit numbers. Pivots are in groups where they were chosen so (``pivot_group`` of
a recipe; ``bench/pivoting.py`` shows what that costs in error), or where a layer keeps its first rows.
"""

from __future__ import annotations

from torch import fx

from pifa_compile.factors import PifaFactors
from pifa_compile.kernels import op
from pifa_compile.kernels.op import gather_order
from pifa_compile.passes.decompose import group_size
from pifa_compile.passes.plan import Context, PassResult, device_of

#: Rows of a group: 16 bytes of 16-bit numbers; of more at once a thread stores no faster.
GROUP = 8


def align(gm: fx.GraphModule, context: Context) -> PassResult:
    """Give every operator on CUDA the promise that its row order keeps."""
    operators = {
        site.node: site.factors
        for site in context.plan.sites
        if isinstance(site.factors, PifaFactors) and site.node.target is op.linear
    }
    here = {node: factors for node, factors in operators.items() if device_of(factors).type == "cuda"}
    aligned = {node for node, factors in here.items() if _in_groups(factors)}
    for node in aligned:
        node.kwargs = node.kwargs | {"aligned": GROUP}
    for site in context.plan.sites:
        if site.node in aligned:
            site.order_taken = True  # the code holds for this order alone
    return PassResult(len(here), len(aligned))


def _in_groups(factors: PifaFactors) -> bool:
    whole = factors.rank % GROUP == 0 and factors.shape[0] % GROUP == 0
    return whole and group_size(gather_order(factors.row_order)) >= GROUP
