"""Recipes come back from JSON, and impossible ones are refused with the way out."""

import json
from dataclasses import dataclass

import pytest

from pifa_compile import recipes
from pifa_compile.errors import RecipeError
from pifa_compile.recipes import RECIPES, Svd, check_density, recipe_for, recipe_from_json

FULL = Svd(
    density=0.55,
    rank_multiple=8,
    pivoting="qr",
    pivot_group=4,
    form="pair",
    coefficients="float16",
    skip=["*.pooler", "head"],
    overrides={"a.*": {"density": 0.25}, "b": {"rank": 7}, "c": {"dense": True}},
    seed=3,
)


@pytest.mark.parametrize("recipe", [Svd(density=0.5), FULL])
def test_a_recipe_comes_back_from_json(recipe):
    text = json.dumps(recipe.to_json())
    assert recipe_from_json(json.loads(text)) == recipe
    assert json.loads(text)["method"] == "svd"
    assert json.loads(text)["version"] == Svd.version


def test_every_recipe_is_found_by_its_method():
    assert RECIPES["svd"] is Svd
    assert recipe_for("svd", density=0.5, rank_multiple=8) == Svd(density=0.5, rank_multiple=8)
    assert all(recipe.method == method for method, recipe in RECIPES.items())


def test_a_newer_version_is_refused():
    data = Svd(density=0.5).to_json()
    with pytest.raises(RecipeError, match=r"version 2, this release knows 1; update pifa-compile"):
        recipe_from_json(data | {"version": 2})


def test_an_older_version_is_read(monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Newer(Svd):
        version = 5

    monkeypatch.setitem(recipes.RECIPES, "svd", Newer)
    assert recipe_from_json(Svd(density=0.5).to_json()) == Newer(density=0.5)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({}, "no recipe: it names the method None and the version None"),
        ({"method": "svd", "density": 0.5}, "the version None"),
        ({"method": "svd", "version": "1", "density": 0.5}, "the version '1'"),
        ({"method": "sdv", "version": 1, "density": 0.5}, "unknown method 'sdv'; known: svd.*; did you mean 'svd'"),
        ({"method": "svd", "version": 1}, "needs a density"),
        ({"method": "svd", "version": 1, "density": 0.5, "rank_multipel": 8}, "did you mean 'rank_multiple'"),
    ],
)
def test_json_that_is_no_recipe_is_refused(data, problem):
    with pytest.raises(RecipeError, match=problem):
        recipe_from_json(data)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"density": 0}, "density is 0; it is the fraction of parameters that is kept"),
        ({"density": -0.1}, "density is -0.1"),
        ({"density": 1}, "1 keeps the dense model: leave the density out"),
        ({"density": 60}, "density is 60"),
        ({"density": float("nan")}, "density is nan"),
        ({"density": "0.5"}, "density is '0.5'"),
        ({"density": True}, "density is True"),
        ({"density": None}, "density is None"),
        ({"rank_multiple": 0}, "rank_multiple is 0; give a whole number from 1"),
        ({"rank_multiple": 8.0}, "rank_multiple is 8.0"),
        ({"rank_multiple": True}, "rank_multiple is True"),
        ({"pivoting": "maxvoll"}, "known: lu, maxvol, qr; did you mean 'maxvol'"),
        ({"pivoting": None}, "pivoting is None"),
        ({"pivot_group": 0}, "pivot_group is 0"),
        ({"pivot_group": 3}, r"give a divisor of rank_multiple \(16\)"),
        ({"pivot_group": 32}, r"give a divisor of rank_multiple \(16\)"),
        ({"form": "dense"}, "form is 'dense'; give 'pifa' or 'pair'"),
        ({"coefficients": "int8"}, "coefficients is 'int8'; give 'same' or 'float16'"),
        ({"skip": "lm_head"}, "skip is 'lm_head'; give a list of patterns"),
        ({"skip": None}, "skip is None"),
        ({"skip": [1]}, r"skip is \[1\]"),
        ({"seed": "0"}, "seed is '0'"),
        ({"overrides": [("a", {"rank": 1})]}, "give a mapping"),
        ({"overrides": {"a": 0.5}}, "override 'a' is 0.5; give exactly one of density, rank, dense"),
        ({"overrides": {"a": {}}}, "give exactly one of"),
        ({"overrides": {"a": {"rank": 1, "density": 0.5}}}, "give exactly one of"),
        ({"overrides": {"a": {"ranks": 1}}}, "give exactly one of"),
        ({"overrides": {"a": {"density": 1.5}}}, "density is 1.5"),
        ({"overrides": {"a": {"rank": 0}}}, "override 'a' has the rank 0; give a whole number from 1"),
        ({"overrides": {"a": {"rank": True}}}, "has the rank True"),
        ({"overrides": {"a": {"dense": False}}}, "override 'a' has dense=False; give true, or leave it out"),
    ],
)
def test_impossible_fields_are_refused(fields, problem):
    with pytest.raises(RecipeError, match=problem):
        Svd(**{"density": 0.5} | fields)


def test_the_last_override_that_matches_wins():
    recipe = Svd(density=0.5, overrides={"*": {"rank": 3}, "b.*": {"density": 0.25}, "b.1": {"dense": True}})
    assert recipe.override_for("a") == {"rank": 3}
    assert recipe.override_for("b.0") == {"density": 0.25}
    assert recipe.override_for("b.1") == {"dense": True}
    assert Svd(density=0.5).override_for("a") == {}


def test_patterns_name_the_layers_that_stay_dense():
    recipe = Svd(density=0.5, skip=("*.out", "b*"), overrides={"c": {"dense": True}, "d": {"rank": 2}})
    assert recipe.reason_to_skip("a.out") == "skipped by the pattern '*.out'"
    assert recipe.reason_to_skip("b.in") == "skipped by the pattern 'b*'"
    assert recipe.reason_to_skip("c") == "left dense by an override"
    assert recipe.reason_to_skip("d") is None
    assert recipe.reason_to_skip("A.OUT") is None


def test_a_recipe_keeps_what_it_was_given():
    """Neither the caller's list nor its dict is the recipe's own."""
    skip, overrides = ["a"], {"b": {"rank": 2}}
    recipe = Svd(density=0.5, skip=skip, overrides=overrides)
    skip.append("c")
    overrides["b"]["rank"] = 9
    assert recipe.skip == ("a",)
    assert recipe.override_for("b") == {"rank": 2}


@pytest.mark.parametrize("density", [1e-9, 0.5, 0.999999])
def test_a_density_between_0_and_1_is_one(density):
    assert check_density(density) == density
