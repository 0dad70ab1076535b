"""Recipes: what to compress, by which method and how far; one frozen dataclass per method, versioned, JSON round trip."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

from pifa_compile.errors import RecipeError, did_you_mean
from pifa_compile.pivoting import PIVOTINGS

_OVERRIDES = ("density", "rank", "dense")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every method shares.

    density        fraction of the parameters of the replaced linear layers that is kept, between 0 and 1
    rank_multiple  ranks are rounded down to this multiple; what that leaves is given to later layers
    pivoting       how pivots are chosen: "maxvol", "qr" or "lu"
    pivot_group    pivots in aligned groups of this many rows (1: free)
    form           "pifa", or "pair" to keep plain low-rank pairs for comparison
    skip           glob patterns of layer names to leave dense; the output embedding is left dense by default
    overrides      {pattern: {"density": d}}, {pattern: {"rank": r}} or {pattern: {"dense": true}}; the last match wins
    seed           for methods that draw random numbers
    """

    method: ClassVar[str]
    version: ClassVar[int] = 1

    density: float
    rank_multiple: int = 16
    pivoting: str = "maxvol"
    pivot_group: int = 1
    form: Literal["pifa", "pair"] = "pifa"
    skip: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)
        if not isinstance(self.rank_multiple, int) or self.rank_multiple < 1:
            raise RecipeError(f"rank_multiple is {self.rank_multiple!r}; give a whole number from 1")
        if self.pivoting not in PIVOTINGS:
            known = sorted(PIVOTINGS)
            raise RecipeError(f"pivoting is {self.pivoting!r}; known: {', '.join(known)}{did_you_mean(self.pivoting, known)}")
        if not isinstance(self.pivot_group, int) or self.pivot_group < 1 or self.rank_multiple % self.pivot_group:
            raise RecipeError(f"pivot_group is {self.pivot_group!r}; give a divisor of rank_multiple ({self.rank_multiple})")
        if self.form not in ("pifa", "pair"):
            raise RecipeError(f"form is {self.form!r}; give 'pifa' or 'pair'")
        if isinstance(self.skip, str):
            raise RecipeError(f"skip is the string {self.skip!r}; give a list of patterns")
        object.__setattr__(self, "skip", tuple(self.skip))
        object.__setattr__(self, "overrides", {p: dict(o) for p, o in self.overrides.items()})
        for pattern, override in self.overrides.items():
            _check_override(pattern, override)

    def override_for(self, name: str) -> Mapping[str, Any]:
        """The override of the layer ``name``, or an empty mapping."""
        found: Mapping[str, Any] = {}
        for pattern, override in self.overrides.items():
            if fnmatchcase(name, pattern):
                found = override
        return found

    def reason_to_skip(self, name: str) -> str | None:
        """Why the recipe leaves the layer ``name`` dense, or None."""
        for pattern in self.skip:
            if fnmatchcase(name, pattern):
                return f"skipped by the pattern {pattern!r}"
        return "left dense by an override" if self.override_for(name).get("dense") else None

    def to_json(self) -> dict[str, Any]:
        """A JSON object that ``recipe_from_json`` turns back into an equal recipe."""
        return {"method": self.method, "version": self.version} | asdict(self) | {"skip": list(self.skip)}


@dataclass(frozen=True, kw_only=True)
class Svd(Recipe):
    """Data-free: truncated singular value decomposition of every weight."""

    method: ClassVar[str] = "svd"


#: Recipes by the name of their method.
RECIPES: dict[str, type[Recipe]] = {recipe.method: recipe for recipe in (Svd,)}


def recipe_for(method: str, **settings: Any) -> Recipe:
    """The recipe of the named method; raises RecipeError on an unknown method or field."""
    if method not in RECIPES:
        raise RecipeError(f"unknown method {method!r}; known: {', '.join(RECIPES)}{did_you_mean(method, RECIPES)}")
    known = {f.name for f in fields(RECIPES[method])}
    for key in settings:
        if key not in known:
            raise RecipeError(f"method {method!r} has no field {key!r}{did_you_mean(key, known)}")
    if "density" not in settings:
        raise RecipeError(f"method {method!r} needs a density, the fraction of parameters to keep")
    return RECIPES[method](**settings)


def recipe_from_json(data: Mapping[str, Any]) -> Recipe:
    """The recipe that ``to_json`` wrote; raises RecipeError when a newer version wrote it."""
    settings = dict(data)
    method, version = settings.pop("method", None), settings.pop("version", None)
    if not isinstance(method, str) or not isinstance(version, int):
        raise RecipeError(f"no recipe: it names the method {method!r} and the version {version!r}")
    if method in RECIPES and version > RECIPES[method].version:
        raise RecipeError(f"recipe {method!r} has version {version}, this release knows {RECIPES[method].version}; upgrade pifa-compile")
    return recipe_for(method, **settings)


def check_density(density: Any) -> float:
    """The density as a float; raises RecipeError unless it is a number between 0 and 1, both excluded."""
    number = isinstance(density, int | float) and not isinstance(density, bool)
    if not number or math.isnan(density) or not 0 < density < 1:
        raise RecipeError(
            f"density is {density!r}; it is the fraction of parameters that is kept, a number above 0 and below 1"
            + (" (1 keeps the dense model: leave the density out)" if number and density == 1 else "")
        )
    return float(density)


def _check_override(pattern: str, override: Mapping[str, Any]) -> None:
    if len(override) != 1 or next(iter(override)) not in _OVERRIDES:
        raise RecipeError(f"override {pattern!r} is {dict(override)!r}; give exactly one of {', '.join(_OVERRIDES)}")
    if "density" in override:
        check_density(override["density"])
    if "rank" in override and (not isinstance(override["rank"], int) or override["rank"] < 1):
        raise RecipeError(f"override {pattern!r} has the rank {override['rank']!r}; give a whole number from 1")
