"""Graph dumps: for every compiled graph a folder of text that a person can read, and the same in torch's trace.

DIR/graph_0_0/
    linears.txt, linears.json   every linear layer: what was done, or why not, and the user's own line
    replace.before.py, .after.py, .ops.txt   for each pass that changed the graph
    graph.html                  both graphs side by side, to be opened in a browser; not in torch's trace
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tabulate import tabulate
from torch import fx

from pifa_compile import _torch
from pifa_compile.passes.page import page_data, render_page
from pifa_compile.passes.plan import Context
from pifa_compile.passes.snapshot import Snapshot, op_name
from pifa_compile.passes.table import dense_weights, plan_rows, render_memory, render_rows, render_summary


class Dump:
    """Writes what happens to one graph, if anybody wants it; costs nothing otherwise."""

    def __init__(self, gm: fx.GraphModule, context: Context) -> None:
        self._graph = gm.graph
        self._context = context
        self._name = f"graph_{_torch.compile_id()}"
        self._wanted = context.settings.dump is not None or _torch.tracing()
        self._before = ""
        self._ops: Counter[str] = Counter()
        self._captured: Snapshot | None = None

    @property
    def folder(self) -> Path | None:
        """Where this graph's files go, None without ``dump``."""
        root = self._context.settings.dump
        return None if root is None else root / self._name

    def before(self, gm: fx.GraphModule) -> None:
        """Remember the graph as it stands."""
        if self._wanted:
            self._before, self._ops = readable(gm), op_counts(gm.graph)

    def capture(self, gm: fx.GraphModule) -> None:
        """Remember the graph, with all its linear layers known, for the page; the first such graph counts."""
        if self.folder is not None and self._captured is None:
            self._captured = Snapshot(gm.graph, self._context.plan)

    def after(self, gm: fx.GraphModule, step: str) -> None:
        """Write the graph before and after the pass ``step`` and how its operators changed."""
        if self._wanted:
            after = readable(gm)
            self._write(f"{step}.before.py", lambda: self._before)
            self._write(f"{step}.after.py", lambda: after)
            self._write(f"{step}.ops.txt", lambda: render_op_changes(self._ops, op_counts(gm.graph)))

    def finish(self) -> None:
        """Write the table of all linear layers, and the page."""
        if self._wanted:
            rows = plan_rows(self._context.plan)
            held = sum(weight.nbytes for weight in dense_weights(self._context.plan).values())
            facts = filter(None, (render_summary(rows), render_memory(held), _run_line(self._context)))
            text = "\n".join([render_rows(rows), "", *facts, ""])
            data = {"run": _run_id(self._context), "dense_bytes": held, "linears": rows}
            self._write("linears.txt", lambda: text)
            self._write("linears.json", lambda: json.dumps(data, indent=1) + "\n")
        if self.folder is not None and self._captured is not None:
            page = page_data(self._name, self._captured, self._graph, self._context.plan)
            (self.folder / "graph.html").write_text(render_page(page), encoding="utf-8")

    def _write(self, name: str, text: Callable[[], str]) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(text(), encoding="utf-8")
        _torch.trace_artifact(f"pifa_{name}", "json" if name.endswith(".json") else "string", text)


def readable(gm: fx.GraphModule) -> str:
    """The graph as Python, with the user's own lines between."""
    gm.recompile()
    return gm.print_readable(print_output=False) + "\n"


def op_counts(graph: fx.Graph) -> Counter[str]:
    """How often each operator is called in the graph."""
    return Counter(op_name(n) for n in graph.nodes if n.op.startswith("call_"))


def render_op_changes(before: Counter[str], after: Counter[str]) -> str:
    """A table of the operators whose number changed."""
    changed = sorted(op for op in before | after if before[op] != after[op])
    rows = [[op, before[op], after[op], f"{after[op] - before[op]:+d}"] for op in changed]
    return tabulate(rows, ["operator", "before", "after", "change"], "simple", disable_numparse=True) + "\n"


def _run_id(context: Context) -> str | None:
    return None if context.plan.run is None else context.plan.run.header.run_id


def _run_line(context: Context) -> str:
    run = context.plan.run
    if run is None:
        return "no compression run"
    return f"run {run.header.run_id}: {json.dumps(run.header.recipe, sort_keys=True)}"
