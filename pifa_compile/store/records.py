"""What the store remembers of a compression: a run, and what became of each layer in it.

m = out_features, n = in_features, r = rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, NamedTuple, Self, get_args

from pifa_compile.errors import RecordError
from pifa_compile.factors import Form
from pifa_compile.layers import Layout
from pifa_compile.store.json_text import canonical, is_shallow, parse

SCHEMA = 1
RUN_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
OBJECT = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MOST = 1e30  # seconds, or a relative error
_CREATED = re.compile(r"\d{4}-\d\d-\d\dT[0-9:.]+(Z|[+-]\d\d:\d\d)?")


def _is_str(value: Any) -> bool:
    return isinstance(value, str)


def is_text(value: Any) -> bool:
    """Whether it is a string with something in it."""
    return isinstance(value, str) and value != ""


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_amount(value: Any) -> bool:
    """Whether it is a number, not below zero, that can be summed over any run."""
    return _is_number(value) and 0 <= value < _MOST


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_count, value))


def _is_json_object(value: Any) -> bool:
    """A dict that comes back from JSON as it was: string keys, no tuples, no NaN."""
    return isinstance(value, dict) and is_shallow(value) and parse(canonical(value)) == value


def is_digest(value: Any) -> bool:
    """Whether it is the digest of some content, as "sha256:..."."""
    return _DIGEST.fullmatch(value) is not None


def is_created(value: Any) -> bool:
    """Whether it is an ISO time."""
    return _CREATED.fullmatch(value) is not None


def timestamp() -> str:
    """Now, as the ISO time that records carry: of UTC, with milliseconds, so that quick runs sort in their order."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def is_figures(value: Any) -> bool:
    """Whether it is a dict of finite numbers by name."""
    return isinstance(value, dict) and all(is_text(k) and _is_number(v) for k, v in value.items())


def _is_digests(value: Any) -> bool:
    return isinstance(value, dict) and all(is_text(k) and _DIGEST.fullmatch(v) for k, v in value.items())


def is_string_map(value: Any) -> bool:
    """Whether it is a dict of strings by name."""
    return isinstance(value, dict) and all(map(_is_str, [*value, *value.values()]))


def _or_none(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or rule(value)


def obey(owner: str, record: object, rules: Mapping[str, Callable[[Any], object]]) -> None:
    """Raises RecordError for the first field of a record that does not pass its rule."""
    for name, rule in rules.items():
        value = getattr(record, name)
        try:
            good = rule(value)
        except (TypeError, ValueError, OverflowError, RecursionError):
            good = False
        if not good:
            raise RecordError(owner, f"{name} cannot be {str(value)[:80]!r}")


def known_fields(owner: str, data: Any, kind: Any) -> dict[str, Any]:
    """``data`` if it is a JSON object with exactly the fields of the dataclass ``kind``."""
    names = {f.name for f in fields(kind)}
    if not isinstance(data, dict) or set(data) != names:
        different = sorted(names.symmetric_difference(data)) if isinstance(data, dict) else [type(data).__name__]
        raise RecordError(owner, f"fields missing or unknown: {', '.join(map(str, different))[:200]}")
    return data


@dataclass(frozen=True)
class Member:
    """One layer of an ordered group that shares one factorization: its ``m`` rows follow those of the member before."""

    name: str
    digests: dict[str, str]
    m: int

    def __post_init__(self) -> None:
        obey(f"member {str(self.name)[:80]!r}", self, {"name": is_text, "digests": _is_digests, "m": _is_count})


@dataclass(frozen=True)
class LayerRecord:
    """What became of one layer, or of an ordered group of layers whose rows are stacked in one factorization.

    name         a label; layers are recognised by their digests
    digests      of the dense weight and its casts, by dtype name, as in ``digest.cast_digests``; {} for a group
    shape        (m, n) of the weight; of the stacked weights for a group
    layout       how the parameter holds it, see ``layers.Layout``
    object       digest of the factors in the store; None stays dense
    form         "pifa", "pair" or "dense"
    numbers      parameters kept, row order included, bias excluded; m n where dense
    bytes        of the factors as stored
    seconds      of wall time to compress it
    error        relative error (Frobenius) of the stored factors against the low-rank weight
    truncation   relative error of the low-rank weight against the dense one
    least_error  the least that any weight of this rank could reach
    reason       why it stays dense, or why it is kept as a pair
    details      whatever else is worth knowing, as JSON
    members      the layers of a group, in the order of their rows; () for a single layer
    """

    name: str
    digests: dict[str, str]
    shape: tuple[int, int]
    object: str | None
    form: Form
    rank: int
    numbers: int
    bytes: int
    seconds: float
    layout: str = "out_in"
    error: float | None = None
    truncation: float | None = None
    least_error: float | None = None
    reason: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    members: tuple[Member, ...] = ()

    def __post_init__(self) -> None:
        owner = f"layer {str(self.name)[:200]!r}"
        obey(owner, self, _LAYER_RULES)
        if (self.form == "dense") != (self.object is None):
            raise RecordError(owner, f"form {self.form!r} with object {self.object!r}; dense has none, the others one")
        if self.form == "dense" and not self.reason:
            raise RecordError(owner, "stays dense without a reason; say why")
        if self.form != "dense" and not 1 <= self.rank <= min(self.shape):
            raise RecordError(owner, f"rank {self.rank} is not that of a {self.shape[0]} x {self.shape[1]} weight")
        if self.members and (sum(member.m for member in self.members) != self.shape[0] or self.digests):
            raise RecordError(owner, f"rows of the members must sum to {self.shape[0]}, and only they have digests")

    @property
    def dense_numbers(self) -> int:
        """m n."""
        return self.shape[0] * self.shape[1]

    @property
    def layers(self) -> tuple[tuple[str, dict[str, str]], ...]:
        """(name, digests) of the layers that the record is about: one, or those of the group."""
        return tuple((member.name, member.digests) for member in self.members) or ((self.name, self.digests),)

    def rows_of(self, digest: str) -> tuple[int, int] | None:
        """Where the rows of a group's member with this digest begin and end; None in the record of a single layer."""
        start = 0
        for member in self.members:
            if digest in member.digests.values():
                return start, start + member.m
            start += member.m
        return None

    def to_json(self) -> dict[str, Any]:
        """JSON types only."""
        return asdict(self) | {"shape": list(self.shape), "members": [asdict(member) for member in self.members]}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Raises RecordError for anything that ``to_json`` could not have made."""
        owner = f"layer {str(data.get('name'))[:200]!r}" if isinstance(data, dict) else "layer"
        data = known_fields(owner, data, cls)
        if not isinstance(data["members"], list) or not isinstance(data["shape"], list):
            raise RecordError(owner, "shape and members are lists")
        members = tuple(Member(**known_fields(owner, member, Member)) for member in data["members"])
        return cls(**data | {"shape": tuple(data["shape"]), "members": members})


_LAYER_RULES: dict[str, Callable[[Any], object]] = {
    "name": is_text,
    "digests": _is_digests,
    "shape": _is_shape,
    "object": _or_none(lambda value: OBJECT.fullmatch(value) is not None),
    "form": lambda value: value in get_args(Form),
    "rank": _is_count,
    "numbers": _is_count,
    "bytes": _is_count,
    "seconds": is_amount,
    "layout": lambda value: value in get_args(Layout),
    "error": _or_none(is_amount),
    "truncation": _or_none(is_amount),
    "least_error": _or_none(is_amount),
    "reason": _or_none(_is_str),
    "details": _is_json_object,
    "members": lambda value: isinstance(value, tuple) and all(isinstance(member, Member) for member in value),
}


@dataclass(frozen=True)
class RunHeader:
    """What identifies a run and what it needs to be repeated.

    run_id          lower-case letters, digits, ".", "_", "-"; the caller derives it from model, recipe, calibration
    model           a label; revision as the hub names it, or None
    recipe          the JSON of the recipe, "method" and "version" among its fields
    calibration     identity of the calibration data, None for a data-free method
    versions        of the programs that computed it
    created         ISO time
    layers_planned  layers (members of groups counted one by one) that the finished run will have, dense ones included
    """

    run_id: str
    model: str
    recipe: dict[str, Any]
    layers_planned: int
    created: str
    revision: str | None = None
    calibration: dict[str, Any] | None = None
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        obey(f"run {str(self.run_id)[:140]!r}", self, _HEADER_RULES)

    def to_json(self) -> dict[str, Any]:
        """JSON types only."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Raises RecordError for anything that ``to_json`` could not have made."""
        return cls(**known_fields("run header", data, cls))


_HEADER_RULES: dict[str, Callable[[Any], object]] = {
    "run_id": RUN_ID.fullmatch,
    "model": _is_str,
    "recipe": _is_json_object,
    "layers_planned": _is_count,
    "created": is_created,
    "revision": _or_none(_is_str),
    "calibration": _or_none(_is_json_object),
    "seed": lambda value: type(value) is int and -(1 << 63) <= value < 1 << 64,
    "versions": is_string_map,
    "schema": lambda value: type(value) is int and value == SCHEMA,
}


class Totals(NamedTuple):
    """Sums over a run. ``layers`` counts the members of groups one by one, the other counts are of ``layers``."""

    layers: int
    pifa: int
    pair: int
    dense: int
    numbers: int
    dense_numbers: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Run:
    """One compression of one model with one recipe; not ``complete`` while it is under way or was interrupted."""

    header: RunHeader
    layers: tuple[LayerRecord, ...]
    complete: bool

    @property
    def run_id(self) -> str:
        return self.header.run_id

    @cached_property
    def by_digest(self) -> dict[str, LayerRecord]:
        """The record by each digest of its weights and their casts. The first of equal weights wins."""
        found: dict[str, LayerRecord] = {}
        for record, digests in self._weights():
            for digest in digests.values():
                found.setdefault(digest, record)
        return found

    @cached_property
    def by_name(self) -> dict[str, LayerRecord]:
        """The record by the name of each layer, those in groups included."""
        return {name: record for record in self.layers for name, _ in record.layers}

    def _weights(self) -> Iterator[tuple[LayerRecord, dict[str, str]]]:
        for record in self.layers:
            for _, digests in record.layers:
                yield record, digests

    @property
    def density(self) -> float:
        """Numbers kept / dense numbers over the replaced layers; 1 if there is none."""
        return _density([record for record in self.layers if record.form != "dense"])

    @property
    def density_all(self) -> float:
        """Numbers kept / dense numbers over all layers of the run, those that stay dense included."""
        return _density(self.layers)

    @cached_property
    def totals(self) -> Totals:
        counts = {form: sum(len(r.layers) for r in self.layers if r.form == form) for form in get_args(Form)}
        return Totals(
            layers=sum(counts.values()),
            **counts,
            numbers=sum(r.numbers for r in self.layers),
            dense_numbers=sum(r.dense_numbers for r in self.layers),
            bytes=sum(r.bytes for r in self.layers),
            seconds=math.fsum(r.seconds for r in self.layers),
        )


def _density(records: tuple[LayerRecord, ...] | list[LayerRecord]) -> float:
    dense = sum(record.dense_numbers for record in records)
    return sum(record.numbers for record in records) / dense if dense else 1.0
