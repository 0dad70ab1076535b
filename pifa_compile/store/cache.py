"""The store as its users see it: objects and runs under one folder."""

from __future__ import annotations

import json
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pifa_compile.errors import (
    DamagedError,
    FactorError,
    FactorFormatError,
    RecordError,
    StoreAccessError,
    StoreError,
    StoreVersionError,
    UnknownRunError,
)
from pifa_compile.factors import Factors, PifaFactors, factors_from_tensors
from pifa_compile.store import evaluations, files, locks, objects
from pifa_compile.store.evaluations import Evaluation
from pifa_compile.store.json_text import parse
from pifa_compile.store.records import OBJECT, RUN_ID, LayerRecord, Run, RunHeader
from pifa_compile.store.writer import RunWriter, document_path, journal_path, read_document, read_partial

VERSION = 1
_FORMAT = "pifa-compile store"
_MARKER = "store.json"
_log = logging.getLogger(__name__)


def default_root() -> Path:
    """PIFA_CACHE_DIR, else a folder among the assets of huggingface_hub."""
    if given := os.environ.get("PIFA_CACHE_DIR"):
        return Path(given).expanduser()
    from huggingface_hub import cached_assets_path  # takes a quarter of a second to import, and often is not needed

    try:
        return cached_assets_path("pifa_compile", namespace="store", subfolder="default")
    except OSError as error:  # it makes the folder
        raise StoreAccessError(Path(error.filename or "the Hugging Face cache"), error) from error


class Store:
    """The compression cache in one folder; nothing is made there before the first write.

    root  the folder; None takes PIFA_CACHE_DIR, else a folder in the Hugging Face cache

    All methods raise StoreError: StoreVersionError for what a newer version wrote, DamagedError for what is not as it
    was written, StoreAccessError for what the disk refuses.
    """

    def __init__(self, root: Path | str | None = None) -> None:
        given = default_root() if root is None else Path(root).expanduser()
        try:
            self.root = given.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a name that cannot be
            raise StoreAccessError(given, error) from error
        self._check_version()

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    # Objects

    def put_object(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
        """Store the tensors of one layer and return their digest, 64 hex digits; the same content again is no change.

        ``metadata`` must name a "factor_format" out of FACTOR_FORMATS, else ValueError.
        """
        self._prepare()
        return objects.write_object(self.root, tensors, metadata)

    def get_object(self, digest: str, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of an object, verified. Raises FactorFormatError for a format not known here."""
        return objects.read_object(self.root, _valid_digest(digest), device)

    def has_object(self, digest: str) -> bool:
        """Whether there is such an object, whole or damaged."""
        return objects.object_path(self.root, _valid_digest(digest)).is_file()

    def put_factors(self, factors: Factors) -> str:
        """``put_object`` for factors."""
        metadata = {"factor_format": "float", "form": factors.form}
        if isinstance(factors, PifaFactors):
            metadata["y_scale"] = repr(float(factors.y_scale))
        return self.put_object(factors.tensors(), metadata)

    def factors(self, record: LayerRecord, device: torch.device | str = "cpu") -> Factors:
        """The factors that a layer's record names, verified, and of the record's form, shape and rank."""
        if record.object is None:
            raise RecordError(f"layer {record.name!r}", f"stays dense and has no factors: {record.reason}")
        path = objects.object_path(self.root, record.object)
        try:
            tensors, metadata = objects.read_object(self.root, record.object, device, _most_bytes(record))
            factors = factors_from_tensors(tensors, _y_scale(metadata), record.name)
        except DamagedError as error:
            raise DamagedError(error.path, error.problem, error.cure, record.name) from error
        except FactorFormatError as error:
            raise FactorFormatError(error.path, error.found, error.known, record.name) from error
        except (FactorError, TypeError, IndexError, ValueError) as error:
            raise DamagedError(path, f"not the factors of a layer ({error})", objects.CURE, record.name) from error
        found, wanted = (factors.form, factors.shape, factors.rank), (record.form, record.shape, record.rank)
        other = f"form, shape and rank are {found}, the run says {wanted}" if found != wanted else None
        if problem := other or _not_finite(factors):
            cure = "remove the run with Store.delete_run and compress again"
            raise DamagedError(path, problem, cure, record.name)
        return factors

    # Runs

    def write_run(self, header: RunHeader) -> RunWriter:
        """Begin a run or go on with it: ``with store.write_run(header) as writer``.

        Waits on entering while another process writes the same run. Raises RunMismatchError if it was begun with
        another recipe, calibration, seed or number of layers.
        """
        self._prepare()
        return RunWriter(self.root, header)

    def runs(self) -> list[Run]:
        """All runs that can be read, the oldest first; a warning for each that cannot."""
        found = []
        for run_id in self._run_ids():
            try:
                run = self._load(run_id)
            except StoreError as error:
                warnings.warn(str(error), stacklevel=2)
                continue
            if run is not None:
                found.append(run)
        return sorted(found, key=lambda run: (run.header.created, run.run_id))

    def run(self, run_id: str) -> Run:
        """The run of this name, or the only one whose name begins so; else UnknownRunError, which lists what exists."""
        full = self._resolve(run_id)
        run = self._load(full)
        if run is None:  # a journal without a header, or removed just now
            raise UnknownRunError(run_id, [other for other in self._run_ids() if other != full], self.root)
        return run

    def verify(self, run_id: str) -> list[str]:
        """Read every object of a run; one line per problem, none if all is well."""
        return [problem for record in self.run(run_id).layers for problem in self._problems(record)]

    def keep_evaluation(self, evaluation: Evaluation) -> None:
        """Keep what a run was measured at; the same measurement made earlier is replaced. UnknownRunError."""
        full = self._resolve(evaluation.run_id)
        if full != evaluation.run_id:
            raise UnknownRunError(evaluation.run_id, [full], self.root)
        self._prepare()
        evaluations.write(self.root, evaluation)

    def evaluations(self, run_id: str) -> list[Evaluation]:
        """What a run was measured at, the oldest first; a warning for each file that cannot be read."""
        found = []
        for result in evaluations.read_all(self.root, self._resolve(run_id)):
            if isinstance(result, Evaluation):
                found.append(result)
            else:
                warnings.warn(str(result), stacklevel=2)
        return sorted(found, key=lambda evaluation: (evaluation.created, evaluation.key))

    def delete_run(self, run_id: str) -> None:
        """Remove a run, damaged or not, and its evaluations; its objects stay until ``gc``.

        RunBusyError while it is being written.
        """
        full = self._resolve(run_id)
        with locks.idle(self.root, full, "delete it"):
            for path in (document_path(self.root, full), journal_path(self.root, full)):
                files.inside(self.root, path.parent)
                with files.access(path):
                    path.unlink(missing_ok=True)
            evaluations.remove(self.root, full)

    def gc(self, min_age: float = 3600.0) -> list[str]:
        """Remove the objects that no run names, evaluations of runs that are gone, and what killed processes left;
        returns the digests of the objects.

        Safe beside other processes by two rules. No run may be under way: RunBusyError if one is, and a writer that
        starts meanwhile waits. And a file younger than ``min_age`` seconds stays, for whoever has put an object and not
        yet begun the run. Raises DamagedError if a run cannot be read, because its objects would be taken for garbage.
        """
        if not self.root.exists():
            return []
        removed = []
        with locks.sweeping(self.root):
            named = {record.object for run_id in self._run_ids() for record in self._layers(run_id)}
            for path in list(self._garbage(named, time.time() - min_age)):
                with files.access(path):
                    path.unlink(missing_ok=True)
                if OBJECT.fullmatch(path.stem):
                    removed.append(path.stem)
            for run_id in set(evaluations.measured(self.root)) - set(self._run_ids()):
                evaluations.remove(self.root, run_id)
        _log.info("%s: removed %d objects", self.root, len(removed))
        return removed

    def _problems(self, record: LayerRecord) -> Iterator[str]:
        if record.object is None:
            return
        try:
            self.factors(record)
        except StoreError as error:
            yield str(error)

    def _garbage(self, named: set[str | None], before: float) -> Iterator[Path]:
        """Files that may go: those of unnamed objects and temporary ones, last written before a time."""
        places = ("objects/**/*", ".*", "*/.*", "evaluations/*/.*")
        for path in [path for place in places for path in self.root.glob(place)]:
            leftover = path.name.startswith(files.TEMPORARY)
            unnamed = path.suffix == ".safetensors" and OBJECT.fullmatch(path.stem) and path.stem not in named
            if (leftover or unnamed) and path.is_file() and path.lstat().st_mtime < before:
                files.inside(self.root, path.parent)
                yield path

    def _layers(self, run_id: str) -> tuple[LayerRecord, ...]:
        """The layers of all that is known of a run: of its document and of its journal."""
        runs = read_document(self.root, run_id), read_partial(self.root, run_id)
        return tuple(record for run in runs if run is not None for record in run.layers)

    def _run_ids(self) -> list[str]:
        """Of documents and journals; a file with another name is nobody's."""
        folder = files.inside(self.root, self.root / "runs")
        with files.access(folder):
            names = [path.name for path in folder.iterdir()] if folder.exists() else []
        ids = {name.removesuffix(end) for end in (".json", ".partial.jsonl") for name in names if name.endswith(end)}
        return sorted(filter(RUN_ID.fullmatch, ids))

    def _resolve(self, run_id: str) -> str:
        if not isinstance(run_id, str) or not RUN_ID.fullmatch(run_id):
            shown = str(run_id)[:140]
            raise RecordError("run id", f"cannot be {shown!r}: lower-case letters, digits, '.', '_' and '-'")
        ids = self._run_ids()
        found = [run_id] if run_id in ids else [known for known in ids if known.startswith(run_id)]
        if len(found) != 1:
            raise UnknownRunError(run_id, found or ids, self.root, several=bool(found))
        return found[0]

    def _load(self, run_id: str) -> Run | None:
        # The document once more, because `finish` may have replaced the journal after the first look.
        for reader in (read_document, read_partial, read_document):
            if (run := reader(self.root, run_id)) is not None:
                return run
        return None

    # The folder

    def _check_version(self) -> bool:
        """Whether there is a marker; raises if it is not one of a store that this version knows."""
        path = self.root / _MARKER
        try:
            marker: Any = parse(files.read(self.root, path, 4096))
        except FileNotFoundError:
            return False
        except ValueError as error:
            raise DamagedError(path, f"it is no JSON ({error})", "remove this file") from error
        if not isinstance(marker, dict) or marker.get("format") != _FORMAT:
            raise DamagedError(path, "it does not say that this is a store", "set PIFA_CACHE_DIR to another folder")
        if marker.get("version") != VERSION:
            raise StoreVersionError(path, "version of the store", marker.get("version"), VERSION)
        return True

    def _prepare(self) -> None:
        """Make the folder and its marker; also sees a newer version that has come since."""
        if not self._check_version():
            text = json.dumps({"format": _FORMAT, "version": VERSION}) + "\n"
            files.write(self.root, self.root / _MARKER, text.encode())


def _valid_digest(digest: str) -> str:
    if not isinstance(digest, str) or not OBJECT.fullmatch(digest):
        raise RecordError("object", f"its digest cannot be {str(digest)[:80]!r}: 64 hex digits")
    return digest


def _most_bytes(record: LayerRecord) -> int:
    """More than any object of the record's shape and rank takes: in float64, with a row order and a bias."""
    m, n = record.shape
    return 8 * (record.rank * (m + n) + 2 * m) + objects.MAX_HEADER


def _not_finite(factors: Factors) -> str | None:
    """Which of the tensors has an entry that is no finite number; one pass over each, without a copy."""
    for name, t in factors.tensors().items():
        if t.is_floating_point() and t.numel():
            ends = torch.aminmax(t.float() if t.itemsize == 1 else t)  # NaN comes through
            if not (math.isfinite(ends.min) and math.isfinite(ends.max)):
                return f"{name} is not finite"
    return None


def _y_scale(metadata: Mapping[str, str]) -> float:
    """The power of two in ``metadata``; 1 if there is none. ValueError for anything else."""
    scale = float(metadata.get("y_scale", "1"))
    if not (0 < scale < math.inf and math.frexp(scale)[0] == 0.5):
        raise ValueError(f"y_scale {scale} is no power of two")
    return scale
