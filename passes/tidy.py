"""Erase what the other passes left without a reader: dense weights, and factors that were spelled out.

Dynamo reads the placeholders of the graph once more when the backend is done: a weight that is erased here is no
longer passed. Weights with any other reader (a tied embedding) stay.
"""

from __future__ import annotations

from torch import fx

from pifa_compile.passes.plan import Context, PassResult


def tidy(gm: fx.GraphModule, context: Context) -> PassResult:
    """Erase placeholders and transposes of replaced weights, and get_attr nodes of factors, that nothing reads."""
    replaced = [s for s in context.plan.sites if s.factors is not None]
    ours = {node for s in replaced for node in (s.weight, s.row_order, *s.through)}
    for inner, outer in ((s.inner, s) for s in replaced if s.inner is not None):
        ours |= {inner.node, inner.weight, inner.bias, outer.bias, *inner.through}
    ours |= {s.bias for s in replaced if s.bias_taken}
    ours |= {node for node in gm.graph.nodes if node.op == "get_attr" and str(node.target).startswith("pifa_")}
    dead = 0
    for node in reversed(list(gm.graph.nodes)):
        if node in ours and not node.users:
            gm.graph.erase_node(node)
            node.meta.pop("example_value", None)  # whoever still knows the node must not hold its tensor
            dead += 1
    read = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in gm.named_buffers() if n.startswith("pifa_") and n not in read]:
        delattr(gm, name)
    return PassResult(len(ours), dead)
