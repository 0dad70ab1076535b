"""A run as bytes: the document of a finished run, and the journal of one under way.

Each line of a journal carries a checksum over itself and the checksum of the line before, so that a line that was
changed, moved or brought from another journal is seen. A process that is killed leaves at most one torn line, the last.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pifa_compile.errors import DamagedError, RecordError, StoreVersionError
from pifa_compile.store.json_text import canonical, parse
from pifa_compile.store.records import SCHEMA, LayerRecord, Run, RunHeader

MAX_RUN = 1 << 26  # bytes of a document or a journal; a layer takes about one thousand
_FORMAT = "pifa-compile run"
_log = logging.getLogger(__name__)


class Journal:
    """The lines of a journal, to be made in order: ``header`` once, then ``layer`` for each."""

    def __init__(self) -> None:
        self._checksum = ""

    def header(self, header: RunHeader) -> bytes:
        return self._line({"header": header.to_json()})

    def layer(self, record: LayerRecord) -> bytes:
        return self._line({"layer": record.to_json()})

    def _line(self, body: dict[str, Any]) -> bytes:
        self._checksum = _checksum(body, self._checksum)
        return canonical(body | {"sha256": self._checksum}) + b"\n"


def write_journal(header: RunHeader, layers: Iterable[LayerRecord]) -> tuple[Journal, bytes]:
    """A journal of what is finished, and the state to go on with."""
    journal = Journal()
    return journal, b"".join([journal.header(header), *map(journal.layer, layers)])


def read_journal(path: Path, data: bytes) -> Run | None:
    """The run that a journal tells of, without a torn last line; None if not even the header was finished.

    Raises DamagedError for a line that is wrong but not the last, StoreVersionError for a newer schema.
    """
    bodies = _bodies(path, data)
    if not bodies:
        return None
    with _damage(path):
        header = RunHeader.from_json(bodies[0].get("header"))
        layers = tuple(LayerRecord.from_json(body.get("layer")) for body in bodies[1:])
    return _of_this_name(path, Run(header, layers, complete=False))


def _bodies(path: Path, data: bytes) -> list[dict[str, Any]]:
    """The lines whose checksums hold."""
    bodies: list[dict[str, Any]] = []
    checksum = ""
    lines = io.BytesIO(data)  # one at a time: a file of nothing but line ends would make millions
    for number, line in enumerate(lines, 1):
        body = _parse(line) if line.endswith(b"\n") else {}
        if number == 1:
            _refuse_newer(path, body)
        checksum = _checksum(body, checksum)
        if body.pop("sha256", None) != checksum:
            if lines.tell() < len(data):
                raise DamagedError(path, f"line {number} is not what was written", cure(run_id_of(path)))
            _log.info("%s: dropped a last line that was not finished", path)
            break
        bodies.append(body)
    return bodies


def encode_run(run: Run) -> bytes:
    """The document of a finished run, indented for people."""
    layers = [record.to_json() for record in run.layers]
    body = {"format": _FORMAT, "header": run.header.to_json(), "layers": layers}
    return json.dumps(body | {"sha256": _checksum(body)}, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def decode_run(path: Path, data: bytes) -> Run:
    """The run that a document tells of.

    Raises DamagedError if it is not what ``encode_run`` wrote, StoreVersionError if a newer version did.
    """
    body = _parse(data)
    _refuse_newer(path, body)
    if body.get("format") != _FORMAT or body.get("sha256") != _checksum(body):
        raise DamagedError(path, "it is not what was written", cure(run_id_of(path)))
    with _damage(path):
        header = RunHeader.from_json(body.get("header"))
        layers = tuple(map(LayerRecord.from_json, body.get("layers", ())))
    return _of_this_name(path, Run(header, layers, complete=True))


def cure(run_id: str) -> str:
    """What to do about a damaged run."""
    return f"remove it with Store.delete_run({run_id!r}) and compress again"


def run_id_of(path: Path) -> str:
    """The run id in the name of a document or journal."""
    return path.name.removesuffix(".json").removesuffix(".partial.jsonl")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Records that are wrong although their checksum holds are damage of the file."""
    try:
        yield
    except (RecordError, TypeError) as error:
        raise DamagedError(path, str(error), cure(run_id_of(path))) from error


def _refuse_newer(path: Path, body: dict[str, Any]) -> None:
    header = body.get("header")
    schema = header.get("schema") if isinstance(header, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise StoreVersionError(path, "schema of the run", schema, SCHEMA)


def _of_this_name(path: Path, run: Run) -> Run:
    if run.run_id != run_id_of(path):
        raise DamagedError(path, f"it is the run {run.run_id!r} under another name", cure(run_id_of(path)))
    return run


def _parse(data: bytes) -> dict[str, Any]:
    """The JSON object in ``data``, {} if there is none."""
    try:
        value = parse(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _checksum(body: dict[str, Any], before: str = "") -> str:
    """sha256 over the canonical JSON of ``body`` but for its own checksum, after that of the line ``before`` it."""
    rest = {key: value for key, value in body.items() if key != "sha256"}
    return hashlib.sha256(before.encode() + canonical(rest)).hexdigest()
