"""Options: argument before environment before default, Inductor's own keys, and no word accepted in silence."""

from dataclasses import fields
from pathlib import Path

import pytest

from pifa_compile.errors import OptionError, UnknownOptionError
from pifa_compile.options import Settings, resolve


def test_defaults(monkeypatch):
    monkeypatch.delenv("PIFA_CACHE_DIR")
    assert resolve() == resolve(None, {}) == Settings()
    set_to = {f.name: getattr(Settings(), f.name) for f in fields(Settings)}
    words = {"inner": "inductor", "staleness": "check", "damaged": "error"}
    assert {name: value for name, value in set_to.items() if value} == words, "every other feature is off by default"


@pytest.mark.parametrize(
    ("key", "variable", "text", "value", "other", "other_value"),
    [
        ("run", "PIFA_RUN", "svd-0.5-ab", "svd-0.5-ab", "svd-0.6", "svd-0.6"),
        ("density", "PIFA_DENSITY", "0.5", 0.5, 0.6, 0.6),
        ("density", "PIFA_DENSITY", ".5", 0.5, "0.6", 0.6),
        ("store", "PIFA_CACHE_DIR", "/a/b", Path("/a/b"), Path("c"), Path("c")),
        ("skip", "PIFA_SKIP", "a.*, b", ("a.*", "b"), ["c"], ("c",)),
        ("allow_grad", "PIFA_ALLOW_GRAD", "1", True, False, False),
        ("allow_grad", "PIFA_ALLOW_GRAD", "No", False, 1, True),
        ("dump", "PIFA_DUMP", "/a/b", Path("/a/b"), "c", Path("c")),
        ("inner", "PIFA_INNER", "eager", "eager", "inductor", "inductor"),
        ("staleness", "PIFA_STALENESS", "error", "error", "off", "off"),
        ("damaged", "PIFA_DAMAGED", "recompute", "recompute", "error", "error"),
    ],
)
def test_an_argument_overrules_the_environment_which_overrules_the_default(
    monkeypatch, key, variable, text, value, other, other_value
):
    monkeypatch.setenv(variable, text)
    assert getattr(resolve(), key) == value
    assert getattr(resolve(None, {key: other}), key) == other_value
    monkeypatch.setenv(variable, "")
    assert getattr(resolve(), key) == getattr(Settings(), key)


def test_the_method_goes_with_a_density(monkeypatch):
    assert resolve(None, {"method": "svd", "density": 0.5}).method == "svd"
    with pytest.raises(OptionError, match="option method='svd' needs a density beside it"):
        resolve(None, {"method": "svd"})
    monkeypatch.setenv("PIFA_DENSITY", "0.5")
    assert resolve(None, {"method": "svd"}) == resolve(None, {"method": "svd", "density": 0.5})


def test_calibration_goes_with_a_density_and_with_no_other_choice_of_a_run(monkeypatch):
    assert resolve(None, {"density": 0.5}).calibrate is None
    for word in ("first-call", "none"):
        assert resolve(None, {"density": 0.5, "calibrate": word}).calibrate == word
    with pytest.raises(OptionError, match="option calibrate='none' needs a density beside it"):
        resolve(None, {"calibrate": "none"})
    with pytest.raises(OptionError, match="options 'calibrate' and 'method' both choose the compression run"):
        resolve(None, {"density": 0.5, "calibrate": "first-call", "method": "svd"})
    with pytest.raises(OptionError, match="options 'calibrate' and 'run' both choose the compression run"):
        resolve(None, {"calibrate": "first-call", "run": "a"})
    with pytest.raises(OptionError, match="option calibrate='always': give 'first-call' or 'none'"):
        resolve(None, {"density": 0.5, "calibrate": "always"})
    monkeypatch.setenv("PIFA_DENSITY", "0.5")
    monkeypatch.setenv("PIFA_CALIBRATE", "none")
    assert resolve().calibrate == "none"
    assert resolve(None, {"method": "svd"}).calibrate is resolve(None, {"run": "a"}).calibrate is None
    monkeypatch.setenv("PIFA_METHOD", "svd")
    assert resolve(None, {"calibrate": "first-call"}).method is None
    with pytest.raises(OptionError, match="both choose the compression run"):
        resolve()


def test_a_home_folder_is_understood(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert resolve(None, {"store": "~/x"}).store == Path("/home/someone/x")


@pytest.mark.parametrize("other", [{"density": 0.5}, {"density": 0.5, "method": "svd"}])
def test_a_run_and_a_density_contradict_each_other(monkeypatch, other):
    with pytest.raises(OptionError, match="both choose the compression run; give one of them"):
        resolve(None, {"run": "a"} | other)
    for key, value in ({"run": "a"} | other).items():
        monkeypatch.setenv(f"PIFA_{key.upper()}", str(value))
    with pytest.raises(OptionError, match="both choose the compression run"):
        resolve()


def test_a_run_or_a_density_overrules_the_other_of_the_environment(monkeypatch):
    monkeypatch.setenv("PIFA_RUN", "a")
    assert resolve(None, {"density": 0.5}) == Settings(density=0.5, store=resolve().store)
    monkeypatch.delenv("PIFA_RUN")
    monkeypatch.setenv("PIFA_DENSITY", "0.5")
    monkeypatch.setenv("PIFA_METHOD", "svd")
    assert resolve(None, {"run": "a"}) == Settings(run="a", store=resolve().store)
    assert resolve().density == 0.5


@pytest.mark.parametrize(
    ("key", "near"),
    [("densty", "density"), ("stor", "store"), ("max_autotun", "max_autotune"), ("alow_grad", "allow_grad")],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(key, near):
    with pytest.raises(UnknownOptionError, match=f"unknown option '{key}' for backend 'pifa'; did you mean '{near}'"):
        resolve(None, {key: 1})


def test_a_key_that_is_near_nothing_is_refused():
    with pytest.raises(UnknownOptionError, match=r"unknown option 'zzzzzzzz' for backend 'pifa'$"):
        resolve(None, {"zzzzzzzz": 1})


def test_keys_of_inductor_pass_through():
    given = {"max_autotune": True, "triton.cudagraphs": False, "epilogue-fusion": True, "density": 0.5}
    settings = resolve(None, given)
    assert settings.inductor == {"max_autotune": True, "triton.cudagraphs": False, "epilogue_fusion": True}
    assert settings.density == 0.5


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_a_mode_is_what_inductor_makes_of_it(mode):
    from torch._inductor import list_mode_options

    assert dict(resolve(mode).inductor) == dict(list_mode_options(mode))


def test_an_option_overrules_the_mode():
    assert resolve("max-autotune").inductor["max_autotune"] is True
    both = resolve("max-autotune", {"max_autotune": False})
    assert both.inductor["max_autotune"] is False
    assert both.inductor["coordinate_descent_tuning"] is True


def test_a_mode_may_be_one_of_the_options_because_torch_compile_takes_only_one_of_both():
    both = resolve(None, {"mode": "max-autotune", "max_autotune": False, "density": 0.5})
    assert both == resolve("max-autotune", {"max_autotune": False, "density": 0.5})
    assert resolve(None, {"mode": None}) == resolve()


@pytest.mark.parametrize("settings", [{"mode": "fast"}, {"options": {"mode": "fast"}}])
def test_an_unknown_mode_is_refused(settings):
    with pytest.raises(OptionError, match="unknown mode 'fast'"):
        resolve(**settings)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"density": 1.5}, "option density=1.5: density is 1.5; it is the fraction of parameters that is kept"),
        ({"density": 1}, "leave the density out"),
        ({"density": 0}, "density is 0; it is the fraction of parameters that is kept, a number above 0 and below 1"),
        ({"density": float("nan")}, "density is nan"),
        ({"density": True}, "density is True"),
        ({"density": "half"}, "option density='half': density is 'half'"),
        ({"density": "1"}, "leave the density out"),
        ({"density": "nan"}, "density is nan"),
        ({"density": None}, "option density=None"),
        ({"run": ""}, "option run='': give a non-empty string"),
        ({"run": 3}, "option run=3: give a non-empty string"),
        ({"method": "sdv", "density": 0.5}, "known methods: svd.*; did you mean 'svd'"),
        ({"store": ""}, "give a directory"),
        ({"store": 3}, "give a directory"),
        ({"dump": None}, "option dump=None: give a directory"),
        ({"skip": "a,,b"}, "give a non-empty string"),
        ({"skip": [1]}, "give a non-empty string"),
        ({"skip": 1}, "option skip=1"),
        ({"allow_grad": "maybe"}, "give True or False"),
        ({"allow_grad": 2}, "give True or False"),
        ({"inner": "aot_eager"}, "give 'inductor' or 'eager'"),
        ({"staleness": True}, "give 'check', 'error' or 'off'"),
        ({"damaged": "ignore"}, "option damaged='ignore': give 'error' or 'recompute'"),
    ],
)
def test_an_impossible_value_is_refused(options, problem):
    with pytest.raises(OptionError, match=problem):
        resolve(None, options)


def test_an_impossible_value_of_the_environment_names_the_variable(monkeypatch):
    monkeypatch.setenv("PIFA_DENSITY", "60%")
    with pytest.raises(OptionError, match="PIFA_DENSITY='60%': density is '60%'"):
        resolve()
    assert resolve(None, {"density": 0.6}).density == 0.6
