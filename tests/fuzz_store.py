"""Attack a store at random, by hand or for a bounded number of rounds: ``python tests/fuzz_store.py --seconds 600``.

Every round spoils a good store in one way, then does all that users do with stores. What may come out is the right
thing, bit for bit, or a PifaError that names the layer, the run or the file. Every other round of a kind also has what
is damaged or missing made again, by ``damaged="recompute"``. Two ways to spoil it:

damage   files as a bad disk, a full one or a power failure leaves them; checksums are not made good again
hostile  whatever somebody may write who knows the format: all checksums hold, so factors may be others, but they must
         be factors (finite, of the shape that the weight has, rows in a permutation)

Nothing may be executed, imported or unpickled meanwhile, no file outside of the store written, and no more memory taken
than MEMORY. Findings are printed with the number of their round; ``--first N --rounds 1`` does round N again.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import logging
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pifa_compile
from pifa_compile.compression import compress_weights
from pifa_compile.digest import digest_many
from pifa_compile.errors import PifaError, StoreError
from pifa_compile.factors import Factors, PairFactors, PifaFactors
from pifa_compile.layers import linear_weights
from pifa_compile.options import Settings
from pifa_compile.recipes import Joint, Svd
from pifa_compile.reports import render_run, run_summary
from pifa_compile.selection import choose_run, describe
from pifa_compile.store import Run, Store
from pifa_compile.store.json_text import canonical
from pifa_compile.store.objects import object_path, read_object
from pifa_compile.store.scratch import Scratch
from pifa_compile.verification import verify

MEMORY = 800 << 20  # bytes that the process may grow by: a run as large as may be read takes a third
Files = dict[str, bytes]


class Model(nn.Module):
    """Two layers that read one input and one that reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(12, 16), nn.Linear(12, 20), nn.Linear(36, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.q(x), self.k(x)], -1))


@dataclass
class Good:
    """The store before anything is done to it.

    files    by their path in it
    runs     by id: one of each form, one joint, one interrupted
    factors  by run and layer
    outputs  of the prepared model on ``x``, by run
    """

    model: Model
    x: Tensor
    files: Files = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    factors: dict[tuple[str, str], Factors] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    scratch: dict[str, Tensor] = field(default_factory=dict)


def make_good(root: Path) -> Good:
    torch.manual_seed(0)
    good = Good(Model().eval(), torch.randn(3, 12))
    store = Store(root)
    weights = [w for w in linear_weights(good.model) if w.reason is None]
    recipes = (Svd(density=0.6, rank_multiple=1, skip=("k",)), Svd(density=0.5, rank_multiple=1, form="pair"))
    for recipe in (*recipes, Joint(density=0.6, rank_multiple=1, joint=("q+k",))):
        run = compress_weights(weights, recipe, store, model="toy", progress=False)
        good.runs[run.run_id] = run
    last = compress_weights(weights, Svd(density=0.7, rank_multiple=1), store, model="toy", progress=False)
    store.delete_run(last.run_id)
    with store.write_run(last.header) as writer:
        for record in last.layers[:2]:
            writer.add(record)
    good.runs[last.run_id] = store.run(last.run_id)
    good.scratch = {"a": torch.randn(5, 4), "b": torch.arange(3)}
    Scratch(root, last.run_id).put("part", good.scratch, {"ranks": {"q": 3}})
    for run_id, run in good.runs.items():
        good.factors |= {(run_id, r.name): store.factors(r) for r in run.layers if r.object is not None}
        if run.complete:
            good.outputs[run_id] = prepared_output(good, store, run_id)
    good.files = {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
    return good


def prepared_output(good: Good, store: Store, run_id: str, damaged: str = "error") -> Tensor:
    with torch.no_grad():
        model = pifa_compile.apply_(copy.deepcopy(good.model), run=run_id, store=store, damaged=damaged)
        made: Tensor = model(good.x)
    return made


# --- damage ----------------------------------------------------------------------------------------------------------


def damage(root: Path, good: Good, chance: random.Random) -> str:
    name = chance.choice(sorted(good.files))
    path, data = root / name, good.files[name]
    kind = chance.choice(["flip", "flip", "flip", "cut", "cut", "swap", "zeros", "block", "grow", "noise", "file"])
    if kind == "file":
        return f"{name}: {spoil_file(path, root, chance)}"
    path.write_bytes(BYTES[kind](data, good, chance))
    return f"{name}: {kind}"


def _flip(data: bytes, good: Good, chance: random.Random) -> bytes:
    made = bytearray(data or b"\0")
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        made[chance.randrange(len(made))] ^= 1 << chance.randrange(8)
    return bytes(made)


def _cut(data: bytes, good: Good, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _swap(data: bytes, good: Good, chance: random.Random) -> bytes:
    return good.files[chance.choice(sorted(good.files))]


def _zeros(data: bytes, good: Good, chance: random.Random) -> bytes:
    start = chance.randrange(len(data) + 1)
    length = chance.choice([1, 8, 512, len(data)])
    return data[:start] + b"\0" * len(data[start : start + length]) + data[start + length :]


def _block(data: bytes, good: Good, chance: random.Random) -> bytes:
    """A piece of the same file, or of another, in a wrong place."""
    other = chance.choice([data, _swap(data, good, chance)])
    start, source = (chance.randrange(len(d) + 1) for d in (data, other))
    piece = other[source : source + chance.choice([1, 16, 300])]
    return data[:start] + piece + data[start + chance.choice([0, len(piece)]) :]


def _grow(data: bytes, good: Good, chance: random.Random) -> bytes:
    return data + chance.choice([b"\0", b"\n", b"\0" * 512, data, chance.randbytes(40)])


def _noise(data: bytes, good: Good, chance: random.Random) -> bytes:
    return chance.randbytes(chance.choice([0, 1, 9, len(data)]))


BYTES: dict[str, Callable[[bytes, Good, random.Random], bytes]]
BYTES = {"flip": _flip, "cut": _cut, "swap": _swap, "zeros": _zeros, "block": _block, "grow": _grow, "noise": _noise}


def spoil_file(path: Path, root: Path, chance: random.Random) -> str:
    """Something else under the name of a file, or nothing."""
    kind = chance.choice(["missing", "folder", "pipe", "loop", "link out", "link in", "no folder"])
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "link out":
        path.symlink_to(outside(root) / "victim")
    elif kind == "link in":
        path.symlink_to(chance.choice([p for p in root.rglob("*") if p.is_file()]))
    elif kind == "no folder" and path.parent != root:
        shutil.rmtree(path.parent)
        chance.choice([lambda: None, lambda: path.parent.symlink_to(outside(root)), path.parent.touch])()
    return kind


def outside(root: Path) -> Path:
    return root.with_name("outside")


# --- hostility -------------------------------------------------------------------------------------------------------


def hostile(root: Path, good: Good, chance: random.Random) -> str:
    if chance.random() < 0.004:
        return bomb(root, good, chance)
    kind = chance.choice([hostile_document, hostile_document, hostile_journal, hostile_object, hostile_object])
    return kind(root, good, chance)


def seal(body: dict[str, Any], before: str = "") -> dict[str, Any]:
    """As the store does it, but for values that it would not write."""
    rest = {key: value for key, value in body.items() if key != "sha256"}
    try:
        text = canonical(rest)
    except (ValueError, TypeError, RecursionError):
        text = b""
    return rest | {"sha256": hashlib.sha256(before.encode() + text).hexdigest()}


def hostile_document(root: Path, good: Good, chance: random.Random) -> str:
    name = chance.choice([n for n in good.files if n.startswith("runs/") and n.endswith(".json")])
    body = json.loads(good.files[name])
    done = [spoil_value(body, chance) for _ in range(chance.choice([1, 1, 2, 4]))]
    (root / name).write_bytes(spoil_text(json.dumps(seal(body)), chance))
    return f"{name}: {done}"


def hostile_journal(root: Path, good: Good, chance: random.Random) -> str:
    (name,) = (n for n in good.files if n.endswith(".partial.jsonl"))
    bodies = [json.loads(line) for line in good.files[name].splitlines()]
    done = [spoil_value(chance.choice(bodies), chance) for _ in range(chance.choice([1, 1, 2]))]
    if chance.random() < 0.2:
        bodies.append(copy.deepcopy(chance.choice(bodies)))
    lines, before = [], ""
    for body in bodies:
        sealed = seal(body, before) if isinstance(body, dict) else body
        before = sealed["sha256"] if isinstance(sealed, dict) else ""
        lines.append(spoil_text(json.dumps(sealed), chance) if chance.random() < 0.1 else json.dumps(sealed).encode())
    (root / name).write_bytes(b"\n".join(lines) + b"\n")
    return f"{name}: {done}"


def hostile_object(root: Path, good: Good, chance: random.Random) -> str:
    """An object of any content under its right name, and the run that names it."""
    run_id = chance.choice(sorted(good.outputs))
    body = json.loads(good.files[f"runs/{run_id}.json"])
    record = chance.choice([layer for layer in body["layers"] if layer["object"]])
    content = good.files[object_path(Path(), record["object"]).as_posix()]
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    done = []
    for _ in range(chance.choice([1, 1, 2])):
        done.append(chance.choice([spoil_value, spoil_entry])(header, chance))
    for _ in range(chance.choice([0, 1, 2])):
        done.append(spoil_numbers(header, data, chance))
    text = spoil_text(json.dumps(header), chance) if chance.random() < 0.3 else json.dumps(header).encode()
    length = chance.choice([len(text)] * 20 + [0, 1, 1 << 20, 1 << 63, len(text) + 1]).to_bytes(8, "little")
    content = length + text + bytes(data)
    record["object"] = hashlib.sha256(content).hexdigest()
    path = object_path(root, record["object"])
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    if chance.random() < 0.2:
        done.append(spoil_value(record, chance))
    (root / f"runs/{run_id}.json").write_text(json.dumps(seal(body)))
    return f"object {path.stem}: {done}"


def spoil_entry(header: Any, chance: random.Random) -> str:
    """Shapes, places and dtypes that lie more or less plausibly."""
    entries = [e for name, e in header.items() if name != "__metadata__" and isinstance(e, dict)]
    if not entries:
        return "no entry"
    entry, other = chance.choice(entries), chance.choice(entries)
    kind = chance.choice(["transpose", "widen", "empty", "dtype", "move", "rename", "swap", "drop", "metadata"])
    shape = entry.get("shape")
    if kind == "transpose" and isinstance(shape, list):
        shape.reverse()
    elif kind == "widen" and isinstance(shape, list):
        shape.insert(0, chance.choice([1, 0, 2**36, -1]))
    elif kind == "empty" and isinstance(shape, list):
        entry["shape"] = [2**36, 0, 2**36, 2**36]
        entry["data_offsets"] = [0, 0]
    elif kind == "dtype":
        entry["dtype"] = chance.choice(["F64", "F16", "BF16", "F8_E4M3", "I32", "I64", "U8", "BOOL", "C64", "x"])
    elif kind == "move" and isinstance(entry.get("data_offsets"), list):
        step = chance.choice([-4, 4, 1, 2**40])
        entry["data_offsets"] = [place + step if type(place) is int else place for place in entry["data_offsets"]]
    elif kind == "rename":
        old = chance.choice(sorted(header))
        header[chance.choice(["left", "right", "bias", "pivot_rows", "x", "", "../x"])] = header.pop(old)
    elif kind == "swap":
        entry["data_offsets"], other["data_offsets"] = other.get("data_offsets"), entry.get("data_offsets")
    elif kind == "drop":
        del header[chance.choice(sorted(header))]
    else:
        known = {"factor_format": "float", "y_scale": chance.choice(["1", "nan", "1e400", "-1", "0.25"])}
        header["__metadata__"] = {"pifa_compile": json.dumps(known)}
    return kind


def spoil_numbers(header: Any, data: bytearray, chance: random.Random) -> str:
    """Numbers of a tensor that are not finite, or row orders that are no permutation."""
    if not data:
        return "no data"
    value = chance.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f"])
    order = header.get("row_order")
    places = order.get("data_offsets") if isinstance(order, dict) else None
    start = chance.randrange(0, len(data), 4)
    known = isinstance(places, list) and places and all(type(p) is int and p < len(data) for p in places)
    if chance.random() < 0.5 and known:
        start = max(0, places[0])
    data[start : start + 4] = value[: len(data) - start]
    return f"{value.hex()} at {start}"


NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63 - 1, 2**63, 10**39, 10**60, 0.5, -0.0, 1e29, 1e300, 5e-324,
    "", "x", "0", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "\x1b]0;x\x07", "x" * 5000, "{}", "nan",
    "sha256:" + "0" * 64, "0" * 64, "dense", "pifa", "pair", "in_out", "conv1x1", "first-call",
    [], {}, [[]], [1, 2], [0, 0], [12, 16], {"a": 1}, {"": None}, [None] * 50, {"__reduce__": "os.system"},
)  # fmt: skip


def spoil_value(tree: Any, chance: random.Random) -> str:
    """Change one value somewhere in a tree of lists and dicts."""
    places = list(_places(tree))
    if not places:
        return "nothing"
    parent, key = chance.choice(places)
    old = parent[key]
    kind = chance.choice(["nasty", "nasty", "nasty", "drop", "wrap", "deep", "other", "number"])
    if kind == "nasty":
        parent[key] = copy.deepcopy(chance.choice(NASTY))
    elif kind == "drop":
        del parent[key]
    elif kind == "wrap":
        parent[key] = chance.choice([[old], {"x": old}, str(old)])
    elif kind == "deep":
        for _ in range(chance.choice([3, 20, 40, 400])):
            old = chance.choice([[old], {"x": old}])
        parent[key] = old
    elif kind == "other":
        source, place = chance.choice(places)
        parent[key] = copy.deepcopy(source[place]) if isinstance(source, list) or place in source else None
    elif isinstance(old, int | float) and not isinstance(old, bool):
        parent[key] = chance.choice([old + 1, old - 1, -old, old * 2, float(old), str(old)])
    return f"{kind} {str(key)[:40]!r}"


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, dict):
        for key in list(tree):
            yield tree, key
            yield from _places(tree[key])
    elif isinstance(tree, list):
        for index in range(len(tree)):
            yield tree, index
            yield from _places(tree[index])


def spoil_text(text: str, chance: random.Random) -> bytes:
    """The same value, or nearly, in a text that JSON readers do not agree on."""
    kinds = ["twice", "nan", "huge", "digits", "utf16", "bom", "comment", "tail", *["plain"] * 4]
    kind = chance.choice(kinds)
    if kind == "twice":
        text = text.replace('"', '"name": "evil", "', 1)
        text = text.replace("{", '{"schema": 1, "sha256": "x", ', 1)
    elif kind in ("nan", "huge", "digits"):
        word = {"nan": "NaN", "huge": "1e999", "digits": "9" * chance.choice([50, 5000])}[kind]
        text = text.replace(": 1", f": {word}", 1)
    elif kind in ("comment", "tail"):
        text = f"/* */{text}" if kind == "comment" else f"{text} {text}"
    return text.encode("utf-16" if kind == "utf16" else "utf-8-sig" if kind == "bom" else "utf-8")


def bomb(root: Path, good: Good, chance: random.Random) -> str:
    """As much as a file may hold, of what becomes large in memory."""
    size = chance.choice([1 << 20, 1 << 23, (1 << 26) - 100])
    pieces = [b"[],", b"{},", b"1,", b"1.5,", b'"ab",', b"\n", b"{}\n", b'{"a":1}\n', b"[", b'{"a":', b" "]
    piece = chance.choice(pieces)
    name = chance.choice([n for n in good.files if n.startswith("runs/")])
    data = b'{"header": [' + piece * (size // len(piece))
    if piece.endswith(b","):
        data = data[:-1] + b"]}"
    if chance.random() < 0.3:
        body = json.loads(good.files[next(n for n in good.files if n.endswith(".json") and n.startswith("runs/"))])
        body["header"]["versions"] = {str(i): "x" for i in range(chance.choice([10_000, 1_000_000]))}
        data = json.dumps(seal(body)).encode()
    (root / name).write_bytes(data)
    return f"{name}: {len(data)} bytes of {piece!r}"


# --- what users do ---------------------------------------------------------------------------------------------------


class Wrong(Exception):
    """Something came out that must not."""


def is_whole(store: Store, name: str) -> bool:
    """Whether an object is what was written; what is not is made again when its run is continued."""
    try:
        return bool(read_object(store.root, name, "cpu"))
    except StoreError:
        return False


class Oracle:
    """Does with a store what users do, and judges what comes out.

    exact  whether only what was written may come out
    mends  whether what is damaged is made again, and the rest done with what came of that
    """

    def __init__(self, good: Good, root: Path, exact: bool, mends: bool) -> None:
        self.good, self.root, self.exact, self.mends = good, root, exact, mends
        self.counts: Counter[str] = Counter()

    def judge(self, call: Callable[[], Any]) -> Any:
        """What the call gives; None if it is refused as it should be."""
        try:
            result = call()
        except PifaError as error:
            self.counts["refused"] += 1
            text = str(error)
            names = [str(self.root), *self.good.runs, *(r.name for run in self.good.runs.values() for r in run.layers)]
            if not any(name in text for name in names) and not text.startswith(("layer ", "run ", "member ")):
                raise Wrong(f"names neither layer nor run nor file: {text[:200]}") from error
            if len(text) > 20_000:
                raise Wrong(f"a message of {len(text)} characters") from error
            return None
        self.counts["served"] += 1
        return result

    def everything(self) -> None:
        store = self.judge(lambda: Store(self.root))
        if store is None:
            return
        for run in self.judge(store.runs) or []:
            self.run(store, run)
        self.judge(lambda: verify(store, model=self.good.model))
        for run_id in self.good.runs:
            if (run := self.judge(lambda run_id=run_id: store.run(run_id))) is not None:
                self.run(store, run)
        self.choose(store)
        if self.mends:
            self.mend(store)
        self.scratch(store)
        self.go_on(store)
        self.sweep(store)

    def run(self, store: Store, run: Run) -> None:
        wanted = self.good.runs.get(run.run_id)
        if self.exact:
            known = wanted is not None and run.header == wanted.header and run.complete == wanted.complete
            if wanted is None or not known or run.layers != wanted.layers[: len(run.layers)]:
                raise Wrong(f"run {run.run_id} is not the one that was written")
            if run.complete and len(run.layers) < len(wanted.layers):  # of a journal the end may be cut off
                raise Wrong(f"run {run.run_id} has lost layers that were finished")
        json.dumps([run_summary(run), describe(run), run.totals, run.density_all], allow_nan=False)
        render_run(run)
        for record in run.layers:
            if record.object is not None:
                factors = self.judge(lambda record=record: store.factors(record))
                if factors is not None:
                    self.factors(run, record.name, record.shape, factors)

    def factors(self, run: Run, layer: str, shape: tuple[int, int], factors: Factors) -> None:
        wanted = self.good.factors.get((run.run_id, layer))
        if self.exact and not (wanted is not None and same(factors, wanted)):
            raise Wrong(f"other factors of {layer} in run {run.run_id}")
        order = sorted(factors.row_order.tolist()) if isinstance(factors, PifaFactors) else list(range(shape[0]))
        if factors.shape != shape or order != list(range(shape[0])) or not bool(factors.weight().isfinite().all()):
            raise Wrong(f"what is served for {layer} are no factors")

    def choose(self, store: Store) -> None:
        weights = [w.parameter.detach() for w in linear_weights(self.good.model)]
        for density in (0.6, None):
            self.judge(lambda density=density: choose_run(store, digest_many(weights), Settings(density=density)))
        for run_id, wanted in self.good.outputs.items():
            y = self.judge(lambda run_id=run_id: prepared_output(self.good, store, run_id))
            if y is not None and (y.shape != wanted.shape or (self.exact and not torch.equal(y, wanted))):
                raise Wrong(f"the model with run {run_id} computes something else")

    def mend(self, store: Store) -> None:
        """What is made again is served from then on, the same as what was lost."""
        for run_id, wanted in self.good.outputs.items():
            lost = self.judge(lambda run_id=run_id: unreadable(store, store.run(run_id)))
            y = self.judge(lambda run_id=run_id: prepared_output(self.good, store, run_id, "recompute"))
            if not lost or y is None:
                continue
            self.counts["mended"] += 1
            if y.shape != wanted.shape or (self.exact and not torch.equal(y, wanted)):
                raise Wrong(f"the model with run {run_id}, made again, computes something else")
            self.run(store, store.run(run_id))
            if not torch.equal(prepared_output(self.good, store, run_id), y):
                raise Wrong(f"run {run_id} was made again, and is served as something else")

    def scratch(self, store: Store) -> None:
        (run_id,) = set(self.good.runs) - set(self.good.outputs)
        found = self.judge(lambda: Scratch(store.root, run_id).get("part"))
        if found is not None and not all(torch.equal(found[0][name], t) for name, t in self.good.scratch.items()):
            raise Wrong("the scratch file gives other tensors")

    def go_on(self, store: Store) -> None:
        """Continue a run: what it had is there, and can be read again afterwards."""
        for run_id, wanted in self.good.runs.items():
            before = self.judge(lambda run_id=run_id: store.run(run_id))
            done = self.judge(lambda wanted=wanted: enter(store, wanted))
            if done is None:
                continue
            there = [r for r in (before.layers if before else ()) if r.object is None or is_whole(store, r.object)]
            if any(done.get(record.name) != record for record in there if self.exact):
                raise Wrong(f"run {run_id} has lost layers by being continued")
            if self.judge(lambda run_id=run_id: store.run(run_id)) is None:
                raise Wrong(f"run {run_id} cannot be read after it was continued")

    def sweep(self, store: Store) -> None:
        """Garbage collection takes nothing that a run needs."""

        def lost() -> set[tuple[str, str, str]]:
            return {found for run in store.runs() for found in unreadable(store, run)}

        before = self.judge(lost)
        swept = before is not None and self.judge(lambda: store.gc(min_age=-1)) is not None
        if swept and (gone := lost() - before):
            raise Wrong(f"garbage collection has removed what a run needs: {sorted(gone)}")


def unreadable(store: Store, run: Run) -> set[tuple[str, str, str]]:
    """(run, layer, object) of each layer whose factors are not served."""
    found = set()
    for record in run.layers:
        try:
            if record.object is not None:
                store.factors(record)
        except StoreError:
            found.add((run.run_id, record.name, str(record.object)))
    return found


def enter(store: Store, run: Run) -> dict[str, Any]:
    with store.write_run(run.header) as writer:
        return dict(writer.done)


def same(a: Factors, b: Factors) -> bool:
    one, other = a.tensors(), b.tensors()
    scales = [f.y_scale for f in (a, b) if not isinstance(f, PairFactors)]
    equal = one.keys() == other.keys() and all(
        t.dtype == other[name].dtype and torch.equal(t, other[name]) for name, t in one.items()
    )
    return type(a) is type(b) and len(set(scales)) <= 1 and equal


# --- rounds ----------------------------------------------------------------------------------------------------------

EXECUTING = ("exec", "compile", "pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "import")
EXECUTING += ("subprocess.Popen", "socket.connect", "ctypes.dlopen", "marshal.loads")
CHANGING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate")


class Sentry:
    """Watches what Python does, by its audit events; cannot be taken away from a process again."""

    def __init__(self, root: Path) -> None:
        self.root, self.on = f"{root}{os.sep}", False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in EXECUTING:
            self.seen.append(f"{event} {str(arguments)[:200]}")
        elif event in CHANGING or (event == "open" and isinstance(arguments[2], int) and arguments[2] & 3):
            for path in arguments[: 2 if event == "os.rename" else 1]:
                if isinstance(path, str | bytes | Path) and not self._is_inside(os.fsdecode(path)):
                    self.seen.append(f"{event} {path!r}")

    def _is_inside(self, path: str) -> bool:
        return f"{path}{os.sep}".startswith(self.root)


@dataclass
class Findings:
    """What went wrong, by where it did: (first round, what was done, text)."""

    rounds: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    grown: int = 0


def fuzz(kinds: tuple[str, ...], first: int, rounds: int | None, seconds: float, folder: Path) -> Findings:
    root = folder.resolve() / "a störe"
    good = make_good(root)
    (outside(root)).mkdir()
    victim = outside(root) / "victim"
    victim.write_text("not to be touched")
    found, sentry, end = Findings(), Sentry(root), time.monotonic() + seconds
    attacks = {"damage": damage, "hostile": hostile}
    Oracle(good, root, exact=True, mends=False).everything()  # a good store is served
    for path in (root / "objects").rglob("*.safetensors"):
        path.unlink()
    oracle = Oracle(good, root, exact=True, mends=True)
    oracle.everything()  # and made again where nothing is left; all is imported now
    assert oracle.counts["mended"] == len(good.outputs)
    restore(root, good)
    floor = _most_memory()
    number = first
    while number - first < rounds if rounds is not None else time.monotonic() < end:
        kind = kinds[number % len(kinds)]
        chance = random.Random(f"{kind} {number}")
        done = f"{kind}: {attacks[kind](root, good, chance)}"
        oracle = Oracle(good, root, exact=kind == "damage", mends=number // len(kinds) % 2 == 1)
        sentry.on = True
        try:
            oracle.everything()
        except Exception as error:
            sentry.on = False
            text = "".join(traceback.format_exception(error))
            place = f"{type(error).__name__} {traceback.extract_tb(error.__traceback__)[-1].name} {str(error)[:60]}"
            found.wrong.setdefault(place, (number, done, text))
        sentry.on = False
        if sentry.seen:
            found.wrong.setdefault(sentry.seen[0], (number, done, "\n".join(sentry.seen)))
            sentry.seen.clear()
        if victim.read_text() != "not to be touched" or len(list(outside(root).iterdir())) != 1:
            found.wrong.setdefault("outside", (number, done, "a file outside of the store has changed"))
        found.counts += oracle.counts
        found.grown = max(found.grown, _most_memory() - floor)
        if found.grown > MEMORY:
            found.wrong.setdefault("memory", (number, done, f"{found.grown >> 20} MB"))
        restore(root, good)
        number += 1
    found.rounds = number - first
    return found


def _most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def restore(root: Path, good: Good) -> None:
    shutil.rmtree(root, ignore_errors=True)
    for name, data in good.files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def main() -> int:
    parser = argparse.ArgumentParser(description="Attack a store at random.")
    parser.add_argument("--seconds", type=float, default=60.0, help="default: 60")
    parser.add_argument("--rounds", type=int, help="instead of a time")
    parser.add_argument("--first", type=int, default=0, help="number of the first round, which determines it")
    parser.add_argument("--kind", choices=("damage", "hostile"), help="default: both in turns")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()
    warnings.simplefilter("ignore")  # of runs that cannot be read
    kinds = ("damage", "hostile") if options.kind is None else (options.kind,)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # nothing need survive, and a disk would be slow
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        found = fuzz(kinds, options.first, options.rounds, options.seconds, Path(folder))
    for place, (number, done, text) in found.wrong.items():
        print(f"\n=== round {number}: {place}\n{done}\n{text}")
    print(f"{found.rounds} rounds: {dict(found.counts)}, {found.grown >> 20} MB grown, {len(found.wrong)} findings")
    return 1 if found.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
