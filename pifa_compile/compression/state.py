"""One walk of a calibrated recipe over a model: what it knows, and what is done already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pifa_compile.compression.blocks import Group
from pifa_compile.compression.flows import input_width
from pifa_compile.compression.joint import joint_sets
from pifa_compile.compression.layer import Finished, Layer, Unit, can_join, show
from pifa_compile.compression.moments import SecondMoments
from pifa_compile.compression.output_moments import OutputMoments
from pifa_compile.recipes import Calibrated
from pifa_compile.store import LayerRecord, RunWriter, Store
from pifa_compile.store.scratch import Scratch


@dataclass(eq=False)
class Walk:
    """One walk under way.

    named      layers that may be replaced, by the name of every module that holds their weight
    done       records, by what a layer and its record share
    units      which layers share one factorization, by the key of each layer
    ranks      planned for the units, by the key of their first layer; 0 leaves them dense
    gradients  what outputs are weighted by: E[g g^T] or its diagonal, by module name; of the block under way, and of
               layers outside of blocks
    device     where moments are and layers are solved
    """

    model: nn.Module
    recipe: Calibrated
    store: Store
    writer: RunWriter
    layers: Sequence[Layer]
    bar: Any
    device: torch.device
    named: dict[str, Layer] = field(init=False)
    finished: Finished = field(init=False)
    done: dict[Any, LayerRecord] = field(init=False)
    units: dict[Any, Unit] = field(default_factory=dict)
    ranks: dict[Any, int] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    outputs: OutputMoments | None = None
    scratch: Scratch = field(init=False)

    def __post_init__(self) -> None:
        self.scratch = Scratch(self.store.root, self.writer.header.run_id)
        self.named = {name: layer for layer in self.layers if layer.reason is None for name in layer.names}
        self.finished = Finished(self.writer, self.bar)
        self.done = self.finished.done
        for record in self.writer.done.values():
            show(self.bar, record)

    def add(self, record: LayerRecord) -> None:
        """Remember finished layers, unless they are there already."""
        self.finished.add(record)

    def missing(self, group: Group) -> bool:
        """Whether a layer of the group is still to be done."""
        return any(self.named[name].key not in self.done for name in group.names)

    def weight_of(self, name: str) -> Tensor | None:
        """The weight (m x n, float64) that stands for a finished layer, or None if it stays dense."""
        layer = self.named[name]
        record = self.done[layer.key]
        if record.object is None:
            return None
        weight = self.store.factors(record).weight()
        rows = next((rows for digest in layer.digests.values() if (rows := record.rows_of(digest))), None)
        return weight if rows is None else weight[slice(*rows)]


def unit_of(state: Walk, names: Sequence[str]) -> Unit:
    return Unit(tuple(state.named[name] for name in names))


def settle(state: Walk, names: Sequence[str], r: int) -> None:
    unit = unit_of(state, names)
    state.units |= {layer.key: unit for layer in unit.layers}
    state.ranks[unit.first.key] = r


def joint_sets_of(state: Walk, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The sets of layers that the recipe joins, among names that read the same tensor."""
    sets = joint_sets(names, state.recipe.joint)
    return [members for members in sets if can_join(unit_of(state, members).layers)]


def no_moments(state: Walk, groups: Sequence[Group]) -> dict[str, SecondMoments]:
    """Empty moments for each group, by the name of its first layer."""
    return {group.names[0]: empty_moments(state, group.names[0]) for group in groups}


def empty_moments(state: Walk, name: str) -> SecondMoments:
    return SecondMoments.zeros(input_width(state.model.get_submodule(name)), device=state.device)


def collectors(moments: Mapping[str, SecondMoments], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): found.add for name, found in moments.items()}
