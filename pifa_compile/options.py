"""What a caller may set on the backend: argument before environment before default, and nothing accepted in silence."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pifa_compile import _torch
from pifa_compile.errors import OptionError, RecipeError, UnknownOptionError, did_you_mean
from pifa_compile.recipes import RECIPES, check_density


@dataclass(frozen=True)
class Settings:
    """The backend's options, resolved.

    run         id of the compression run to use, or an unambiguous beginning of it (PIFA_RUN)
    density     fraction of parameters to keep; compresses at the first call if no run has it (PIFA_DENSITY)
    method      method of that run (PIFA_METHOD)
    calibrate   "first-call": what a density without a run is made from, at the first call, are the inputs of that call;
                no run of another method fits. "none": without data; no such run fits. None: any run of the density
                fits, and what is made is calibrated (PIFA_CALIBRATE)
    store       directory of the compression cache (PIFA_CACHE_DIR; default: the Hugging Face assets cache)
    skip        glob patterns of layer names that stay dense in this compilation (PIFA_SKIP, comma between)
    allow_grad  replace trainable weights although gradients are on: their gradients are then lost (PIFA_ALLOW_GRAD)
    pairs       low-rank pairs in the graph: None takes those in float32 and float64, True also those in 16 bit, False
                none (PIFA_PAIRS)
    dump        directory for graph dumps (PIFA_DUMP)
    inner       "inductor", or "eager" to stop after the graph passes (PIFA_INNER)
    staleness   a weight changed after compilation: "check" (dense, then recompiled), "error", "off" (PIFA_STALENESS)
    damaged     an object of the run is not what was written, or missing: "error" names what mends it, "recompute" makes
                it again where it follows from the weights and inputs at hand (PIFA_DAMAGED)
    inductor    every other key: settings of Inductor, from ``mode`` and ``options``
    """

    run: str | None = None
    density: float | None = None
    method: str | None = None
    calibrate: str | None = None
    store: Path | None = None
    skip: tuple[str, ...] = ()
    allow_grad: bool = False
    pairs: bool | None = None
    dump: Path | None = None
    inner: str = "inductor"
    staleness: str = "check"
    damaged: str = "error"
    inductor: Mapping[str, Any] = field(default_factory=dict)


def resolve(mode: str | None = None, options: Mapping[str, Any] | None = None) -> Settings:
    """Settings from what torch.compile hands a backend; raises OptionError, with the nearest name of an unknown key.

    torch.compile takes a mode or options, never both, so the mode may be one of the options.
    """
    values = _from_environment(options or {})
    known = _torch.inductor_keys()
    inductor: dict[str, Any] = _mode(mode if options is None else options.get("mode", mode))
    for key, value in (options or {}).items():
        if key == "mode":
            continue
        if key in _PARSERS:
            values[key] = _parse(key, value, f"option {key}={value!r}")
        elif (dotted := key.replace("-", "_")) in known:
            inductor[dotted] = value
        else:
            raise UnknownOptionError(key, ["mode", *_PARSERS, *known])
    if values.get("run") and (values.get("density") or values.get("method")):
        raise OptionError("options 'run' and 'density' or 'method' both choose the compression run; give one of them")
    if values.get("method") and not values.get("density"):
        raise OptionError(f"option method={values['method']!r} needs a density beside it")
    if calibrate := values.get("calibrate"):
        if values.get("run") or values.get("method"):
            other = "run" if values.get("run") else "method"
            raise OptionError(f"options 'calibrate' and {other!r} both choose the compression run; give one of them")
        if not values.get("density"):
            raise OptionError(f"option calibrate={calibrate!r} needs a density beside it")
    return Settings(**values, inductor=inductor)


def _from_environment(options: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that are set and that no option overrules, itself or by choosing the run in another way."""
    overruled = set(options)
    if "run" in options:
        overruled |= {"density", "method", "calibrate"}
    if {"density", "method", "calibrate"} & set(options):
        overruled.add("run")
    if "method" in options or "calibrate" in options:
        overruled |= {"method", "calibrate"}
    values = {}
    for key, variable in _VARIABLES.items():
        if os.environ.get(variable) and key not in overruled:
            values[key] = _parse(key, os.environ[variable], f"{variable}={os.environ[variable]!r}")
    return values


def _mode(mode: str | None) -> dict[str, Any]:
    if mode is None:
        return {}
    try:
        return _torch.mode_settings(mode)
    except RuntimeError as error:
        raise OptionError(f"unknown mode {mode!r}: {error}") from None


def _parse(key: str, value: Any, said: str) -> Any:
    try:
        return _PARSERS[key](value)
    except (ValueError, TypeError, RecipeError) as error:
        raise OptionError(f"{said}: {error}") from None


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("give a non-empty string")
    return value


def _density(value: Any) -> float:
    with suppress(ValueError):  # no number at all: check_density says so
        value = float(value) if isinstance(value, str) else value
    return check_density(value)


def _method(value: Any) -> str:
    if value not in RECIPES:
        raise ValueError(f"known methods: {', '.join(RECIPES)}{did_you_mean(str(value), RECIPES)}")
    return str(value)


def _path(value: Any) -> Path:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError("give a directory")
    return Path(value).expanduser()


def _patterns(value: Any) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(_text(p).strip() for p in parts)


def _flag(value: Any) -> bool:
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() not in words:
        raise ValueError("give True or False")
    return words[str(value).lower()]


def _one_of(*words: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in words:
            raise ValueError(f"give {', '.join(map(repr, words[:-1]))} or {words[-1]!r}")
        return str(value)

    return parse


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "run": _text,
    "density": _density,
    "method": _method,
    "calibrate": _one_of("first-call", "none"),
    "store": _path,
    "skip": _patterns,
    "allow_grad": _flag,
    "pairs": _flag,
    "dump": _path,
    "inner": _one_of("inductor", "eager"),
    "staleness": _one_of("check", "error", "off"),
    "damaged": _one_of("error", "recompute"),
}
_VARIABLES = {key: "PIFA_CACHE_DIR" if key == "store" else f"PIFA_{key.upper()}" for key in _PARSERS}
assert set(_PARSERS) | {"inductor"} == {f.name for f in fields(Settings)}
