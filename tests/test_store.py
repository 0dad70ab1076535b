"""The store serves what was written or nothing, and loses at most the layer a killed process was at."""

import hashlib
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pifa_compile import errors
from pifa_compile.digest import cast_digests, digest
from pifa_compile.factors import PairFactors, PifaFactors
from pifa_compile.store import (
    LayerRecord,
    Member,
    Run,
    RunHeader,
    Store,
    files,
    locks,
    objects,
    records,
    timestamp,
)
from pifa_compile.store.scratch import Scratch

M, N, R = 6, 5, 2
FLOAT = {"factor_format": "float"}


def factors(seed: int = 0, m: int = M, n: int = N, r: int = R) -> PifaFactors:
    g = torch.Generator().manual_seed(seed)
    pivots = torch.randperm(m, generator=g, dtype=torch.int32)
    return PifaFactors(torch.randn(r, n, generator=g), torch.randn(m - r, r, generator=g), pivots, y_scale=0.25)


def header(run_id: str = "run", layers: int = 2, **fields) -> RunHeader:
    known = {
        "model": "toy",
        "recipe": {"method": "svd", "version": 1, "density": 0.5},
        "created": "2025-01-02T03:04:05Z",
    }
    return RunHeader(run_id=run_id, layers_planned=layers, **known | fields)


def record(name: str, obj: str | None, seed: int = 0, **fields) -> LayerRecord:
    weight = torch.randn(M, N, generator=torch.Generator().manual_seed(seed))
    known = {"digests": cast_digests(weight), "shape": (M, N), "form": "pifa", "rank": R}
    known |= {"numbers": R * (M + N - R) + R, "bytes": 100, "seconds": 0.5, "error": 1e-6}
    if obj is None:
        known |= {"form": "dense", "rank": 0, "numbers": M * N, "reason": "too small", "error": None}
    return LayerRecord(name=name, object=obj, **known | fields)


def write(store: Store, run_id: str = "run", layers: int = 2) -> Run:
    """A finished run whose last layer stays dense."""
    with store.write_run(header(run_id, layers)) as writer:
        for i in range(layers - 1):
            writer.add(record(f"layer{i}", store.put_factors(factors(i)), i))
        writer.add(record(f"layer{layers - 1}", None, layers - 1))
        return writer.finish()


def write_until_killed(root: str, run_id: str, layers: int, pause: float, report: str, first: int = 0) -> None:
    """In another process: go on with a run, one line in the file ``report`` for each layer that is on the disk.

    first  seed of the first layer's factors
    """
    store = Store(root)
    with Path(report).open("ab", buffering=0) as out, store.write_run(header(run_id, layers)) as writer:
        for i in range(layers):
            if f"layer{i}" not in writer.done:
                writer.add(record(f"layer{i}", store.put_factors(factors(first + i)), first + i))
                out.write(f"layer{i}\n".encode())
                time.sleep(pause)
        writer.finish()
        out.write(b"end\n")


def nursery() -> None:
    """A process that has imported everything and forks a writer per line of its input: cheap processes to kill."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the children are nobody's to wait for
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                write_until_killed(*json.loads(line))
            finally:
                os._exit(0)
        print(pid, flush=True)


@pytest.fixture(scope="module")
def spawn() -> Iterator[Callable[..., int]]:
    """Start ``write_until_killed`` in a process of its own; gives the process id."""
    code = f"import runpy; runpy.run_path({__file__!r})['nursery']()"
    path = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], env=os.environ | path, **pipes) as parent:

        def start(*arguments: object) -> int:
            print(json.dumps(arguments), file=parent.stdin, flush=True)
            return int(parent.stdout.readline())

        yield start
        parent.stdin.close()


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def object_file(store: Store, name: str) -> Path:
    return objects.object_path(store.root, name)


def everything(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


# Objects


def test_an_object_comes_back_as_it_was(store):
    tensors = {
        "pivot_rows": torch.randn(3, 5).bfloat16(),
        "coefficients": torch.randn(4, 3, dtype=torch.float64).T,
        "row_order": torch.arange(7, dtype=torch.int32),
        "empty": torch.empty(0, 4, dtype=torch.float16),
        "scalar": torch.tensor(True),
        "eight": torch.randn(9).to(torch.float8_e4m3fn),
    }
    metadata = FLOAT | {"text": 'Grüße\n"x"', "a": "1", "b": "2"}
    name = store.put_object(tensors, metadata)
    found, said = store.get_object(name)
    assert said == metadata
    assert found.keys() == tensors.keys()
    for key, t in tensors.items():
        assert digest(found[key]) == digest(t)
        assert found[key].is_contiguous()
    assert store.has_object(name)
    assert not store.has_object("0" * 64)


def test_an_object_is_a_safetensors_file_named_by_its_bytes(store):
    name = store.put_factors(factors())
    path = store.root / "objects" / name[:2] / f"{name}.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == name
    assert torch.equal(load_file(path)["pivot_rows"], factors().pivot_rows)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask  # a shared cache can be read by others


def test_equal_content_is_one_object(store):
    tensors, metadata = {"b": torch.ones(3), "a": torch.zeros(2)}, FLOAT | {"x": "1", "y": "2", "z": "3"}
    name = store.put_object(tensors, metadata)
    before = everything(store.root)
    again = store.put_object(dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert again == name
    assert everything(store.root) == before
    assert store.put_object(tensors, metadata | {"x": "2"}) != name


@pytest.mark.parametrize("metadata", [{}, {"factor_format": "int8"}, FLOAT | {"long": "x" * objects.MAX_HEADER}])
def test_an_object_that_could_not_be_read_is_not_written(store, metadata):
    with pytest.raises(ValueError, match="metadata"):
        store.put_object({"a": torch.ones(2)}, metadata)
    assert not list(store.root.glob("objects/*"))


def test_an_unknown_factor_format_is_refused_by_name(store, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(objects, "FACTOR_FORMATS", {"float", "int8_rows"})
        name = store.put_object({"a": torch.ones(2)}, {"factor_format": "int8_rows"})
    with pytest.raises(errors.FactorFormatError, match=r"'int8_rows'.*float.*update"):
        store.get_object(name)
    with pytest.raises(errors.FactorFormatError, match=r"^layer7: .*'int8_rows'.*float.*update"):
        store.factors(record("layer7", name))


def test_a_damaged_object_is_never_served(store):
    name, other = store.put_factors(factors(0)), store.put_factors(factors(1))
    path = object_file(store, name)
    good = path.read_bytes()
    chance = random.Random(0)
    bad = [good[:size] for size in (0, 7, 8, 9, 60, len(good) - 1, *chance.sample(range(len(good)), 40))]
    for place in (*range(12), *chance.sample(range(len(good)), 150)):
        bad.append(good[:place] + bytes([good[place] ^ 1 << chance.randrange(8)]) + good[place + 1 :])
    bad += [good + b"\0", b"\xff" * len(good), pickle.dumps({"a": 1}), object_file(store, other).read_bytes()]
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(errors.DamagedError) as caught:
            store.get_object(name)
        assert str(path) in str(caught.value)
        assert "compress again" in str(caught.value)
    assert store.put_factors(factors(0)) == name  # writing it again heals it
    assert path.read_bytes() == good
    store.get_object(name)


def craft(store: Store, fields: object, data: bytes = b"", raw: bytes | None = None) -> str:
    """An object under its right name, with any header."""
    text = json.dumps(fields).encode() if raw is None else raw
    content = len(text).to_bytes(8, "little") + text + data
    name = hashlib.sha256(content).hexdigest()
    object_file(store, name).parent.mkdir(parents=True, exist_ok=True)
    object_file(store, name).write_bytes(content)
    return name


META = {"pifa_compile": json.dumps(FLOAT)}
FOUR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "fields",
    [
        [],
        {},
        {"a": FOUR},
        {"__metadata__": {"pifa_compile": "[]"}, "a": FOUR},
        {"__metadata__": {"pifa_compile": '{"factor_format": 1}'}, "a": FOUR},
        {"__metadata__": META, "a": FOUR | {"dtype": "F33"}},
        {"__metadata__": META, "a": FOUR | {"dtype": []}},
        {"__metadata__": META, "a": FOUR | {"shape": [2]}},
        {"__metadata__": META, "a": FOUR | {"shape": [-1]}},
        {"__metadata__": META, "a": FOUR | {"shape": [1.0]}},
        {"__metadata__": META, "a": FOUR | {"shape": [True]}},
        {"__metadata__": META, "a": FOUR | {"shape": [1] * 9}},
        {"__metadata__": META, "a": FOUR | {"shape": [2**40, 0, 2**40]}},
        {"__metadata__": META, "a": FOUR, "b": {"dtype": "F32", "shape": [2**36, 0, 2**36], "data_offsets": [4, 4]}},
        {"__metadata__": META, "a": FOUR | {"shape": 1}},
        {"__metadata__": META, "a": FOUR | {"data_offsets": [0, 4, 8]}},
        {"__metadata__": META, "a": FOUR | {"data_offsets": [-4, 0]}},
        {"__metadata__": META, "a": FOUR | {"data_offsets": [4, 8]}},
        {"__metadata__": META, "a": FOUR, "b": FOUR},
        {"__metadata__": META, "a": FOUR | {"shape": [10**9], "data_offsets": [0, 4 * 10**9]}},
        {"__metadata__": META, "a": FOUR | {"shape": [0], "data_offsets": [0, 0]}},
        {"__metadata__": META, "a": 3},
    ],
    ids=lambda fields: json.dumps(fields)[-50:],
)
def test_a_header_that_lies_is_refused(store, fields):
    with pytest.raises(errors.DamagedError):
        store.get_object(craft(store, fields, b"\0" * 4))


def test_a_header_without_bounds_is_refused(store):
    for raw in (b"{" + b" " * objects.MAX_HEADER + b"}", b"[" * 100_000, b"\xff\xfe", b'{"a": ' + b"9" * 5000 + b"}"):
        with pytest.raises(errors.DamagedError):
            store.get_object(craft(store, None, raw=raw))
    path = object_file(store, "0" * 64)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\xff" * 7 + b"\x7f" + b"{}")
    with pytest.raises(errors.DamagedError, match="impossible"):
        store.get_object("0" * 64)
    os.truncate(path, objects.MAX_OBJECT + 1)  # sparse: takes no room
    with pytest.raises(errors.DamagedError, match="more than"):
        store.get_object("0" * 64)


def test_an_object_that_does_not_fit_into_memory_says_so(store, monkeypatch):
    name = store.put_factors(factors())

    def empty(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(errors.DamagedError, match="no memory for the"):
        store.get_object(name)


def test_an_object_that_is_cut_while_it_is_read_is_refused(store, monkeypatch):
    name, memory = store.put_factors(factors()), objects._memory

    def cut(path: Path, entry: object) -> torch.Tensor:
        os.truncate(path, path.stat().st_size - 1)
        return memory(path, entry)

    monkeypatch.setattr(objects, "_memory", cut)
    with pytest.raises(errors.DamagedError, match="ends too early"):
        store.get_object(name)


def test_a_missing_object_says_so(store):
    with pytest.raises(errors.DamagedError, match=r"missing.*compress again"):
        store.get_object("0" * 64)


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "\n", "/" * 64, None, 7])
def test_a_hostile_digest_never_becomes_a_path(store, name):
    for call in (store.get_object, store.has_object):
        with pytest.raises(errors.RecordError, match="64 hex digits"):
            call(name)
    with pytest.raises(errors.RecordError):
        record("layer", name or "")


def test_links_that_lead_out_are_refused_and_links_inside_are_not(store, tmp_path):
    name = store.put_factors(factors())
    path = object_file(store, name)
    inside = store.root / "objects" / "moved"
    path.rename(inside)
    path.symlink_to(inside)
    store.get_object(name)

    outside = tmp_path / "outside"
    inside.rename(outside)
    path.unlink()
    path.symlink_to(outside)
    with pytest.raises(errors.DamagedError, match="out of the store"):
        store.get_object(name)

    store.put_factors(factors())  # replaces the link and leaves what it points to
    assert not path.is_symlink()
    assert outside.exists()
    store.get_object(name)

    path.unlink()
    path.symlink_to(path)
    with pytest.raises(errors.DamagedError):
        store.get_object(name)


@pytest.mark.parametrize("folder", ["objects", "runs", "locks"])
def test_nothing_is_written_through_a_folder_that_leads_out(store, tmp_path, folder):
    outside = tmp_path / "outside"
    outside.mkdir()
    store.root.mkdir()
    (store.root / folder).symlink_to(outside)
    with pytest.raises(errors.DamagedError, match="out of the store"):
        write(store)
    assert not list(outside.iterdir())


@pytest.mark.parametrize("target", ["locks/other.lock", "locks/.sweep.lock", "store.json", "runs/run.json"])
@pytest.mark.parametrize("lock", ["run.lock", ".sweep.lock"])
def test_a_lock_that_is_a_link_is_refused_and_what_it_points_to_stays(store, lock, target):
    run = write(store)
    write(store, "other")
    path, other = store.root / "locks" / lock, store.root / target
    before = other.read_bytes()
    path.unlink()
    path.symlink_to(other)
    for wish in (lambda: write(store), lambda: store.gc(min_age=-1)):
        with pytest.raises(errors.StoreError, match=r"\.lock: a lock is no link; remove|loop"):
            wish()
    if other != path:
        assert other.read_bytes() == before
        assert store.run("run") == run


def test_what_is_no_file_is_refused(store):
    path = object_file(store, "0" * 64)
    path.parent.mkdir(parents=True)
    os.mkfifo(path)  # would wait for ever
    with pytest.raises(errors.DamagedError, match="no regular file"):
        store.get_object("0" * 64)
    path.unlink()
    path.mkdir()
    with pytest.raises(errors.StoreError, match="no regular file"):
        store.get_object("0" * 64)


# Factors


@pytest.mark.parametrize(
    "given",
    [
        factors(),
        replace(factors(), bias=torch.ones(M), y_scale=2.0**-9),
        PairFactors(torch.ones(M, R), torch.ones(R, N)),
    ],
    ids=["pifa", "pifa with bias", "pair"],
)
def test_factors_come_back(store, given):
    found = store.factors(record("layer", store.put_factors(given), form=given.form))
    assert type(found) is type(given)
    assert found.tensors().keys() == given.tensors().keys()
    assert all(torch.equal(found.tensors()[name], t) for name, t in given.tensors().items())
    assert getattr(found, "y_scale", None) == getattr(given, "y_scale", None)


@pytest.mark.parametrize(
    "lie",
    [{"rank": R - 1}, {"shape": (M, N + 1)}, {"shape": (N, M)}, {"form": "pair"}],
    ids=str,
)
def test_a_record_that_lies_about_its_factors_names_the_layer(store, lie):
    told = record("model.layers.3.up_proj", store.put_factors(factors()), **lie)
    with pytest.raises(errors.DamagedError, match=r"model\.layers\.3\.up_proj.*the run says"):
        store.factors(told)


@pytest.mark.parametrize(
    "change",
    [
        {"row_order": torch.zeros(M, dtype=torch.int32)},
        {"row_order": torch.arange(1, M + 1, dtype=torch.int32)},
        {"coefficients": torch.ones(R, M - R)},
        {"pivot_rows": torch.ones(R)},
        {"more": torch.ones(1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_tensors_that_are_no_factors_are_refused(store, change):
    name = store.put_object(factors().tensors() | change, FLOAT)
    with pytest.raises(errors.DamagedError, match=r"layer7.*not the factors"):
        store.factors(record("layer7", name))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["pivot_rows", "coefficients", "bias", "left", "right"])
def test_factors_that_are_not_finite_are_refused(store, name, value):
    pair = name in ("left", "right")
    given = PairFactors(torch.ones(M, R), torch.ones(R, N)) if pair else replace(factors(), bias=torch.ones(M))
    given.tensors()[name].flatten()[-1] = value
    told = record("layer7", store.put_factors(given), form=given.form)
    with pytest.raises(errors.DamagedError, match=rf"layer7.*{name} is not finite.*compress again"):
        store.factors(told)


def test_an_object_larger_than_its_record_allows_is_not_read(store):
    told = record("layer7", store.put_factors(factors()))
    os.truncate(object_file(store, told.object), 1 << 33)  # sparse: takes no room on the disk, but in memory
    with pytest.raises(errors.DamagedError, match=r"layer7.*more than the"):
        store.factors(told)


@pytest.mark.parametrize("scale", ["3", "0", "-1", "nan", "inf", "x", ""])
def test_a_scale_that_is_no_power_of_two_is_refused(store, scale):
    name = store.put_object(factors().tensors(), FLOAT | {"y_scale": scale})
    with pytest.raises(errors.DamagedError, match="layer7"):
        store.factors(record("layer7", name))


def test_a_dense_layer_has_no_factors(store):
    with pytest.raises(errors.RecordError, match=r"stays dense.*too small"):
        store.factors(record("layer7", None))


# Records


def group(obj: str) -> LayerRecord:
    q, k = (cast_digests(torch.randn(3, N, generator=torch.Generator().manual_seed(s))) for s in (7, 8))
    return record("qk", obj, digests={}, members=(Member("q", q, 3), Member("k", k, 3)))


def test_records_go_through_json():
    details = {"pivoting": "lu", "max": 1.5, "nested": [1, None, {"deep": True}]}
    for told in (record("a", "0" * 64, details=details), record("b", None), group("1" * 64)):
        assert LayerRecord.from_json(json.loads(json.dumps(told.to_json()))) == told
    told = header(calibration={"text": "x", "tokens": 7}, revision="abc", versions={"torch": "2.13"}, seed=-3)
    assert RunHeader.from_json(json.loads(json.dumps(told.to_json()))) == told


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": 3},
        {"digests": {"float32": "sha256:abc"}},
        {"digests": []},
        {"shape": (M,)},
        {"shape": (M, -1)},
        {"shape": (M, 2.0)},
        {"shape": (M, True)},
        {"object": None},
        {"object": "../../x"},
        {"form": "dense"},
        {"form": "lora"},
        {"form": ["pifa"]},
        {"rank": -1},
        {"rank": min(M, N) + 1},
        {"numbers": 1.5},
        {"numbers": 10**30},
        {"bytes": "1"},
        {"seconds": float("nan")},
        {"seconds": 10**400},
        {"seconds": 1e300},
        {"rank": 0},
        {"shape": (0, N)},
        {"details": {"a": json.loads("[" * 40 + "]" * 40)}},
        {"layout": "diagonal"},
        {"error": float("inf")},
        {"error": -1.0},
        {"reason": 3},
        {"details": {"a": float("nan")}},
        {"details": {"a": (1, 2)}},
        {"details": {1: 2}},
        {"details": {"a": torch.ones(1)}},
        {"details": None},
        {"members": (Member("q", {}, 3),)},
        {"members": [1]},
    ],
    ids=str,
)
def test_an_impossible_layer_is_refused_by_name(change):
    with pytest.raises(errors.RecordError, match="layer"):
        replace(record("layer7", "0" * 64), **change)


def test_a_dense_layer_needs_a_reason():
    with pytest.raises(errors.RecordError, match="say why"):
        record("layer7", None, reason=None)


@pytest.mark.parametrize(
    "run_id", ["", ".", "..", "../x", "a/b", "A", "a\n", "a\0", ".hidden", "-a", "ä", "a" * 129, None]
)
def test_a_hostile_run_id_never_becomes_a_path(store, run_id):
    write(store)
    before = everything(store.root)
    with pytest.raises(errors.RecordError):
        header(run_id)
    for call in (store.run, store.verify, store.delete_run):
        with pytest.raises(errors.RecordError, match="run id"):
            call(run_id)
    assert everything(store.root) == before


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"recipe": {"a": {1, 2}}},
        {"layers": -1},
        {"created": "yesterday"},
        {"seed": 1.0},
        {"seed": 1 << 64},
        {"versions": {"torch": 2}},
        {"schema": 2},
        {"schema": True},
        {"calibration": "text"},
    ],
    ids=str,
)
def test_an_impossible_header_is_refused(change):
    with pytest.raises(errors.RecordError, match="run 'run'"):
        header(**change)


def test_a_run_can_be_asked(store):
    joined = group("1" * 64)
    small = record("small", None, 3)
    run = Run(header(), (record("a", "0" * 64, 0), joined, small, record("b", "2" * 64, 0, form="pair")), complete=True)
    weight = torch.randn(M, N, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert run.by_digest[digest(weight.to(dtype))].name == "a"  # the first of equal weights
    assert run.by_digest[joined.members[1].digests["float16"]] is joined
    assert run.by_name["k"] is joined
    assert run.by_name["small"] is small
    kept = R * (M + N - R) + R
    assert run.density == pytest.approx(kept / (M * N))
    assert run.density_all == pytest.approx((3 * kept + M * N) / (4 * M * N))
    assert run.totals == (5, 3, 1, 1, 3 * kept + M * N, 4 * M * N, 400, 2.0)
    assert Run(header(), (), complete=False).density == 1.0


# Runs


def test_a_run_comes_back(store):
    run = write(store, layers=3)
    assert run.complete
    assert store.run("run") == run
    assert store.runs() == [run]
    assert store.verify("run") == []
    assert everything(store.root / "runs") == {"run.json"}
    assert Store(store.root).run("run") == run


def test_leaving_early_keeps_what_was_added(store):
    with store.write_run(header(layers=3)) as writer:
        assert writer.done == {}
        writer.add(record("layer0", store.put_factors(factors())))
        with pytest.raises(errors.StoreError, match="1 of 3 layers"):
            writer.finish()
    partial = store.run("run")
    assert not partial.complete
    assert [told.name for told in partial.layers] == ["layer0"]
    with pytest.raises(KeyboardInterrupt), store.write_run(header(layers=3, created="2026-01-01T00:00:00Z")) as writer:
        assert list(writer.done) == ["layer0"]
        writer.add(record("layer1", None, 1))
        raise KeyboardInterrupt
    with store.write_run(header(layers=3)) as writer:
        assert list(writer.done) == ["layer0", "layer1"]
        writer.add(record("layer2", None, 2))
        run = writer.finish()
    assert run.header.created == partial.header.created
    assert store.run("run") == run
    with store.write_run(header(layers=3)) as writer:  # nothing left to do
        assert list(writer.done) == ["layer0", "layer1", "layer2"]
        assert writer.finish() == run


def test_a_group_counts_as_its_members(store):
    with store.write_run(header(layers=2)) as writer:
        writer.add(group(store.put_factors(factors())))
        writer.finish()
    assert store.verify("run") == []


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    "change", [{"recipe": {"method": "mpifa"}}, {"seed": 1}, {"calibration": {}}, {"layers": 3}], ids=str
)
def test_a_run_is_not_continued_with_other_settings(store, change, finished):
    if finished:
        write(store)
    else:
        with store.write_run(header()) as writer:
            writer.add(record("layer0", None))
    before = store.run("run")
    with (
        pytest.raises(errors.RunMismatchError, match=r"was begun with .*delete_run"),
        store.write_run(header(**change)),
    ):
        pass
    assert store.run("run") == before


def test_a_writer_refuses_what_is_wrong(store):
    name = store.put_factors(factors())
    writer = store.write_run(header())
    with pytest.raises(errors.StoreError, match="with"):
        writer.add(record("a", name))
    with pytest.raises(errors.StoreError, match="with"):
        writer.finish()
    with writer:
        with pytest.raises(errors.RecordError, match="not in the store"):
            writer.add(record("a", "0" * 64))
        writer.add(record("a", name))
        with pytest.raises(errors.RecordError, match="already"):
            writer.add(record("a", name))
        writer.add(record("b", None))
        writer.finish()
        with pytest.raises(errors.StoreError, match="finished"):
            writer.add(record("c", None))
    with pytest.raises(errors.StoreError):
        writer.add(record("c", None))


def test_one_thread_does_not_wait_for_itself(store):
    with store.write_run(header()), pytest.raises(errors.RunBusyError, match="this very thread"):
        store.write_run(header()).__enter__()


# Damage


def begun(store: Store, layers: int = 3) -> tuple[Path, bytes]:
    """A journal with ``layers`` of twice as many layers."""
    with store.write_run(header(layers=2 * layers)) as writer:
        for i in range(layers):
            writer.add(record(f"layer{i}", None, i))
    path = store.root / "runs" / "run.partial.jsonl"
    return path, path.read_bytes()


def test_a_torn_last_line_is_dropped_wherever_it_is_torn(store):
    path, good = begun(store)
    start = good.rstrip(b"\n").rfind(b"\n") + 1
    last = good[start:]
    torn = [last[:size] for size in (*range(1, len(last), 7), len(last) - 1)]
    torn += [b"\0" * 50, b"\0" * 50 + b"\n", last[:-1] + b" x\n", b"{}\n", b"[]\n", b"\xff\n", last.replace(b"e", b"f")]
    for tail in torn:
        path.write_bytes(good[:start] + tail)
        assert [told.name for told in store.run("run").layers] == ["layer0", "layer1"]
        assert path.read_bytes() == good[:start] + tail  # a reader changes nothing
    with store.write_run(header(layers=6)) as writer:
        assert list(writer.done) == ["layer0", "layer1"]
        writer.add(record("layer2", None, 2))
    assert path.read_bytes() == good


def test_a_torn_header_is_no_run_yet(store):
    path, good = begun(store)
    for size in (0, 1, 100, good.index(b"\n")):
        path.write_bytes(good[:size])
        assert store.runs() == []
        with pytest.raises(errors.UnknownRunError):
            store.run("run")
    with store.write_run(header(layers=6)) as writer:
        assert writer.done == {}


def test_a_journal_that_was_changed_is_never_served(store, tmp_path):
    path, good = begun(store)
    other = begun(Store(tmp_path / "other"))[1].splitlines(keepends=True)
    head, a, b, c = good.splitlines(keepends=True)
    changed = [head + b + a + c, head + b + c, head + a + a + b + c, a + b + c, head + head + a, b"\n" + good]
    changed += [head + b"\n" + a + b, head + other[2] + b + c, head + a + good[len(head + a) + 9 :]]
    for content in changed:
        path.write_bytes(content)
        with pytest.raises(errors.StoreError, match="run"):
            store.run("run")
        with pytest.raises(errors.StoreError), store.write_run(header(layers=6)):
            pass
        assert path.read_bytes() == content
    wanted, chance = (
        Run(header(layers=6), tuple(record(f"layer{i}", None, i) for i in range(3)), False),
        random.Random(1),
    )
    for place in chance.sample(range(len(good)), 150):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << chance.randrange(7)]) + good[place + 1 :])
        try:
            run = store.run("run")
        except errors.StoreError:
            continue
        assert place > len(head + a)  # in the last line, or the end of the line before it
        assert run == replace(wanted, layers=wanted.layers[: len(run.layers)])
        assert len(run.layers) < 3
    store.delete_run("run")
    assert store.runs() == []


def test_a_journal_of_line_ends_takes_no_more_memory_than_its_bytes(store):
    path, good = begun(store)
    path.write_bytes(good + b"\n" * (1 << 23))
    tracemalloc.start()
    with pytest.raises(errors.DamagedError, match="line 5 is not"):
        store.run("run")
    assert tracemalloc.get_traced_memory()[1] < 3 * (1 << 23)
    tracemalloc.stop()


def test_a_document_that_was_changed_is_never_served(store):
    run = write(store)
    path = store.root / "runs" / "run.json"
    good = path.read_bytes()
    chance = random.Random(2)
    changed = [b"", b"{}", b"[]", b"null", b"[" * 100_000, b"\xff", good[: len(good) // 2], good[:-3]]
    changed.append(good.replace(b'"layers": [', b'"layers": {', 1))
    for place in chance.sample(range(len(good)), 200):
        flipped = good[:place] + bytes([good[place] ^ 1 << chance.randrange(7)]) + good[place + 1 :]
        if not good[place : place + 1].isspace() and flipped.split() != good.split():  # white space means nothing
            changed.append(flipped)
    for content in changed:
        path.write_bytes(content)
        with pytest.raises(errors.StoreError, match=r"run\.json"):
            store.run("run")
        with pytest.raises(errors.StoreError), store.write_run(header()):
            pass
    with pytest.warns(UserWarning, match=r"run\.json.*delete_run"):
        assert store.runs() == []
    path.write_bytes(good)
    assert store.run("run") == run


def seal(body: dict, before: str = "") -> dict:
    return body | {"sha256": hashlib.sha256(before.encode() + records.canonical(body)).hexdigest()}


def test_a_wrong_record_with_a_right_checksum_is_refused(store):
    write(store)
    path = store.root / "runs" / "run.json"
    body = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    wrong = [
        body | {"layers": 3},
        body | {"layers": None},
        body | {"layers": ["x"]},
        body | {"layers": [body["layers"][0] | {"rank": 99}]},
        body | {"layers": [body["layers"][0] | {"object": "../../etc"}]},
        body | {"layers": [body["layers"][0] | {"new": 1}]},
        body | {"layers": [body["layers"][0] | {"members": 1}]},
        body | {"layers": [body["layers"][0] | {"members": [3]}]},
        body | {"header": None},
        body | {"header": {"schema": 1}},
        body | {"header": body["header"] | {"run_id": "../x"}},
        body | {"format": "other"},
    ]
    for changed in wrong:
        path.write_text(json.dumps(seal(changed)))
        with pytest.raises(errors.DamagedError, match=r"run\.json"):
            store.run("run")
    path.write_text(json.dumps(seal(body)))
    store.run("run")


def test_a_run_under_another_name_is_refused(store):
    write(store, "one")
    write(store, "two")
    runs = store.root / "runs"
    (runs / "one.json").replace(runs / "two.json")
    with pytest.raises(errors.DamagedError, match="'one' under another name"):
        store.run("two")
    path, _ = begun(store)
    path.rename(runs / "three.partial.jsonl")
    with pytest.raises(errors.DamagedError, match="'run' under another name"):
        store.run("three")


def test_higher_versions_are_refused_with_the_way_out(store):
    write(store)
    path = store.root / "runs" / "run.json"
    body = json.loads(path.read_text())
    body["header"] |= {"schema": 2, "new": "field"}
    path.write_text(json.dumps(body))
    with pytest.raises(errors.StoreVersionError, match=r"schema.* 2,.*update pifa-compile"):
        store.run("run")
    newer = {"header": {"schema": 2, "run_id": "next"}, "sha256": "of another kind"}
    (store.root / "runs" / "next.partial.jsonl").write_text(json.dumps(newer) + "\n")
    with pytest.raises(errors.StoreVersionError):
        store.run("next")
    with pytest.warns(UserWarning, match="schema"):
        assert store.runs() == []

    marker = store.root / "store.json"
    assert json.loads(marker.read_text()) == {"format": "pifa-compile store", "version": 1}
    marker.write_text(json.dumps({"format": "pifa-compile store", "version": 2}))
    for call in (lambda: Store(store.root), lambda: store.put_factors(factors()), lambda: store.write_run(header())):
        with pytest.raises(errors.StoreVersionError, match=r"version of the store is 2.*PIFA_CACHE_DIR"):
            call()


def test_lower_versions_are_refused_too(store):
    """There was none: whoever says so is not what this package wrote."""
    write(store)
    path = store.root / "runs" / "run.json"
    for schema in (0, -1, None, 1.0, "1", True):
        body = json.loads(path.read_text())
        body.pop("sha256")
        path.write_text(json.dumps(seal(body | {"header": body["header"] | {"schema": schema}})))
        with pytest.raises(errors.DamagedError, match=r"run\.json.*schema cannot be.*delete_run"):
            store.run("run")
    for version in (0, -1, None, "1", [1]):
        (store.root / "store.json").write_text(json.dumps({"format": "pifa-compile store", "version": version}))
        with pytest.raises(errors.StoreVersionError, match="version of the store"):
            Store(store.root)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"format": "pickles", "version": 1}', "\0" * 5000, "[" * 4000, '{"a": 1e999}', '{"a": 1, "a": 1}'],
)
def test_a_folder_of_something_else_is_not_taken_for_a_store(tmp_path, content):
    (tmp_path / "store.json").write_text(content)
    with pytest.raises(errors.DamagedError, match=r"store\.json"):
        Store(tmp_path)


# Finding, removing


def test_a_run_is_found_by_the_beginning_of_its_name(store):
    one, two = write(store, "toy-svd-0.5"), write(store, "toy-mpifa-0.5")
    short = write(store, "toy")
    assert store.run("toy-s") == one
    assert store.run("toy-mpifa-0.5") == two
    assert store.run("toy") == short
    with pytest.raises(errors.UnknownRunError, match=r"(?s)several.*toy-mpifa-0\.5.*toy-svd-0\.5"):
        store.run("toy-")
    with pytest.raises(errors.UnknownRunError, match=r"(?s)is no run.*toy-svd-0\.5"):
        store.run("llama")
    with pytest.raises(errors.UnknownRunError, match="none"):
        Store(store.root.parent / "nowhere").run("toy")


def test_the_oldest_run_comes_first(store):
    for run_id, created in (
        ("a", "2025-03-01T00:00:00Z"),
        ("b", "2025-01-01T00:00:00Z"),
        ("c", "2025-02-01T00:00:00Z"),
    ):
        with store.write_run(header(run_id, 0, created=created)) as writer:
            writer.finish()
    assert [run.run_id for run in store.runs()] == ["b", "c", "a"]


def test_runs_of_one_second_stay_in_the_order_they_were_made_in(store):
    for run_id in ("b", "c", "a"):
        with store.write_run(header(run_id, 0, created=timestamp())) as writer:
            writer.finish()
        time.sleep(0.002)
    assert [run.run_id for run in store.runs()] == ["b", "c", "a"]


def test_reading_makes_nothing(tmp_path):
    store = Store(tmp_path / "nowhere")
    assert store.runs() == []
    assert store.gc() == []
    assert not store.has_object("0" * 64)
    assert not store.root.exists()


def test_gc_removes_what_nothing_names(store):
    write(store, "one")
    shared, begun_, orphan = (store.put_factors(factors(i)) for i in (0, 1, 2))
    with store.write_run(header("two")) as writer:
        writer.add(record("layer0", begun_, 1))
    leftover = store.root / "objects" / f"{files.TEMPORARY}x"
    leftover.write_bytes(b"half")
    stranger = store.root / "objects" / "README"
    stranger.write_bytes(b"not ours")

    assert store.gc() == []  # all of it is young
    assert leftover.exists()
    assert store.gc(min_age=-1) == [orphan]
    assert not leftover.exists()
    assert stranger.exists()
    assert store.verify("one") == store.verify("two") == []

    store.delete_run("one")
    assert store.gc(min_age=-1) == [shared]
    store.delete_run("two")
    assert store.gc(min_age=-1) == [begun_]
    assert store.runs() == []


def test_gc_and_delete_keep_away_from_a_writer(store):
    write(store, "one")
    with store.write_run(header("two")):
        for wish in (lambda: store.gc(min_age=-1), lambda: store.delete_run("two")):
            with pytest.raises(errors.RunBusyError, match=rf"'two' is being written by process {os.getpid()} "):
                wish()
        store.delete_run("one")
    store.gc(min_age=-1)
    store.delete_run("two")


def test_a_writer_waits_for_gc(store, spawn, tmp_path):
    report = tmp_path / "report"
    write(store, "other")
    with locks.sweeping(store.root):
        pid = spawn(str(store.root), "run", 2, 0, str(report))
        lock = store.root / "locks" / "run.lock"
        wait_for(lock.exists)
        time.sleep(0.3)
        assert not lines(report)
    wait_for(lambda: "end" in lines(report))
    wait_for(lambda: not alive(pid))


def test_gc_removes_nothing_while_a_run_cannot_be_read(store):
    write(store)
    (store.root / "runs" / "run.json").write_text("{}")
    with pytest.raises(errors.DamagedError):
        store.gc(min_age=-1)
    assert len(list(store.root.glob("objects/*/*"))) == 1
    store.delete_run("run")
    assert len(store.gc(min_age=-1)) == 1


@pytest.mark.parametrize("finished", [True, False])
def test_layers_whose_factors_are_lost_are_computed_again(store, caplog, finished):
    if finished:
        run = write(store, layers=3)
    else:
        with store.write_run(header(layers=3)) as writer:
            for i in range(2):
                writer.add(record(f"layer{i}", store.put_factors(factors(i)), i))
        run = store.run("run")
    object_file(store, run.layers[0].object).unlink()
    (problem,) = store.verify("run")
    assert problem.startswith(f"layer0: {object_file(store, run.layers[0].object)}: it is missing")
    with store.write_run(header(layers=3)) as writer:
        assert "layer0" not in writer.done
        assert "layer1" in writer.done
        writer.add(record("layer0", store.put_factors(factors(0)), 0))
    with store.write_run(header(layers=3)) as writer:  # interrupted meanwhile
        if "layer2" not in writer.done:
            writer.add(record("layer2", None, 2))
        again = writer.finish()
    assert {told.name: told for told in again.layers} == {f"layer{i}": again.by_name[f"layer{i}"] for i in range(3)}
    assert store.verify("run") == []
    assert everything(store.root / "runs") == {"run.json"}


def test_verify_lists_every_problem(store):
    wild = replace(factors(5), coefficients=torch.full((M - R, R), float("nan")))
    with store.write_run(header(layers=4)) as writer:
        writer.add(record("good", store.put_factors(factors(0)), 0))
        writer.add(record("flipped", store.put_factors(factors(1)), 1))
        writer.add(record("lying", store.put_factors(factors(2)), 2, rank=R + 1))
        writer.add(record("wild", store.put_factors(wild), 3))
        run = writer.finish()
    path = object_file(store, run.by_name["flipped"].object)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    flipped, lying, wild_ = store.verify("run")
    assert run.by_name["flipped"].object in flipped
    assert "lying" in lying
    assert wild_.startswith("wild: ")
    assert "coefficients is not finite" in wild_


# The disk


def test_the_default_place(monkeypatch, tmp_path):
    monkeypatch.setenv("PIFA_CACHE_DIR", str(tmp_path / "mine"))
    assert Store().root == tmp_path / "mine" and str(tmp_path / "mine") in repr(Store())
    monkeypatch.delenv("PIFA_CACHE_DIR")
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub, "cached_assets_path", lambda *a, **k: calls.append((a, k)) or tmp_path / "hub")
    assert Store().root == tmp_path / "hub"
    assert calls == [(("pifa_compile",), {"namespace": "store", "subfolder": "default"})]

    def refuse(*arguments: object, **keywords: object) -> None:
        raise PermissionError(13, "Permission denied", "/hub/assets")

    monkeypatch.setattr(huggingface_hub, "cached_assets_path", refuse)
    with pytest.raises(errors.StoreAccessError, match=r"/hub/assets: Permission denied.*PIFA_CACHE_DIR"):
        Store()


def test_a_place_that_cannot_be_written_says_what_to_do(tmp_path):
    """A path under a file: unlike permissions, it stops root as well."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(errors.StoreAccessError, match=r"file.*PIFA_CACHE_DIR"):
        write(Store(tmp_path / "file" / "store"))
    store = Store(tmp_path / "store")
    write(store)
    with store.write_run(header("next")) as writer:
        (store.root / "objects").rename(store.root / "moved")
        (store.root / "objects").write_bytes(b"")
        with pytest.raises(errors.StoreAccessError, match=r"objects.*PIFA_CACHE_DIR"):
            store.put_factors(factors(9))
        (store.root / "runs").rename(store.root / "moved runs")
        with pytest.raises(errors.StoreError, match="runs"):
            writer.add(record("layer0", None))
            writer.add(record("layer1", None, 1))
            (store.root / "runs").write_bytes(b"")
            writer.finish()


@contextmanager
def nobody() -> Iterator[None]:
    """As root, do without root's rights."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach; those of pytest are root's alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_read_only_store_can_be_read(open_folder):
    store = Store(open_folder / "store")
    run = write(store)
    for path in [store.root, *store.root.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = everything(store.root)
    try:
        with nobody():
            assert Store(store.root).runs() == [run]
            assert store.verify("run") == []
            store.factors(run.layers[0])
            for wish in (
                lambda: store.put_factors(factors(9)),
                lambda: write(store, "next"),
                lambda: store.delete_run("run"),
                lambda: store.gc(min_age=-1),
                lambda: Scratch(store.root, "run").put("a", {"a": torch.ones(1)}),
            ):
                with pytest.raises(errors.StoreAccessError, match="PIFA_CACHE_DIR"):
                    wish()
        assert everything(store.root) == before
    finally:
        for path in [store.root, *store.root.rglob("*")]:
            path.chmod(0o755)


@pytest.mark.parametrize("place", ["", "runs", "runs/run.json", "objects", "object", "store.json"])
def test_what_may_not_be_read_is_told_and_not_taken_for_missing(open_folder, place):
    store = Store(open_folder / "store")
    run = write(store)
    path = object_file(store, run.layers[0].object) if place == "object" else store.root / place
    path.chmod(0)
    try:
        with nobody(), warnings.catch_warnings(), pytest.raises(errors.StoreAccessError, match="Permission denied"):
            warnings.simplefilter("ignore")
            Store(store.root).runs()
            Store(store.root).run("run")
            Store(store.root).factors(run.layers[0])
    finally:
        path.chmod(0o755)
    assert store.verify("run") == []


def test_what_is_removed_under_a_store_is_missing_or_made_again(store):
    run = write(store)
    shutil.rmtree(store.root / "objects")
    with pytest.raises(errors.DamagedError, match=r"layer0.*missing.*compress again"):
        store.factors(run.layers[0])
    shutil.rmtree(store.root / "runs")
    assert store.runs() == []
    shutil.rmtree(store.root)
    assert store.runs() == [] and not store.root.exists()
    assert write(store).layers == run.layers
    assert store.verify("run") == []


NAMES = ["with spaces  in it", "Grüße/日本語", "new\nline", "a'b\"c;$(x)", os.fsdecode(b"caf\xe9")]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_every_name_of_a_folder_will_do(tmp_path, name):
    store = Store(tmp_path / name)
    run = write(store)
    again = Store(str(tmp_path / name))
    assert again.runs() == [run] and again.verify("run") == []
    scratch = Scratch(again.root, "run")
    if name.isprintable() or "\n" in name:
        scratch.put("part", {"a": torch.ones(3)})
        assert torch.equal(scratch.get("part")[0]["a"], torch.ones(3))
    else:
        with pytest.raises(errors.StoreAccessError, match=r"not UTF-8.*PIFA_CACHE_DIR"):
            scratch.put("part", {"a": torch.ones(3)})
    assert torch.equal(again.factors(run.layers[0]).pivot_rows, factors(0).pivot_rows)
    again.gc(min_age=-1)
    assert again.verify("run") == []


def test_a_name_that_cannot_be_is_told():
    with pytest.raises(errors.StoreAccessError, match="PIFA_CACHE_DIR"):
        Store("a\0b")


def test_a_file_system_without_locks_is_told(store, monkeypatch):
    def refuse(*arguments: object, **keywords: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(locks.FileLock, "acquire", refuse)
    with pytest.raises(errors.StoreAccessError, match=r"support flock.*PIFA_CACHE_DIR"):
        write(store)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_disk_leaves_nothing_half_written(store, monkeypatch, step):
    write(store, "one")
    before = everything(store.root)

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync", fail) if step == "fsync" else (Path, "replace", fail)))
        with pytest.raises(errors.StoreAccessError, match=r"No space left.*PIFA_CACHE_DIR"):
            store.put_factors(factors(9))
        with pytest.raises(errors.StoreAccessError, match="No space left"), store.write_run(header("two")):
            pass
    new = everything(store.root) - before
    assert new <= {"locks/two.lock", "locks/two.holder"}
    write(store, "two")


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """Limits the size of every file that this process writes."""
    old, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_under_an_object(store, small_disk):
    write(store)
    before = everything(store.root)
    small_disk(3000)
    with pytest.raises(errors.StoreAccessError, match=r"objects.*PIFA_CACHE_DIR"):
        store.put_object({"a": torch.ones(10_000)}, FLOAT)
    assert everything(store.root) == before


def test_a_full_disk_under_a_scratch_file(store, small_disk):
    scratch, small = Scratch(store.root, "run"), {"a": torch.ones(3)}
    scratch.put("part", small)
    small_disk(3000)
    with pytest.raises(errors.StoreAccessError, match=r"scratch.*PIFA_CACHE_DIR"):
        scratch.put("part", {"a": torch.ones(10_000)})
    assert torch.equal(scratch.get("part")[0]["a"], small["a"])  # what had the name is still there
    scratch.clear()
    assert not everything(store.root / "scratch")


def test_a_full_disk_under_a_journal(store, small_disk):
    with pytest.raises(errors.StoreAccessError, match="partial"), store.write_run(header(layers=100)) as writer:
        small_disk(5000)
        for i in range(100):
            writer.add(record(f"layer{i}", None, i))
    done = len(writer.done)
    assert 0 < done < 10
    assert len(store.run("run").layers) == done  # the torn line is dropped
    small_disk(resource.RLIM_INFINITY)
    with store.write_run(header(layers=100)) as writer:
        assert len(writer.done) == done
        for i in range(done, 100):
            writer.add(record(f"layer{i}", None, i))
        writer.finish()
    assert len(store.run("run").layers) == 100


def test_a_full_disk_under_the_document(store, small_disk):
    with store.write_run(header(layers=20)) as writer:
        for i in range(20):
            writer.add(record(f"layer{i}", None, i))
        small_disk(5000)
        with pytest.raises(errors.StoreAccessError, match=r"run\.json|runs"):
            writer.finish()
        small_disk(resource.RLIM_INFINITY)
        assert everything(store.root / "runs") == {"run.partial.jsonl"}
        run = writer.finish()
    assert store.run("run") == run


@pytest.fixture
def full_disk(tmp_path) -> Iterator[Path]:
    """A disk of half a megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_keeps_what_was_finished_and_goes_on_when_there_is_room(full_disk):
    store, ballast = Store(full_disk / "store"), full_disk / "ballast"
    ballast.write_bytes(b"\0" * (1 << 18))

    def go_on() -> Run:
        with store.write_run(header(layers=20)) as writer:
            for i in range(len(writer.done), 20):
                name = store.put_factors(factors(i, m=60, n=60, r=40))
                writer.add(record(f"layer{i}", name, i, shape=(60, 60), rank=40))
            return writer.finish()

    with pytest.raises(errors.StoreAccessError, match="No space left") as caught:
        go_on()
    assert str(store.root) in str(caught.value)
    done = store.run("run").layers
    assert 0 < len(done) < 20 and store.verify("run") == []
    with pytest.raises(errors.StoreAccessError, match="No space left"):
        go_on()
    assert store.run("run").layers == done
    assert not [name for name in everything(store.root) if files.TEMPORARY in name]
    ballast.unlink()
    run = go_on()
    assert run.layers[: len(done)] == done and store.verify("run") == []


# Several processes


@pytest.mark.parametrize("kills", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_a_killed_writer_loses_nothing_that_was_finished(store, spawn, tmp_path, kills):
    """SIGKILL at random points of one run, from its first moments on, then to its end."""
    report, layers, chance = tmp_path / "report", 12 * kills, random.Random(3)
    for _ in range(kills):
        reported = len(lines(report))
        pid = spawn(str(store.root), "run", layers, 0.002, str(report))
        if chance.random() < 0.7:  # else it may not even have begun
            wait_for(lambda: len(lines(report)) > reported)  # noqa: B023
        time.sleep(chance.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not alive(pid))  # noqa: B023
        assert "end" not in lines(report)
        found = store.runs()
        assert not any(run.complete for run in found)
        names = [told.name for run in found for told in run.layers]
        assert names == [f"layer{i}" for i in range(len(names))]
        assert set(lines(report)) <= set(names)
        assert not found or chance.random() > 20 / kills or store.verify("run") == []
    pid = spawn(str(store.root), "run", layers, 0, str(report))
    wait_for(lambda: "end" in lines(report), 300)
    wait_for(lambda: not alive(pid))
    done = lines(report)[:-1]
    assert len(done) == len(set(done)) <= layers  # what was finished is not computed twice
    assert len(done) >= layers - kills
    run = store.run("run")
    assert run.complete
    assert [told.name for told in run.layers] == [f"layer{i}" for i in range(layers)]
    assert store.verify("run") == []
    store.gc(min_age=-1)
    assert not [name for name in everything(store.root) if files.TEMPORARY in name]
    assert store.verify("run") == []


@pytest.mark.parametrize("processes", [2, 8])
def test_processes_that_write_the_same_run_share_the_work(store, spawn, tmp_path, processes):
    reports = [tmp_path / f"report{i}" for i in range(processes)]
    pids = [spawn(str(store.root), "run", 12, 0.002, str(report)) for report in reports]
    wait_for(lambda: all("end" in lines(report) for report in reports))
    wait_for(lambda: not any(map(alive, pids)))
    done = [line for report in reports for line in lines(report) if line != "end"]
    assert sorted(done) == sorted(f"layer{i}" for i in range(12))
    assert store.run("run").complete
    assert store.verify("run") == []


@pytest.mark.parametrize("apart", [0, 100], ids=["the same layers", "different layers"])
@pytest.mark.parametrize("processes", [2, 8])
def test_processes_that_write_different_runs_do_not_disturb_each_other(store, spawn, tmp_path, processes, apart):
    """Of the same layers all write the same objects, at the same time."""
    reports = [tmp_path / f"report{i}" for i in range(processes)]
    pids = [
        spawn(str(store.root), f"run{i}", 12, 0.001, str(report), apart * i) for i, report in enumerate(reports)
    ]

    def all_ended() -> bool:
        for run in store.runs():  # a reader sees whole layers only
            assert store.verify(run.run_id) == []
        with suppress(errors.RunBusyError):
            store.gc()
        return all("end" in lines(report) for report in reports)

    wait_for(all_ended)
    wait_for(lambda: not any(map(alive, pids)))
    assert all(sorted(lines(r)) == ["end", *sorted(f"layer{i}" for i in range(12))] for r in reports)
    for i in range(processes):
        run = store.run(f"run{i}")
        assert run.complete and len(run.layers) == 12
        for j, told in enumerate(run.layers):
            assert torch.equal(store.factors(told).pivot_rows, factors(apart * i + j).pivot_rows)
    assert len(list(store.root.glob("objects/*/*.safetensors"))) == (12 if apart == 0 else 12 * processes)
    assert not [name for name in everything(store.root) if files.TEMPORARY in name]


def test_a_second_writer_waits_says_for_whom_and_sees_the_layers(store, spawn, tmp_path, caplog):
    report = tmp_path / "report"
    pid = spawn(str(store.root), "run", 10, 0.05, str(report))
    wait_for(lambda: lines(report))
    assert not store.run("run").complete  # a reader need not wait
    with caplog.at_level(logging.WARNING), store.write_run(header(layers=10)) as writer:
        assert len(writer.done) == 10
        assert writer.finish().complete
    waits = [entry.getMessage() for entry in caplog.records if "waiting" in entry.getMessage()]
    assert len(waits) == 1
    assert f"process {pid} on" in waits[0]


def test_a_reader_beside_a_writer_sees_whole_runs_only(store, spawn, tmp_path):
    report = tmp_path / "report"
    pid = spawn(str(store.root), "run", 25, 0, str(report))
    seen = []
    while "end" not in lines(report):
        for run in store.runs():
            seen.append(len(run.layers))
            assert [told.name for told in run.layers] == [f"layer{i}" for i in range(len(run.layers))]
    wait_for(lambda: not alive(pid))
    assert seen == sorted(seen)
    assert store.run("run").complete
