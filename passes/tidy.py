"""Erase what the other passes left without a reader: dense weights, and factors that were spelled out.

Dynamo reads the placeholders of the graph once more when the backend is done: a weight that is erased here is no
longer passed. Weights with any other reader (a tied embedding) stay.
"""

from __future__ import annotations

from torch import fx

from pifa_compile.passes.plan import Context, PassResult


def tidy(gm: fx.GraphModule, context: Context) -> PassResult:
    """Erase the placeholders of replaced weights and the get_attr nodes that nothing reads any more."""
    weights = {s.weight for s in context.plan.sites if s.factors is not None}
    dead = [
        node
        for node in gm.graph.nodes
        if not node.users and (node in weights or (node.op == "get_attr" and str(node.target).startswith("pifa_")))
    ]
    for node in dead:
        gm.graph.erase_node(node)
    read = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in gm.named_buffers() if n.startswith("pifa_") and n not in read]:
        delattr(gm, name)
    return PassResult(len(weights), len(dead))
