"""Every way a user can go wrong, one class each; the message names the layer and carries the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path


class PifaError(Exception):
    """Base of all errors raised on purpose by pifa-compile."""


class FactorError(PifaError, ValueError):
    """Factors of one layer that do not fit together."""

    def __init__(self, layer: str, problem: str) -> None:
        super().__init__(f"{layer or 'factors'}: {problem}")
        self.layer = layer


class WeightError(PifaError, ValueError):
    """A weight that cannot be factored."""

    def __init__(self, layer: str, problem: str, cure: str) -> None:
        super().__init__(f"{layer or 'weight'}: {problem}; {cure}")
        self.layer = layer


class RecipeError(PifaError, ValueError):
    """A recipe whose fields are impossible."""


class OptionError(PifaError, ValueError):
    """An option of the backend that is unknown or impossible."""


class UnknownOptionError(OptionError):
    """An option key that neither pifa nor Inductor knows."""

    def __init__(self, key: str, known: Iterable[str]) -> None:
        super().__init__(f"unknown option {key!r} for backend 'pifa'{did_you_mean(key, known)}")


class InputError(PifaError, ValueError):
    """A model, text or file that a command was given and cannot use."""


class StaleWeightError(PifaError, RuntimeError):
    """A weight changed after it was compiled, under the policy that forbids it."""

    def __init__(self, layer: str) -> None:
        super().__init__(
            f"{layer} has changed since the model was compiled from its factors; compress and compile it again, "
            "or use options={'staleness': 'check'} to recompile by itself"
        )
        self.layer = layer


class ImpliedWeightError(PifaError, RuntimeError):
    """An attempt to change the weight of a factored layer, which it does not have."""

    def __init__(self, operation: str) -> None:
        super().__init__(
            f"{operation}: the weight of a factored layer is computed from its factors and cannot be written to; "
            "change pivot_rows and coefficients, or make the model dense again with pifa_compile.restore_(model)"
        )


class NoRunError(PifaError):
    """No compression run of the store can be used."""

    def __init__(self, store: str, runs: Sequence[str], why: str = "no run knows a weight of this model") -> None:
        listed = "\n  ".join(runs) or "none"
        super().__init__(f"{why}; compress it first, or name another store or run. Runs in {store}:\n  {listed}")


class AmbiguousRunError(PifaError):
    """Several compression runs fit the model and nothing says which one is meant."""

    def __init__(self, candidates: Sequence[str]) -> None:
        listed = "\n  ".join(candidates)
        super().__init__(
            f"{len(candidates)} compression runs fit this model; name one with options={{'run': ID}} "
            f"or PIFA_RUN, or give the density and method:\n  {listed}"
        )


class StoreError(PifaError):
    """The compression store cannot do what was asked."""


class StoreAccessError(StoreError):
    """The disk says no: read-only, full, no permission."""

    def __init__(self, path: Path, problem: Exception | str) -> None:
        reason = problem.strerror if isinstance(problem, OSError) and problem.strerror else problem
        super().__init__(
            f"{path}: {reason}; make room or give access, or set PIFA_CACHE_DIR to a folder that can be written"
        )
        self.path = path


class StoreVersionError(StoreError):
    """Written by a newer version of pifa-compile."""

    def __init__(self, path: Path, what: str, found: object, known: object) -> None:
        super().__init__(
            f"{path}: {what} is {found!r}, this version knows {known!r}; update pifa-compile, "
            f"or set PIFA_CACHE_DIR to another folder"
        )
        self.path = path


class FactorFormatError(StoreError):
    """Factors in a format that this version does not know."""

    def __init__(self, path: Path, found: str | None, known: Iterable[str], layer: str = "") -> None:
        problem = f"factor format {str(found)[:80]!r} is not known here ({', '.join(known)})"
        super().__init__(f"{_label(layer)}{path}: {problem}; update pifa-compile")
        self.path, self.found, self.known, self.layer = path, found, tuple(known), layer


class DamagedError(StoreError):
    """A file of the store is not what was written."""

    def __init__(self, path: Path, problem: str, cure: str, layer: str = "") -> None:
        super().__init__(f"{_label(layer)}{path}: {problem}; {cure}")
        self.path, self.problem, self.cure, self.layer = path, problem, cure, layer


class UnknownRunError(StoreError):
    """No run of this name, or several."""

    def __init__(self, wanted: str, found: Sequence[str], root: Path, several: bool = False) -> None:
        listed = "".join(f"\n  {run_id}" for run_id in found) or " none"
        problem = "fits several runs, write more of the name" if several else "is no run"
        super().__init__(f"{wanted!r} {problem} in {root}; {'candidates' if several else 'there are'}:{listed}")


class RunMismatchError(StoreError):
    """A run cannot be continued with other settings than it was begun with."""

    def __init__(self, run_id: str, field: str, begun: object, given: object) -> None:
        super().__init__(
            f"run {run_id!r} was begun with {field} {begun!r}, not {given!r}; "
            f"use another run id, or remove the run with Store.delete_run({run_id!r})"
        )


class RunBusyError(StoreError):
    """Another process writes the run."""

    def __init__(self, run_id: str, holder: str, wish: str) -> None:
        super().__init__(f"run {run_id!r} is being written by {holder}; wait for it to end before you {wish}")


class RecordError(StoreError, ValueError):
    """A field of a run or of a layer in it that is impossible."""

    def __init__(self, owner: str, problem: str) -> None:
        super().__init__(f"{owner}: {problem}")


def _label(layer: str) -> str:
    return f"{layer}: " if layer else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """', did you mean X?' with the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
