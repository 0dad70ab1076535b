"""How much memory a calibrated walk needs at most, from shapes, before it starts.

m = out_features, n = in_features of a layer, k the smaller of both. Counted are the matrices that are there at the same
time, stage by stage; all but the gradient moments that wait for the solver are float64. What is not counted: the model,
the one block that is at work, its copy for the second flow, and the hidden states between blocks (see ``Bound``), which
are told apart because they are as large as the model and the text make them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from pifa_compile.compression.blocks import Batch, Group
from pifa_compile.compression.flows import CACHED_BYTES, Plan, input_width
from pifa_compile.compression.losses import draws, output_width
from pifa_compile.compression.moments import CHUNK
from pifa_compile.layers import layout_of, output_embedding
from pifa_compile.recipes import Calibrated, Mpifa

#: Above this, a walk has the diagonals of its gradient moments if it needs less with them.
BUDGET = 6 << 30
#: On disk, gradient moments of all blocks up to this size; above it gradients to make them from.
KEPT_BYTES = 4 << 30
#: Bytes that a block keeps of one batch for its backward pass, over those of what its linear layers read and write:
#: norms, rotations, activations and products are kept besides, and gradients are made of them.
GRAPH = 2.5

#: Buffers of libraries and what the allocator keeps, whatever the shapes.
OVERHEAD = 32 << 20

FORMS = ("full", "diagonal", "none")


@dataclass(frozen=True)
class GroupSize:
    """Linear layers that read the same tensor.

    n          what they read, numbers per token
    outputs    m of each layer
    units      m of each set of layers that may share a factorization, if larger than one layer's
    """

    n: int
    outputs: tuple[int, ...]
    units: tuple[int, ...] = ()

    @property
    def widest(self) -> int:
        """The most rows that are factored at once."""
        return max(self.outputs + self.units)


@dataclass(frozen=True)
class WalkSize:
    """What the memory of a walk follows from.

    blocks        groups of each block, in the order in which they run; those outside of blocks
    tokens        rows that reach a block, of all batches; batch_tokens: of the largest batch
    width         numbers per token between two blocks
    itemsize      bytes of a number in the model
    block_bytes   of the weights of the largest block
    vocabulary    logits per token that the loss is made of; the width of the outputs of other models
    draws         losses of each batch
    two_flows, gradients, prices   whether there is a second flow, a backward pass, a choice of ranks by prices
    weighted      whether the solver needs gradient moments too
    blockwise     whether the backward pass visits one block at a time
    """

    blocks: Sequence[Sequence[GroupSize]]
    outside: Sequence[GroupSize]
    tokens: int
    batch_tokens: int
    width: int
    itemsize: int
    block_bytes: int
    vocabulary: int = 0
    draws: int = 1
    two_flows: bool = True
    gradients: bool = True
    prices: bool = True
    weighted: bool = True
    blockwise: bool = True

    @property
    def flow(self) -> int:
        """Bytes of the hidden states of all batches between two blocks."""
        return self.tokens * self.width * self.itemsize

    def gradient_moments(self, form: str, itemsize: int = 8) -> int:
        """Bytes of the gradient moments of one block; of all layers where there is one graph for the whole model."""
        parts = [_moments(block, form) for block in self.blocks]
        found = max(parts, default=0) if self.blockwise else sum(parts) + _moments(self.outside, form)
        return itemsize * found

    def kept_moments(self, form: str) -> int:
        """Bytes of the gradient moments of all blocks, in float32."""
        return 4 * sum(_moments(block, form) for block in self.blocks)


@dataclass(frozen=True)
class Bound:
    """Bytes at most, by what they are for.

    block   weights of the block at work, with a copy for the second flow
    flows   hidden states of all batches: of each flow, and of one flow twice while a block is run
    stages  everything else, by stage; the stages follow each other
    moments gradient moments of one block by form, in float64
    disk    in the scratch space of the store
    form    of the gradient moments: the one that is used
    """

    block: int
    flows: int
    stages: dict[str, int]
    moments: dict[str, int] = field(default_factory=dict)
    disk: int = 0
    form: str = "none"

    @property
    def beside(self) -> int:
        """What is needed beside the block and the flows."""
        return max(self.stages.values()) + OVERHEAD

    @property
    def total(self) -> int:
        """Of all, the model apart."""
        return self.block + self.flows + self.beside

    def __str__(self) -> str:
        stages = ", ".join(f"{name} {_gib(size)}" for name, size in self.stages.items())
        forms = ", ".join(f"{form} {_gib(size)}" for form, size in self.moments.items())
        others = f"one block with its copy ({_gib(self.block)}) and the hidden states ({_gib(self.flows)})"
        text = f"memory: at most {_gib(self.beside)} GiB ({stages}) beside {others}"
        if not self.moments:
            return text
        return f"{text}\ngradient moments: {self.form} (GiB at a time: {forms}); on disk {_gib(self.disk)} GiB"


def bound(size: WalkSize, form: str) -> Bound:
    """The bound of a walk with gradient moments of a form."""
    blocks = [*size.blocks, size.outside]
    stages = {}
    if size.gradients:
        stages["backward pass"] = max(_backward(size, form), _loss(size))
    if size.prices:
        stages["prices"] = max(_most(block, lambda b, i: _price(size, b, i, form)) for block in blocks)
    stages["solver"] = max(_most(block, lambda b, i: _solve(size, b, i, form)) for block in blocks)
    stages["solver"] += _outside(size, form)
    moments = {known: size.gradient_moments(known) for known in FORMS} if size.gradients else {}
    flows = (3 if size.two_flows else 2) * size.flow
    copies = 2 if size.two_flows else 1
    used = form if size.gradients else "none"
    return Bound(copies * size.block_bytes, flows, stages, moments, _disk(size, form), used)


def choose_form(size: WalkSize, wanted: str) -> str:
    """The form of gradient moments that is wanted, or the diagonal one where the full one needs more than BUDGET.

    Where something else needs as much, less is not gained by it and the full one stays.
    """
    full, diagonal = (bound(size, form).beside for form in ("full", "diagonal"))
    return "diagonal" if wanted == "full" and full > max(BUDGET, diagonal) else wanted


def _backward(size: WalkSize, form: str) -> int:
    """One visit of the backward pass: all moments of the block, and its graph for one batch."""
    worst = 0
    graphs = [_graph(size, block) for block in size.blocks]
    for block, graph in zip(size.blocks, graphs, strict=True):
        read = sum(8 * g.n**2 for g in block) if size.prices and size.blockwise else 0
        sums = size.gradient_moments(form) if not size.blockwise else 8 * _moments(block, form)
        kept = sum(graphs) if not size.blockwise else graph
        largest = max((max(g.n, *g.outputs) for g in block), default=0)
        worst = max(worst, sums + read + kept + _converted(size, largest))
    states = 4 * size.draws * size.batch_tokens * size.width * size.itemsize
    return worst + states + _outside(size, form)


def _loss(size: WalkSize) -> int:
    """Logits in the model's dtype and in float32, their probabilities and gradients, of one batch."""
    return size.batch_tokens * size.vocabulary * (2 * size.itemsize + 16)


def _price(size: WalkSize, block: Sequence[GroupSize], index: int, form: str) -> int:
    """A group's turn: gradient moments of the block, input moments of this group and those after it."""
    g = block[index]
    h = 4 * _moments(block, form) if size.gradients else 0
    later = sum(8 * other.n**2 for other in block[index + 1 :])
    outputs = sum(8 * m * g.n for m in g.outputs)
    root = max(_root(m, form) for m in g.outputs) if size.gradients else 0
    weighted = 8 * g.n**2 + outputs + max(root + 16 * max(g.outputs) * g.n, _singular_values(g))
    running = 0 if size.gradients and size.blockwise else 8 * g.n**2 + _graph(size, block)
    return h + later + max(_whiten(g.n), weighted, running)


def _solve(size: WalkSize, block: Sequence[GroupSize], index: int, form: str) -> int:
    """A group's turn: its moments in both flows, then its factors; moments and inputs of the groups after it."""
    g = block[index]
    square = 8 * g.n**2
    h = 4 * _moments(block[index + 1 :], form) if size.weighted else 0
    own_h = 4 * _moments([g], form) if size.weighted else 0
    cached = size.tokens * size.itemsize
    reads = sum(cached * other.n for other in block) <= CACHED_BYTES
    later = sum(cached * other.n for other in block[index + 1 :]) if reads else 0
    flows = 2 if size.two_flows else 1
    waiting = 0 if size.two_flows else sum(8 * other.n**2 for other in block[index + 1 :])
    own = cached * g.n if reads else 0
    reading = flows * square + own + flows * _converted(size, g.n) + _graph(size, block)
    whitened = flows * square + _whiten(g.n)  # drift and held-out moments beside what is whitened
    # Drift, square root and held-out moments; the square root of those, kept from the first layer on.
    squares = (flows + 1 + (g.widest > g.n)) * square
    roots = 2 * own_h  # in float64, of all layers of a unit at most
    rooted = roots + own_h + max(_root(m, form) for m in g.outputs) // 2 * size.weighted + 2 * _matrix(g)
    solved = roots + _decomposed(g)
    checked = roots + 4 * _matrix(g) + 8 * _least(g) ** 2
    measured = roots + 3 * _matrix(g) + (4 * square if g.widest > g.n else 2 * _matrix(g) + 8 * _least(g) ** 2)
    factored = squares + max(rooted, solved, checked, measured)
    again = _graph(size, block) + 8 * _moments(block, form) if size.weighted and index == 0 else 0
    return h + later + waiting + max(reading, whitened, factored, again)


def _whiten(n: int) -> int:
    """Moments, their eigenvectors and the workspace for these."""
    return 4 * 8 * n**2


def _root(m: int, form: str) -> int:
    """A square root of damped gradient moments, and what it is made of."""
    return 2 * 8 * (m * m if form == "full" else m if form == "diagonal" else 0)


def _matrix(g: GroupSize) -> int:
    return 8 * g.widest * g.n


def _least(g: GroupSize) -> int:
    return min(g.widest, g.n)


def _decomposed(g: GroupSize) -> int:
    """The target beside its singular value decomposition, see ``closed_form``."""
    square = 8 * _least(g) ** 2
    tall = g.widest >= 2 * g.n
    return _matrix(g) + (max(2 * _matrix(g) + square, _matrix(g) + 8 * square) if tall else 3 * _matrix(g) + 6 * square)


def _singular_values(g: GroupSize) -> int:
    return 2 * _matrix(g) + 32 * _least(g) ** 2


def _graph(size: WalkSize, block: Sequence[GroupSize]) -> int:
    """What a block keeps of one batch for its backward pass; less of it is there at a time without one."""
    numbers = sum(g.n + sum(g.outputs) for g in block)
    return int(GRAPH * numbers * size.batch_tokens * max(size.itemsize, 4 if size.itemsize < 4 else 0))


def _converted(size: WalkSize, width: int) -> int:
    """Tokens that are added to moments: some at a time in float64, all of a batch picked out of its padding."""
    return min(CHUNK, size.batch_tokens) * 8 * width + size.batch_tokens * size.itemsize * width


def _outside(size: WalkSize, form: str) -> int:
    """What layers outside of blocks have in memory all the time."""
    gradients = 8 * _moments(size.outside, form) if size.gradients else 0
    return gradients + sum(2 * 8 * g.n**2 for g in size.outside)


def _disk(size: WalkSize, form: str) -> int:
    """What enters blocks that are not visited yet, gradients behind the others, and moments for the solver."""
    if not size.gradients or not size.blockwise:
        return 0
    kept = size.kept_moments(form)
    return (len(size.blocks) + 2) * size.flow * size.draws + (kept if kept <= KEPT_BYTES else 0)


def _moments(groups: Sequence[GroupSize], form: str) -> int:
    """Numbers of the gradient moments of all layers of groups."""
    if form == "none":
        return 0
    return sum(m * m if form == "full" else m for g in groups for m in g.outputs)


def _most(block: Sequence[GroupSize], turn: Callable[[Sequence[GroupSize], int], int]) -> int:
    return max((turn(block, index) for index in range(len(block))), default=0)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2g}" if size < 10 << 30 else f"{size / 2**30:.0f}"


def walk_size(
    model: nn.Module,
    plan: Plan,
    rows: Mapping[str, int],
    batches: Sequence[Batch],
    recipe: Calibrated,
    *,
    blockwise: bool,
    units: Callable[[Sequence[str]], Sequence[int]],
) -> WalkSize:
    """The sizes of a walk.

    rows       that each linear layer reads of the first batch, by name
    blockwise  whether a backward pass visits one block at a time
    units      m of the sets of layers, among some that read the same tensor, that may share a factorization
    """

    def sizes(groups: Sequence[Group]) -> list[GroupSize]:
        modules = [[model.get_submodule(name) for name in group.names] for group in groups]
        return [
            GroupSize(input_width(found[0]), tuple(map(output_width, found)), tuple(units(group.names)))
            for group, found in zip(groups, modules, strict=True)
        ]

    numbers = [next(t for t in batch.values() if isinstance(t, Tensor)).numel() for batch in batches]
    groups = [group for blocks in plan.inside for block in blocks[:1] for group in block[:1]] or plan.outside[:1]
    first = groups[0].names[0] if groups else ""
    of_first = rows.get(first, 0)
    names = [name for group in plan.groups for name in group.names]
    weights = [sum(p.nbytes for p in block.parameters()) for stack in plan.stacks for block in stack.blocks]
    gradients = isinstance(recipe, Mpifa) and (recipe.weighting != "none" or recipe.allocation == "loss")
    head = output_embedding(model)
    return WalkSize(
        blocks=[sizes(block) for blocks in plan.inside for block in blocks],
        outside=sizes(plan.outside),
        tokens=sum(of_first * count // numbers[0] for count in numbers),
        batch_tokens=max(of_first * count // numbers[0] for count in numbers),
        width=input_width(model.get_submodule(first)) if first else 0,
        itemsize=max((p.itemsize for p in model.parameters()), default=4),
        block_bytes=max(weights, default=0),
        vocabulary=output_width(head) if head is not None and layout_of(head) is not None else 0,
        draws=draws(model, names, batches) if gradients else 1,
        two_flows=isinstance(recipe, Mpifa),
        gradients=gradients,
        prices=recipe.allocation != "uniform",
        weighted=isinstance(recipe, Mpifa) and recipe.weighting != "none",
        blockwise=blockwise,
    )
