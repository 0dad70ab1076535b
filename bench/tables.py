"""What is compared: tables of cases, one line each. A case is a recipe without its density, or a baseline by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from baselines import PRUNERS

from pifa_compile.recipes import Calibrated, Joint, Mpifa, Recipe, Svd, SvdLlm

DENSITIES = (0.9, 0.8, 0.7, 0.6, 0.5625, 0.5, 0.4)


@dataclass(frozen=True)
class Case:
    """One row of a table at each density.

    kind      the recipe's class; None: a baseline of ``baselines.PRUNERS``, which has no density
    settings  fields of the recipe
    own_text  calibrated on text that the model samples itself
    """

    kind: type[Recipe] | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    own_text: bool = False

    def recipe(self, density: float, windows: int) -> Recipe:
        """At a density, with ``windows`` to calibrate on unless the settings say how many; ranks of every size."""
        assert self.kind is not None, "a baseline has no recipe"
        size = {"windows": windows} if issubclass(self.kind, Calibrated) else {}
        return self.kind(**{"density": density, "rank_multiple": 1} | size | dict(self.settings))


#: The method as its paper has it.
_PUBLISHED = {"solver": "alternating", "weighting": "none", "allocation": "uniform", "mixing": 0.25, "joint": ()}
_APART: dict[str, Any] = {"joint": ()}

METHODS: dict[str, Case] = {
    "svd pair": Case(Svd, {"form": "pair"}),
    "svd-llm pair": Case(SvdLlm, {"form": "pair"}),
    "svd": Case(Svd),
    "joint": Case(Joint),
    "svd-llm": Case(SvdLlm),
    "mpifa published": Case(Mpifa, _PUBLISHED),
    "mpifa uniform": Case(Mpifa, _APART | {"allocation": "uniform"}),
    "mpifa apart": Case(Mpifa, _APART),
    "mpifa": Case(Mpifa),
    **{name: Case(None) for name in PRUNERS},
}

#: From the best to the worst: what should hold at every density.
ORDER = ("mpifa", "mpifa uniform", "mpifa published", "svd-llm pair", "svd pair")

#: Why the defaults are what they are: one setting at a time. Settings that depend on another one are tried without it.
DEFAULTS: dict[str, dict[str, Case]] = {
    "solver": {
        name: Case(Mpifa, _APART | {"weighting": "none", "allocation": "uniform", "solver": name})
        for name in ("closed", "alternating")
    },
    "mixing": {f"mixing {x:g}": Case(Mpifa, {"mixing": x}) for x in (0.0, 0.25, 0.5, 1.0)},
    "weighting": {f"weighting {name}": Case(Mpifa, {"weighting": name}) for name in ("full", "diagonal", "none")},
    "allocation": {
        f"allocation {name}": Case(Mpifa, _APART | {"allocation": name}) for name in ("loss", "relative", "uniform")
    },
    "joint": {
        f"joint {', '.join(groups) or 'none'}": Case(Mpifa, {"joint": groups})
        for groups in ((), ("q+k",), ("gate+up",), ("q+k", "gate+up"), ("q+k+v", "gate+up"))
    },
    "refit": {f"refit by {name}": Case(Mpifa, {"refit": name}) for name in ("weight", "inputs")},
    "size": {f"{count} windows": Case(Mpifa, {"windows": count}) for count in (4, 16, 64, 256)},
    "text": {"a text": Case(Mpifa), "its own text": Case(Mpifa, own_text=True)},
}
