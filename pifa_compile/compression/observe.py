"""A captured graph run on the inputs it was captured with: what its linear layers read, and what their outputs do.

m = out_features, n = in_features, N = number of tokens. Nothing of the caller's is changed: the graph runs on copies of
all inputs but the parameters (caches and buffers among them, which it may write to; a parameter is copied where it may
write to it), the random number generators are put back, and no parameter gets a gradient.

Memory besides the model and those copies: while inputs are observed, what a call of the dense graph needs, and n x n
float64 for every moment that is asked for; while gradients are, all intermediate results of that call at once, which
``CapturedGraph.activation_bytes`` estimates, and m x m (or m) float64 for every layer. The batch is not cut into parts:
a captured graph may have its size as a constant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from pifa_compile import _torch
from pifa_compile.compression.blocks import rows_of
from pifa_compile.compression.moments import GradientMoments, SecondMoments
from pifa_compile.digest import digest_many
from pifa_compile.passes.plan import LinearSite

#: Sites that belong to one layer, or that read the same tensors.
Sites = Sequence[LinearSite]
#: seen(node, value, known) is told every value of a graph and says what goes on in its place; ``known`` gives the value
#: of a node that this node reads.
Seen = Callable[[fx.Node, Any, Callable[[fx.Node], Any]], Any]


@dataclass(frozen=True, eq=False)
class CapturedGraph:
    """A Dynamo graph that no pass has changed yet, and the real value of each of its placeholders.

    Tokens that a two-dimensional input named ``attention_mask`` marks as padding do not count, where a layer or an
    output has the mask's dimensions in front; padding that is told in any other way cannot be recognised, and counts.
    Tokens with an infinite number or NaN do not count either.
    """

    gm: fx.GraphModule
    values: Mapping[fx.Node, Any]

    def digest(self) -> str:
        """Of all inputs that are not parameters: shapes, dtypes and every byte."""
        inputs = [v for v in self.values.values() if not isinstance(v, nn.Parameter)]
        tensors = iter(digest_many([v for v in inputs if isinstance(v, Tensor)]))
        words = [next(tensors) if isinstance(v, Tensor) else repr(_concrete(v)) for v in inputs]
        return hashlib.sha256("\n".join(words).encode()).hexdigest()

    @cached_property
    def mask(self) -> Tensor | None:
        """The attention mask (batch x tokens), if the graph has one and it hides some token but not all."""
        found = [v for node, v in self.values.items() if "attention_mask" in node.name and _is_mask(v)]
        return found[0].bool() if len(found) == 1 and 0 < int(found[0].sum()) < found[0].numel() else None

    @cached_property
    def activation_bytes(self) -> int:
        """Bytes of all intermediate results of one call, each memory counted once: what gradients need, about."""
        total = 0

        def count(node: fx.Node, value: Any, known: Callable[[fx.Node], Any]) -> Any:
            nonlocal total
            held = {_address(known(source)) for source in node.all_input_nodes}
            total += 0 if _address(value) in held | {None} else value.untyped_storage().nbytes()
            return value

        self._run(count)
        return total

    def input_moments(self, readers: Sequence[Sites]) -> list[SecondMoments]:
        """Moments of what the sites of each reader read, summed over its sites; sites that read the same count once."""
        found = [SecondMoments.zeros(_width(sites[0]), device=_device(sites[0])) for sites in readers]
        wanted: dict[fx.Node, dict[tuple[fx.Node, int], list[int]]] = {}
        for place, sites in enumerate(readers):
            for (x, channel), site in {(s.x, s.channel): s for s in reversed(sites)}.items():
                wanted.setdefault(site.node, {}).setdefault((x, channel), []).append(place)

        def add(node: fx.Node, value: Any, known: Callable[[fx.Node], Any]) -> Any:
            for (x, channel), places in wanted.pop(node, {}).items():
                rows = self._tokens(known(x), channel)
                for place in places:
                    found[place].add(rows)
            if node.op.startswith("call_") and not wanted:
                raise _Enough
            return value

        self._run(add)
        return found

    def output_moments(
        self, writers: Sequence[Sites], form: str, rounds: int, seed: int = 0
    ) -> list[GradientMoments | None]:
        """E[g g^T] at the outputs of the sites of each writer; None where no gradient arrives.

        g is the gradient of a random projection of the graph's floating point outputs, each number of each token with a
        sign of its own, drawn ``rounds`` times: it estimates how far any loss of these outputs can tell.
        """
        at = {site.node: (place, site) for place, sites in enumerate(writers) for site in sites}
        found: list[GradientMoments | None] = [None] * len(writers)
        roots: list[Tensor] = []
        outputs: list[Tensor] = []
        written = _written(self.gm.graph)

        def hook(place: int, site: LinearSite, y: Tensor) -> Tensor:
            if not y.requires_grad:
                roots.append(y.detach().requires_grad_())
                y = roots[-1].view_as(y)
            y.register_hook(lambda g: add(place, self._tokens(g, site.channel)))
            return y.clone() if site.node in written else y  # the hook of a view that is written to is lost

        def add(place: int, rows: Tensor) -> None:
            moments = found[place] or GradientMoments(rows.shape[-1], form, rows.device)
            moments.add(rows)
            found[place] = moments

        def watch(node: fx.Node, value: Any, known: Callable[[fx.Node], Any]) -> Any:
            if node.op == "output":
                given = [known(source) for source in results(self.gm.graph)]
                outputs.extend(v for v in given if isinstance(v, Tensor) and v.is_floating_point() and v.requires_grad)
            return hook(*at[node], value) if node in at and isinstance(value, Tensor) else value

        with torch.inference_mode(False):  # backward, too, would not work in it
            self._run(watch, grad=True)
            generators = {y.device: torch.Generator(y.device).manual_seed(seed) for y in outputs}
            for left in range(rounds if outputs and roots else 0, 0, -1):
                signs = [self._signs(y, generators[y.device]) for y in outputs]
                torch.autograd.grad(outputs, roots, signs, retain_graph=left > 1, allow_unused=True)
        return found

    def _tokens(self, x: Tensor, channel: int) -> Tensor:
        """The rows of a tensor that count: no padding, and nothing infinite or NaN."""
        rows = rows_of(x.detach(), channel, self.mask)
        finite = rows.isfinite().all(-1)
        return rows if bool(finite.all()) else rows[finite]

    def _signs(self, y: Tensor, generator: torch.Generator) -> Tensor:
        signs = torch.empty(y.shape, device=y.device).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        if self.mask is not None and y.shape[:2] == self.mask.shape:
            signs *= self.mask.to(y.device).view(*self.mask.shape, *[1] * (y.dim() - 2))
        return signs.to(y.dtype)

    def _run(self, seen: Seen, *, grad: bool = False) -> None:
        """Run the graph, with or without gradients, and tell ``seen`` of every value."""
        written = _written(self.gm.graph)
        with _apart(self.values.values()), torch.set_grad_enabled(grad), suppress(_Enough):
            _Runner(self.gm, seen).run(*(_copy(v, node in written) for node, v in self.values.items()))


class _Enough(Exception):
    """What was asked for has been seen."""


class _Runner(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, seen: Seen) -> None:
        super().__init__(gm)
        self._seen = seen

    def run_node(self, n: fx.Node) -> Any:
        if n.target in _torch.grad_mode_functions():  # what the graph was captured under; here the caller of run says
            return None
        value = super().run_node(n)
        return self._seen(n, value, self.env.__getitem__)


@contextmanager
def _apart(values: Iterable[Any]) -> Iterator[None]:
    """No inference mode inside, and random number generators as before afterwards."""
    devices = {v.device for v in values if isinstance(v, Tensor) and v.is_cuda}
    with torch.inference_mode(False), torch.random.fork_rng(sorted(devices, key=str)):
        yield


def _copy(value: Any, written: bool) -> Any:
    """What the graph gets in place of an input: parameters as they are unless it writes to them, all else copied."""
    if not isinstance(value, Tensor):
        return _concrete(value)
    shared = isinstance(value, nn.Parameter) and not written and not value.is_inference()
    return value.detach() if shared else value.detach().clone()


def _concrete(value: Any) -> Any:
    """The number behind a symbolic size."""
    return _torch.size_hint(value) if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose memory a call in place may reach, through its first argument and those before it, or ``out``."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        writes = node.op.startswith("call_") and (name.endswith("_") or name in _IN_PLACE or "out" in node.kwargs)
        for reached in [*node.args[:1], node.kwargs.get("out")] if writes else []:
            while isinstance(reached, fx.Node) and reached not in found:
                found.add(reached)
                reached = reached.args[0] if reached.args else None
    return found


_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "matmul")
_IN_PLACE = {"setitem", *(f"i{name}" for name in _OPERATORS)}


def results(graph: fx.Graph) -> list[fx.Node]:
    """What a graph returns, but for by-products: floating point outputs that stand beside the way to another output.

    A by-product is computed from something that another output, computed from the by-product, also sees without it: the
    keys and values of a cache are by-products of logits; the last hidden states that a pooler reads are none.
    """
    (end,) = graph.find_nodes(op="output")
    outputs = [node for node in end.all_input_nodes if _is_floating(node)]
    return [x for x in outputs if not any(_bypasses(x, y) for y in outputs if y is not x)]


def _bypasses(x: fx.Node, y: fx.Node) -> bool:
    """Whether y is computed from x and, past x, from something that x is computed from."""
    if x not in _sources(y):
        return False
    past = _sources(y, without=x)
    return any(node in past for node in _sources(x) if node.op.startswith("call_") and _is_floating(node))


def _sources(node: fx.Node, without: fx.Node | None = None) -> set[fx.Node]:
    """All nodes that a node is computed from, on ways that do not lead through ``without``."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        new = [source for source in waiting.pop().all_input_nodes if source is not without and source not in found]
        found.update(new)
        waiting += new
    return found


def _is_floating(node: fx.Node) -> bool:
    value = _torch.fake_value(node)
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_mask(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.dim() != 2 or value.is_floating_point():
        return False
    return bool(((value == 0) | (value == 1)).all())


def _address(value: Any) -> int | None:
    """Where a tensor's memory begins; None for anything else."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided
    return value.untyped_storage().data_ptr() if plain else None


def _width(site: LinearSite) -> int:
    assert site.shape is not None, "an open site has a matrix"
    return site.shape[1]


def _device(site: LinearSite) -> torch.device:
    assert site.parameter is not None, "an open site has a parameter"
    return site.parameter.device
