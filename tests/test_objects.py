"""Whether an object is whole: known without reading it again, for as long as nobody has touched its file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pifa_compile.errors import DamagedError, FactorFormatError
from pifa_compile.store import LayerRecord, RunHeader, objects
from pifa_compile.store.objects import is_whole, object_path, read_object

METADATA = {"factor_format": "float", "form": "pair"}


@pytest.fixture
def reads(monkeypatch):
    """The files whose bytes were read, in order."""
    found, read = [], objects._read

    def counting(path, *arguments):
        found.append(path)
        return read(path, *arguments)

    monkeypatch.setattr(objects, "_read", counting)
    return found


@pytest.fixture
def settled(monkeypatch):
    """Every file has been left alone for long enough."""
    monkeypatch.setattr(objects, "SETTLED", -1)


@pytest.fixture
def stored(store):
    """Digest and file of an object."""
    digest = store.put_object({"left": torch.randn(6, 2), "right": torch.randn(2, 5)}, METADATA)
    return digest, object_path(store.root, digest)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def with_its_old_times(path: Path) -> None:
    """Content of the same size, and the time of the last writing set back."""
    status = path.stat()
    flip(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def another_in_its_place(path: Path) -> None:
    other, status = path.with_name("other"), path.stat()
    other.write_bytes(path.read_bytes())
    flip(other)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


def through_memory(path: Path) -> None:
    import mmap

    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[-3] ^= 1
        mapped.flush()


CHANGES = (
    flip,
    with_its_old_times,
    another_in_its_place,
    through_memory,
    Path.unlink,
    lambda path: os.truncate(path, 90),
)


def test_a_file_is_read_once(store, stored, settled, reads):
    digest, path = stored
    assert [is_whole(store.root, digest) for _ in range(3)] == [True] * 3
    assert reads == [path]


def test_whoever_wants_the_tensors_has_them_verified_each_time(store, stored, settled, reads):
    digest, path = stored
    assert is_whole(store.root, digest)
    for _ in range(2):
        store.get_object(digest)
    assert reads == [path] * 3


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_was_changed_is_not_whole(store, stored, settled, reads, change):
    digest, path = stored
    good = path.read_bytes()
    assert is_whole(store.root, digest)
    change(path)
    assert not is_whole(store.root, digest)
    path.write_bytes(good)
    assert is_whole(store.root, digest), "nor is damage remembered"


def test_a_file_that_was_just_written_is_read_again(store, stored, reads):
    """What is written to it in the same tick of the clock would leave no trace."""
    digest, path = stored
    assert is_whole(store.root, digest) and is_whole(store.root, digest)
    assert reads == [path] * 2


def test_a_file_that_changes_while_it_is_read_is_not_remembered(store, stored, settled, reads, monkeypatch):
    digest, path = stored
    read = objects._read

    def touched(*arguments):
        found = read(*arguments)
        os.utime(path)
        return found

    monkeypatch.setattr(objects, "_read", touched)
    assert is_whole(store.root, digest) and is_whole(store.root, digest)
    assert reads == [path] * 2


def test_damage_that_leaves_no_trace_is_known_once_it_is_read(store, stored, settled, monkeypatch):
    """A disk that loses bits: whoever reads them finds out, and then the object is made again."""
    digest, path = stored
    monkeypatch.setattr(objects, "_stamp", lambda file: (0, 0, 0, 0, 0))
    assert is_whole(store.root, digest)
    flip(path)
    assert is_whole(store.root, digest)
    with pytest.raises(DamagedError):
        read_object(store.root, digest, "cpu")
    assert not is_whole(store.root, digest)


def test_a_finished_run_is_entered_without_reading_its_objects_again(store, stored, settled, reads):
    digest, path = stored
    header = RunHeader(
        run_id="r",
        model="m",
        recipe={"method": "svd"},
        versions={},
        created="2026-01-01T00:00:00+00:00",
        layers_planned=1,
    )
    size = {"numbers": 22, "bytes": 88, "seconds": 0.0}
    record = LayerRecord(name="a", digests={}, shape=(6, 5), object=digest, form="pair", rank=2, **size)
    with store.write_run(header) as writer:
        writer.add(record)
        writer.finish()
    for _ in range(3):
        with store.write_run(header) as writer:
            assert writer.done == {"a": record}
    assert reads == [path]
    flip(path)
    with store.write_run(header) as writer:
        assert writer.done == {}
    assert reads == [path] * 2


def test_what_a_newer_version_wrote_is_whole_though_it_cannot_be_read(store, settled, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr(objects, "FACTOR_FORMATS", frozenset({"int8"}))
        digest = store.put_object({"rows": torch.ones(3, 2, dtype=torch.int8)}, {"factor_format": "int8"})
    with pytest.raises(FactorFormatError, match="update pifa-compile"):
        read_object(store.root, digest, "cpu")
    assert is_whole(store.root, digest)
    objects._WHOLE.clear()  # as in a process that has not read it
    assert is_whole(store.root, digest)
    flip(object_path(store.root, digest))
    assert not is_whole(store.root, digest)
