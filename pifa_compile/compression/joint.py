"""Which layers may share one factorization: those that read the same tensor and that a recipe names together.

Joint rank-k: the rows of all weights that read one input are stacked and truncated together, so that they share one
basis of it (Peng et al., arXiv 2402.16319). Pivots are then drawn from all the rows, and one coefficient matrix makes
the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

#: What the parts of attention and of gated MLPs are called, by the word that stands for them in a recipe.
ROLES = {
    "q": ("q", "q_proj", "q_lin", "query", "query_proj", "to_q", "wq"),
    "k": ("k", "k_proj", "k_lin", "key", "key_proj", "to_k", "wk"),
    "v": ("v", "v_proj", "v_lin", "value", "value_proj", "to_v", "wv"),
    "gate": ("gate_proj", "w1", "wi_0"),
    "up": ("up_proj", "w3", "wi_1"),
}


def joint_sets(names: Sequence[str], groups: Iterable[str]) -> list[tuple[str, ...]]:
    """The sets among the named layers that a recipe's ``groups`` join, in the order of the groups.

    names   of layers that read the same tensor, or may be taken to; a set holds those of one parent module
    groups  each a few parts with "+" between: words of ROLES, or patterns of the last part of a name (of the whole
            name, where there is a dot in it). A set has a layer for every part, in the order of ``names``
    """
    found: list[tuple[str, ...]] = []
    for group in groups:
        parts = group.split("+")
        for parent in dict.fromkeys(name.rpartition(".")[0] for name in names):
            inside = [name for name in names if name.rpartition(".")[0] == parent]
            members = tuple(name for name in inside if any(_matches(name, part) for part in parts))
            whole = all(any(_matches(name, part) for name in inside) for part in parts)
            if whole and len(members) > 1 and members not in found:
                found.append(members)
    return found


def alternatives(names: Sequence[str], sets: Sequence[tuple[str, ...]]) -> list[list[tuple[str, ...]]]:
    """Every way to part the named layers into the given sets and single layers; the first leaves all apart.

    names  in order; a way lists its parts in the order of their first layer
    """
    ways: list[list[tuple[str, ...]]] = [[]]
    for members in sets:
        ways += [[*way, members] for way in ways if not any(set(members) & set(other) for other in way)]
    return [_way(names, way) for way in ways]


def first_way(names: Sequence[str], sets: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The named layers with every set joined that does not overlap one before it."""
    taken: list[tuple[str, ...]] = []
    for members in sets:
        if not any(set(members) & set(other) for other in taken):
            taken.append(members)
    return _way(names, taken)


def _way(names: Sequence[str], sets: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The sets and the layers in none of them, in the order of their first layer."""
    owner = {name: members for members in sets for name in members}
    return list(dict.fromkeys(owner.get(name, (name,)) for name in names))


def _matches(name: str, part: str) -> bool:
    last = name.rpartition(".")[2]
    if part in ROLES:
        return last in ROLES[part]
    return fnmatchcase(name if "." in part else last, part)
