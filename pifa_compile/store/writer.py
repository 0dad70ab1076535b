"""Writing a run: layer by layer, so that a killed process loses at most the layer it was at."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from pifa_compile.errors import RecordError, RunMismatchError, StoreAccessError, StoreError
from pifa_compile.store import files, journal, locks
from pifa_compile.store.objects import is_whole, object_path
from pifa_compile.store.records import LayerRecord, Run, RunHeader

_log = logging.getLogger(__name__)


class RunWriter:
    """Writes one run, alone; a context. Leaving it without ``finish`` keeps what was added, to be continued.

    Whatever a layer's record names must be in the store before it is added. For one thread.
    """

    def __init__(self, root: Path, header: RunHeader) -> None:
        self.header = header
        self._root = root
        self._done: dict[str, LayerRecord] = {}
        self._lost: dict[str, LayerRecord] = {}
        self._complete = False
        self._journal = journal.Journal()
        self._descriptor: int | None = None
        self._stack = ExitStack()

    @property
    def done(self) -> Mapping[str, LayerRecord]:
        """The records that are finished, by name, those of earlier attempts included."""
        return MappingProxyType(self._done)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(locks.writing(self._root, self.header.run_id))
            self._resume()
            if not self._complete:
                self._descriptor = stack.enter_context(_appending(self._root, self._path))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._descriptor = None
        self._stack.close()

    def add(self, record: LayerRecord) -> None:
        """Remember a finished layer; it is on the disk when this returns."""
        if record.name in self._done:
            raise RecordError(f"layer {record.name!r}", f"is in run {self.header.run_id!r} already")
        if not _has_object(self._root, record):
            raise RecordError(f"layer {record.name!r}", f"its object {record.object} is not in the store; put it first")
        self._append(self._journal.layer(record))
        self._done[record.name] = record
        lost = self._lost.pop(record.name, None)
        if lost is not None and lost.object != record.object:
            text = "run %r: the factors of layer %r are others than those that were lost (%.12s, were %.12s)"
            _log.warning(text, self.header.run_id, record.name, record.object, lost.object)

    def finish(self) -> Run:
        """Turn the journal into the document of a finished run. Raises StoreError while layers are missing."""
        run = Run(self.header, tuple(self._done.values()), complete=True)
        if self._complete:
            return run
        if self._descriptor is None:
            raise StoreError(f"run {run.run_id!r}: finish() outside of its `with` block")
        if run.totals.layers != self.header.layers_planned:
            there = f"{run.totals.layers} of {self.header.layers_planned} layers are there"
            raise StoreError(f"run {run.run_id!r}: {there}; add the rest first")
        files.write(self._root, document_path(self._root, run.run_id), journal.encode_run(run))
        self._complete = True
        with files.access(self._path):
            self._path.unlink(missing_ok=True)
        return run

    @property
    def _path(self) -> Path:
        return journal_path(self._root, self.header.run_id)

    def _resume(self) -> None:
        """Take over what earlier attempts finished, as far as its objects are still there and whole."""
        finished, begun = read_document(self._root, self.header.run_id), read_partial(self._root, self.header.run_id)
        for run in filter(None, (finished, begun)):
            _same_settings(run.header, self.header)
            self.header = run.header
            self._done |= {record.name: record for record in run.layers if self._is_whole(record)}
            self._lost |= {record.name: record for record in run.layers if record.name not in self._done}
        self._complete = finished is not None and all(record.name in self._done for record in finished.layers)
        if self._complete:
            with files.access(self._path):
                self._path.unlink(missing_ok=True)  # left by a process that was killed at the end of `finish`
            return
        if lost := [name for name in self._lost if name not in self._done]:
            text = "run %r: the factors of %d layers are damaged or missing and are made again: %s"
            _log.warning(text, self.header.run_id, len(lost), ", ".join(lost[:5]))
        # Written anew, which drops a torn line and what was lost.
        self._journal, data = journal.write_journal(self.header, self._done.values())
        files.write(self._root, self._path, data)

    def _is_whole(self, record: LayerRecord) -> bool:
        return record.object is None or is_whole(self._root, record.object)

    def _append(self, line: bytes) -> None:
        if self._complete or self._descriptor is None:
            done = "is finished" if self._complete else "is not open: use it in a `with` block"
            raise StoreError(f"run {self.header.run_id!r} {done}")
        try:
            rest = line
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)
        except OSError as error:
            self._descriptor = None  # what is torn now stays the last line
            raise StoreAccessError(self._path, error) from error


def document_path(root: Path, run_id: str) -> Path:
    """The place of a finished run."""
    return root / "runs" / f"{run_id}.json"


def journal_path(root: Path, run_id: str) -> Path:
    """The place of a run under way."""
    return root / "runs" / f"{run_id}.partial.jsonl"


def read_document(root: Path, run_id: str) -> Run | None:
    """A finished run; None if there is none of this name."""
    path = document_path(root, run_id)
    try:
        return journal.decode_run(path, files.read(root, path, journal.MAX_RUN))
    except FileNotFoundError:
        return None


def read_partial(root: Path, run_id: str) -> Run | None:
    """A run under way or interrupted; None if there is none of this name."""
    path = journal_path(root, run_id)
    try:
        return journal.read_journal(path, files.read(root, path, journal.MAX_RUN))
    except FileNotFoundError:
        return None


def _has_object(root: Path, record: LayerRecord) -> bool:
    return record.object is None or object_path(root, record.object).is_file()


def _same_settings(begun: RunHeader, given: RunHeader) -> None:
    for field in ("recipe", "calibration", "seed", "layers_planned"):
        before, now = getattr(begun, field), getattr(given, field)
        if before != now:
            raise RunMismatchError(given.run_id, field, before, now)


@contextmanager
def _appending(root: Path, path: Path) -> Iterator[int]:
    with files.access(path):
        descriptor = os.open(files.inside(root, path), os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
