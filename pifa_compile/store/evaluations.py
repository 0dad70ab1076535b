"""What runs were measured at: one small file per text and way of reading it.

    evaluations/<run_id>/<key>.json       key: sha256 of what identifies the measurement

The same measurement of a run, made again, replaces its file; there is nothing to lock. A version that does not know the
folder leaves it alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from pifa_compile.errors import DamagedError, RecordError, StoreError, StoreVersionError
from pifa_compile.store import files
from pifa_compile.store.json_text import canonical, parse
from pifa_compile.store.records import (
    is_amount,
    is_created,
    is_digest,
    is_figures,
    is_string_map,
    is_text,
    known_fields,
    obey,
)

VERSION = 1
MAX_FILE = 1 << 16  # bytes; one has about a thousand
MOST = 1000  # files that are read of one run
_FORMAT = "pifa-compile evaluation"
_NAME = re.compile(r"[0-9a-f]{64}\.json")
_CURE = "remove the file and evaluate again"


@dataclass(frozen=True)
class Evaluation:
    """Figures of one run on one text, and of the dense model that it was made of.

    run_id         of the run
    text           a label; ``digest`` of its content, as "sha256:..."
    protocol       how the text was read, in words; whoever reads it otherwise has another protocol
    dtype          of the model that was measured
    density        numbers kept over those of the replaced layers; ``model_density`` over the whole model
    figures        of the run, by name (perplexity, mean_cosine, ...); ``dense`` of the dense model. Finite
    created        ISO time
    versions       of the programs that measured it
    """

    run_id: str
    text: str
    digest: str
    protocol: str
    dtype: str
    density: float
    model_density: float
    figures: dict[str, float]
    dense: dict[str, float]
    created: str
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        obey(f"evaluation of {str(self.run_id)[:140]!r}", self, _RULES)

    @property
    def key(self) -> tuple[str, str, str]:
        """What two measurements share that can be compared: the text, how it was read, the dtype."""
        return self.digest, self.protocol, self.dtype

    def to_json(self) -> dict[str, Any]:
        """JSON types only."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Raises RecordError for anything that ``to_json`` could not have made."""
        return cls(**known_fields("evaluation", data, cls))


_RULES: dict[str, Callable[[Any], object]] = {
    "run_id": is_text,
    "text": is_text,
    "digest": is_digest,
    "protocol": is_text,
    "dtype": is_text,
    "density": is_amount,
    "model_density": is_amount,
    "figures": is_figures,
    "dense": is_figures,
    "created": is_created,
    "versions": is_string_map,
}


def write(root: Path, evaluation: Evaluation) -> None:
    """Keep an evaluation, in place of an earlier one of the same key."""
    name = hashlib.sha256(json.dumps(evaluation.key).encode()).hexdigest()
    body = {"format": _FORMAT, "version": VERSION, "evaluation": evaluation.to_json()}
    text = json.dumps(body | {"sha256": _checksum(body)}, indent=1, sort_keys=True, allow_nan=False)
    files.write(root, folder(root, evaluation.run_id) / f"{name}.json", text.encode() + b"\n")


def read_all(root: Path, run_id: str) -> Iterator[Evaluation | StoreError]:
    """The evaluations of a run; in place of one that is not as it was written, the error that says so."""
    try:
        paths = sorted(_files(root, run_id))
    except StoreError as error:
        yield error
        return
    for path in paths[:MOST]:
        try:
            yield _read(root, path, run_id)
        except FileNotFoundError:  # removed just now
            continue
        except StoreError as error:
            yield error
    if len(paths) > MOST:
        yield DamagedError(folder(root, run_id), f"it has {len(paths)} files, of which {MOST} are read", "remove some")


def remove(root: Path, run_id: str) -> None:
    """Remove all evaluations of a run. A file of another name, and what a link leads to, stay."""
    place = folder(root, run_id)
    files.inside(root, place.parent)
    if place.is_symlink():
        with files.access(place):
            place.unlink()
        return
    for path in _files(root, run_id, leftovers=True):
        with files.access(path):
            path.unlink(missing_ok=True)
    with suppress(OSError):  # not there, or not empty
        place.rmdir()


def measured(root: Path) -> list[str]:
    """The names of the folders that there are; of runs, as a rule."""
    place = files.inside(root, root / "evaluations")
    with files.access(place):
        return sorted(path.name for path in place.iterdir() if not path.name.startswith(".")) if place.is_dir() else []


def folder(root: Path, run_id: str) -> Path:
    """The place of a run's evaluations."""
    return root / "evaluations" / run_id


def _files(root: Path, run_id: str, leftovers: bool = False) -> list[Path]:
    """The files of a run's evaluations; with those that killed processes left."""
    place = folder(root, run_id)
    files.inside(root, place)
    with files.access(place):
        paths = list(place.iterdir()) if place.is_dir() else []
    return [p for p in paths if _NAME.fullmatch(p.name) or (leftovers and p.name.startswith(files.TEMPORARY))]


def _read(root: Path, path: Path, run_id: str) -> Evaluation:
    try:
        body = parse(files.read(root, path, MAX_FILE))
        checksum = body.pop("sha256", None) if isinstance(body, dict) else None
        whole = isinstance(body, dict) and body.get("format") == _FORMAT and checksum == _checksum(body)
    except ValueError:  # no JSON, or more in it than is written
        whole = False
    if not whole:
        raise DamagedError(path, "it is not what was written", _CURE)
    if body.get("version") != VERSION:
        raise StoreVersionError(path, "version of the evaluation", body.get("version"), VERSION)
    try:
        found = Evaluation.from_json(body.get("evaluation"))
    except RecordError as error:
        raise DamagedError(path, str(error), _CURE) from error
    if found.run_id != run_id:
        raise DamagedError(path, f"it is of the run {found.run_id[:140]!r}", _CURE)
    return found


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(body)).hexdigest()
