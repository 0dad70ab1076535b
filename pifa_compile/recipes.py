"""Recipes: what to compress, by which method and how far; one versioned dataclass per method, JSON round trip."""

from __future__ import annotations

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
    coefficients   "same" as the weight's dtype, or "float16": in bfloat16 models the coefficients, and what they
                   multiply, have three more bits of mantissa
    skip           glob patterns of layer names to leave dense; the output embedding is left dense by default
    overrides      {pattern: {"density": d}}, {pattern: {"rank": r}} or {pattern: {"dense": true}}; the last match wins.
                   Layers with one have no part in the density of the others
    seed           for methods that draw random numbers
    """

    method: ClassVar[str]
    version: ClassVar[int] = 1

    density: float
    rank_multiple: int = 16
    pivoting: str = "maxvol"
    pivot_group: int = 1
    form: Literal["pifa", "pair"] = "pifa"
    coefficients: Literal["same", "float16"] = "same"
    skip: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)
        if not _is_count(self.rank_multiple):
            raise RecipeError(f"rank_multiple is {self.rank_multiple!r}; give a whole number from 1")
        if self.pivoting not in PIVOTINGS:
            known = sorted(PIVOTINGS)
            near = did_you_mean(str(self.pivoting), known)
            raise RecipeError(f"pivoting is {self.pivoting!r}; known: {', '.join(known)}{near}")
        if not _is_count(self.pivot_group) or self.rank_multiple % self.pivot_group:
            cure = f"give a divisor of rank_multiple ({self.rank_multiple})"
            raise RecipeError(f"pivot_group is {self.pivot_group!r}; {cure}")
        if self.form not in ("pifa", "pair"):
            raise RecipeError(f"form is {self.form!r}; give 'pifa' or 'pair'")
        if self.coefficients not in ("same", "float16"):
            raise RecipeError(f"coefficients is {self.coefficients!r}; give 'same' or 'float16'")
        if not isinstance(self.skip, list | tuple) or not all(isinstance(p, str) for p in self.skip):
            raise RecipeError(f"skip is {self.skip!r}; give a list of patterns")
        if type(self.seed) is not int:
            raise RecipeError(f"seed is {self.seed!r}; give a whole number")
        if not isinstance(self.overrides, Mapping):
            raise RecipeError(f"overrides are {self.overrides!r}; give a mapping of patterns")
        for pattern, override in self.overrides.items():
            _check_override(pattern, override)
        object.__setattr__(self, "skip", tuple(self.skip))
        object.__setattr__(self, "overrides", {p: dict(o) for p, o in self.overrides.items()})

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
        settings = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"method": self.method, "version": self.version} | settings


@dataclass(frozen=True, kw_only=True)
class Svd(Recipe):
    """Data-free: truncated singular value decomposition of every weight."""

    method: ClassVar[str] = "svd"


@dataclass(frozen=True, kw_only=True)
class Joint(Recipe):
    """Data-free: layers that read the same input are stacked, truncated together and share their pivots.

    joint  which layers of one module are joined, each a few parts with "+" between: "q", "k", "v", "gate" and "up",
           whatever a model calls them, or patterns of names. Of groups that overlap the first is taken; all other
           layers are truncated one by one
    """

    method: ClassVar[str] = "joint"

    joint: tuple[str, ...] = ("q+k", "gate+up")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "joint", _check_joint(self.joint))


@dataclass(frozen=True, kw_only=True)
class Calibrated(Recipe):
    """What the methods share that look at what the layers read.

    joint          which layers that read the same tensor may share one factorization, as in ``Joint``; where ranks are
                   allocated, each group is joined only if less is lost that way, otherwise always
    refit          what coefficients are fitted to the rounded pivot rows by: "weight", their own entries, or "inputs",
                   what the layer makes of the calibration inputs
    allocation     how ranks are spread over the layers: "loss" by the estimated loss, "relative" by the relative error
                   of each layer's outputs (it may leave layers dense), "uniform" the same density in each
    windows        windows of text to calibrate on at most, or sentences with as many tokens; one in sixteen is there to
                   measure errors only
    window_length  tokens in a window, or in a sentence at most
    """

    joint: tuple[str, ...] = ()
    refit: Literal["weight", "inputs"] = "weight"
    allocation: Literal["loss", "relative", "uniform"] = "uniform"
    windows: int = 64
    window_length: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "joint", _check_joint(self.joint))
        _check_choice("refit", self.refit, ("weight", "inputs"))
        _check_choice("allocation", self.allocation, ("loss", "relative", "uniform"))
        for key in ("windows", "window_length"):
            if not _is_count(getattr(self, key)):
                raise RecipeError(f"{key} is {getattr(self, key)!r}; give a whole number from 1")


@dataclass(frozen=True, kw_only=True)
class SvdLlm(Calibrated):
    """Truncated singular value decomposition of every weight, whitened by its inputs in the dense model."""

    method: ClassVar[str] = "svd-llm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocation == "loss":
            raise RecipeError("method 'svd-llm' has no gradients to allocate by; give 'uniform' or 'relative'")


@dataclass(frozen=True, kw_only=True)
class Mpifa(Calibrated):
    """Fitted to what each layer reads in the model compressed so far; outputs weighted, ranks priced by the loss.

    mixing     weight of the dense model's outputs in the target, from 0 to 1; the rest is what the dense layer makes of
               the inputs in the compressed model
    weighting  of a layer's outputs by the gradient of the loss: "full", "diagonal" or "none". Where full
               moments would take the walk above 6 GiB of memory, their diagonals are used, and a warning says so
    solver     "closed" finds the optimum; "alternating" is the published two-step form, which has no weighting

    The method as published: solver "alternating", weighting "none", allocation "uniform", mixing 0.25, joint ().
    """

    method: ClassVar[str] = "mpifa"

    joint: tuple[str, ...] = ("q+k", "gate+up")
    allocation: Literal["loss", "relative", "uniform"] = "loss"
    mixing: float = 1.0
    weighting: Literal["full", "diagonal", "none"] = "full"
    solver: Literal["closed", "alternating"] = "closed"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("weighting", self.weighting, ("full", "diagonal", "none"))
        _check_choice("solver", self.solver, ("closed", "alternating"))
        if not isinstance(self.mixing, int | float) or isinstance(self.mixing, bool) or not 0 <= self.mixing <= 1:
            raise RecipeError(f"mixing is {self.mixing!r}; give a number from 0 to 1")
        if self.solver == "alternating" and self.weighting != "none":
            raise RecipeError("the alternating solver knows no weighting of outputs; add weighting='none'")


@dataclass(frozen=True, kw_only=True)
class FirstCall(Recipe):
    """Calibrated, when a model is compiled, on the inputs of its first call; outputs weighted, ranks priced by how far
    the outputs of the compiled graph would change."""

    method: ClassVar[str] = "first-call"


#: Recipes by the name of their method.
RECIPES: dict[str, type[Recipe]] = {recipe.method: recipe for recipe in (Svd, Joint, SvdLlm, Mpifa, FirstCall)}


def recipe_for(method: str, **settings: Any) -> Recipe:
    """The recipe of the named method; raises RecipeError on an unknown method or field."""
    if method not in RECIPES:
        raise RecipeError(f"unknown method {method!r}; known: {', '.join(RECIPES)}{did_you_mean(method, RECIPES)}")
    known = [f.name for f in fields(RECIPES[method])]
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
        known = RECIPES[method].version
        raise RecipeError(f"recipe {method!r} has version {version}, this release knows {known}; update pifa-compile")
    return recipe_for(method, **settings)


def check_density(density: Any) -> float:
    """The density as a float; raises RecipeError unless it is a number between 0 and 1, both excluded."""
    number = isinstance(density, int | float) and not isinstance(density, bool)
    if not number or not 0 < density < 1:  # which NaN is not, either
        raise RecipeError(
            f"density is {density!r}; it is the fraction of parameters that is kept, a number above 0 and below 1"
            + (" (1 keeps the dense model: leave the density out)" if number and density == 1 else "")
        )
    return float(density)


def _check_choice(key: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RecipeError(f"{key} is {value!r}; known: {', '.join(known)}{did_you_mean(str(value), known)}")


def _check_joint(joint: Any) -> tuple[str, ...]:
    """The groups as a tuple; raises RecipeError unless each names two parts at least."""
    groups = joint if isinstance(joint, list | tuple) else None
    good = groups is not None and all(isinstance(g, str) and g.count("+") and all(g.split("+")) for g in groups)
    if groups is None or not good:
        raise RecipeError(f"joint is {joint!r}; give a list of groups like 'q+k' and 'gate+up'")
    return tuple(groups)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _check_override(pattern: Any, override: Any) -> None:
    known = isinstance(override, Mapping) and len(override) == 1 and set(override) <= set(_OVERRIDES)
    if not isinstance(pattern, str) or not known:
        raise RecipeError(f"override {pattern!r} is {override!r}; give exactly one of {', '.join(_OVERRIDES)}")
    if "density" in override:
        check_density(override["density"])
    if "rank" in override and not _is_count(override["rank"]):
        raise RecipeError(f"override {pattern!r} has the rank {override['rank']!r}; give a whole number from 1")
    if override.get("dense", True) is not True:
        raise RecipeError(f"override {pattern!r} has dense={override['dense']!r}; give true, or leave it out")
