"""One layer's tensors as a safetensors file whose name is the sha256 of its bytes.

Writing leaves the format to safetensors. Reading is done here, because safetensors reads a file by mapping it, so that
the bytes that are hashed and the bytes that are used could differ, or parses a copy in memory, which takes twice the
memory and three times the time. Here every byte goes from the file into the tensor that is returned, once, and is
hashed there by a second thread.

Whoever wants the tensors has every byte verified, each time. Whoever only asks whether an object is whole is answered
from memory where this process has verified its file and it has not been written to since.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pifa_compile.digest import memory_of
from pifa_compile.errors import DamagedError, FactorFormatError, StoreAccessError
from pifa_compile.store import files
from pifa_compile.store.json_text import parse

FACTOR_FORMATS = frozenset({"float"})  # pivot rows, coefficients and row order, or a pair, in floating point
MAX_HEADER = 1 << 20  # bytes; the header of one layer has a few hundred
MAX_OBJECT = 1 << 36  # bytes; no layer is that large
_STEP = 1 << 23  # bytes that are read before they are handed to the hashing thread
#: Nanoseconds that a file must have been left alone before a read of it is remembered: the clock of a file system is
#: coarse (4 ms on Linux, 2 s at worst), and a second change in the same tick would look like the first.
SETTLED = 3_000_000_000
_Stamp = tuple[int, int, int, int, int]
_WHOLE: dict[Path, _Stamp] = {}  # the files that were verified in this process, as they were then
# Safetensors writes several metadata keys in random order: one key, so that equal content is equal bytes.
_METADATA_KEY = "pifa_compile"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CURE = (
    "compress again with the same recipe and text, which makes only what is damaged or missing anew; "
    "of a run that a first call made, remove the run with Store.delete_run, and call again"
)


class _Entry(NamedTuple):
    """Where a tensor lies in a file: ``begin`` and ``end`` count from the end of the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def object_path(root: Path, digest: str) -> Path:
    """The place of the object with this digest (64 hex digits, validated by the caller)."""
    return root / "objects" / digest[:2] / f"{digest}.safetensors"


def write_object(root: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write an object and return its digest. Equal content has one digest, and replaces a damaged file of that name.

    ``metadata`` must name a "factor_format" out of FACTOR_FORMATS. ValueError if not, or if the header gets too long.
    """
    if metadata.get("factor_format") not in FACTOR_FORMATS:
        raise ValueError(f"metadata['factor_format'] must be one of {sorted(FACTOR_FORMATS)}")
    text = json.dumps(dict(metadata), sort_keys=True)
    if len(text) > MAX_HEADER // 2:
        raise ValueError(f"metadata of {len(text)} characters is longer than the {MAX_HEADER // 2} allowed")
    plain = {name: t.detach().contiguous() for name, t in tensors.items()}
    with files.temporary(root, root / "objects") as new:
        with files.access(new):
            _save(plain, new, text)
            with new.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        files.settle(root, new, object_path(root, digest))
    return digest


def _save(tensors: dict[str, Tensor], path: Path, metadata: str) -> None:
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)  # what the umask allows
    try:
        save_file(tensors, path, {_METADATA_KEY: metadata})
    except SafetensorError as error:  # how safetensors reports a full disk
        raise StoreAccessError(path, error) from error
    path.chmod(mode)  # some versions of safetensors leave a file that only its owner can read


def read_object(
    root: Path, digest: str, device: torch.device | str, limit: int = MAX_OBJECT
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of an object whose bytes, ``limit`` at most, have this digest.

    Raises DamagedError if they do not or if it is missing, FactorFormatError if a newer version wrote it.
    """
    path = object_path(root, digest)
    _WHOLE.pop(path, None)  # whatever is wrong with it now is not to be forgotten
    try:
        with files.opened(root, path, min(limit, MAX_OBJECT)) as (file, size), files.access(path):
            before = _stamp(file)
            tensors, metadata, found = _read(path, file, size)
            after = _stamp(file)
    except FileNotFoundError as error:
        raise DamagedError(path, "it is missing", CURE) from error
    if found != digest:
        raise DamagedError(path, "its content is not what its name says", CURE)
    if before == after and time.time_ns() - max(after[-2:]) > SETTLED:
        _WHOLE[path] = after
    if metadata.get("factor_format") not in FACTOR_FORMATS:
        raise FactorFormatError(path, metadata.get("factor_format"), FACTOR_FORMATS)
    return {name: t.to(device) for name, t in tensors.items()}, metadata


def is_whole(root: Path, digest: str) -> bool:
    """Whether an object is there and is what was written. It is read, unless this process has verified its file and
    that has not changed since: neither its size, nor a time of it, nor which file it is.

    The time of the last change cannot be set by whoever writes to a file, as that of the last writing can.
    """
    path = object_path(root, digest)
    if path in _WHOLE:
        try:
            with files.opened(root, path, MAX_OBJECT) as (file, _):
                if _WHOLE.get(path) == _stamp(file):
                    return True
        except (FileNotFoundError, DamagedError):
            return False
    try:
        read_object(root, digest, "cpu")
    except DamagedError:
        return False
    except FactorFormatError:  # whole, but not for this version to judge
        pass
    return True


def _stamp(file: FileIO) -> _Stamp:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read(path: Path, file: FileIO, size: int) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Tensors, metadata and sha256 of a file; nothing of it may be used before the sha256 is compared."""
    sha = hashlib.sha256()
    header = _read_header(path, file, size)
    sha.update(struct.pack("<Q", len(header)) + header)
    entries, metadata = _parse_header(path, header, size - 8 - len(header))
    tensors = {}
    with ThreadPoolExecutor(1, thread_name_prefix="pifa-verify") as pool:
        for entry in entries:
            tensors[entry.name] = t = _memory(path, entry)
            for piece in _pieces(t):
                _fill(path, file, piece)
                pool.submit(sha.update, piece)
    return tensors, metadata, sha.hexdigest()


def _memory(path: Path, entry: _Entry) -> Tensor:
    try:
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    except (RuntimeError, MemoryError) as error:
        size = entry.end - entry.begin
        raise DamagedError(path, f"there is no memory for the {size} bytes of {entry.name[:80]!r}", CURE) from error


def _read_header(path: Path, file: FileIO, size: int) -> bytes:
    prefix = file.read(8) or b""
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise DamagedError(path, f"a header of {length} bytes in a file of {size} is impossible", CURE)
    return file.read(length) or b""


def _pieces(t: Tensor) -> Iterator[memoryview]:
    """The memory of a contiguous tensor in steps."""
    memory = memoryview(memory_of(t))
    for start in range(0, len(memory), _STEP):
        yield memory[start : start + _STEP]


def _fill(path: Path, file: FileIO, piece: memoryview) -> None:
    filled = 0
    while filled < len(piece):
        count = file.readinto(piece[filled:])
        if not count:
            raise DamagedError(path, "it ends too early", CURE)
        filled += count


def _parse_header(path: Path, header: bytes, data_size: int) -> tuple[list[_Entry], dict[str, str]]:
    """What lies where, in the order of the file; DamagedError unless tensors fill the file without gap or overlap."""
    try:
        fields = parse(header)
        metadata = _metadata(fields.pop("__metadata__"))
        entries = sorted((_entry(name, field) for name, field in fields.items()), key=lambda e: (e.begin, e.end))
        ends = [0, *(entry.end for entry in entries)]
        if [entry.begin for entry in entries] != ends[:-1] or ends[-1] != data_size:
            raise ValueError("the tensors do not fill the file")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise DamagedError(path, f"its header is wrong ({reason})", CURE) from error
    return entries, metadata


def _metadata(field: Any) -> dict[str, str]:
    metadata = parse(field[_METADATA_KEY].encode())
    if not all(isinstance(value, str) for value in metadata.values()):
        raise TypeError("metadata are not strings")
    return dict(metadata)


def _entry(name: str, field: Any) -> _Entry:
    dtype, shape, (begin, end) = _DTYPES[field["dtype"]], tuple(field["shape"]), field["data_offsets"]
    if len(shape) > 8 or not all(type(value) is int and 0 <= value <= MAX_OBJECT for value in (*shape, begin, end)):
        raise ValueError(f"{name!r} has an impossible shape or place")
    if math.prod(max(size, 1) for size in shape) > MAX_OBJECT:  # an empty tensor, of more rows than torch can count
        raise ValueError(f"{name!r} has an impossible shape")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} is {shape} of {dtype} in {end - begin} bytes")
    return _Entry(name, dtype, shape, begin, end)
