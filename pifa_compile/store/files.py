"""Files of a store: never outside its root, never half written under a final name."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from pifa_compile.errors import DamagedError, StoreAccessError

TEMPORARY = ".tmp"  # a name with this prefix, ours or that of safetensors, is a leftover once its process is gone


@contextmanager
def access(path: Path) -> Iterator[None]:
    """Errors of the disk become a StoreAccessError that names ``path``."""
    try:
        yield
    except (OSError, NotImplementedError) as error:  # the latter is how filelock says that there are no locks
        raise StoreAccessError(path, error) from error


def inside(root: Path, path: Path) -> Path:
    """``path`` with its links followed; DamagedError where they lead out of ``root`` (itself free of links)."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise DamagedError(path, str(error), "remove the link") from error
    if not real.is_relative_to(root):
        raise DamagedError(path, f"a link leads out of the store, to {real}", "replace it by what it points to")
    return real


@contextmanager
def opened(root: Path, path: Path, limit: int) -> Iterator[tuple[FileIO, int]]:
    """A regular file of at most ``limit`` bytes, for reading, and its size. FileNotFoundError passes through."""
    real = inside(root, path)
    try:  # O_NONBLOCK: a pipe of this name must not hold us up
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreAccessError(path, error) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError(path, "it is no regular file", "remove it")
        if status.st_size > limit:
            raise DamagedError(path, f"it has {status.st_size} bytes, more than the {limit} allowed", "remove it")
        yield FileIO(descriptor, closefd=False), status.st_size
    finally:
        os.close(descriptor)


def read(root: Path, path: Path, limit: int) -> bytes:
    """The bytes of a file that has at most ``limit`` of them. FileNotFoundError passes through."""
    with opened(root, path, limit) as (file, size), access(path):
        return file.readall() if size else b""


def make_folder(root: Path, folder: Path) -> None:
    """Make ``folder`` and its parents, none of them through a link that leads out of ``root``."""
    inside(root, folder)
    with access(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def temporary(root: Path, folder: Path) -> Iterator[Path]:
    """The name for a new file in ``folder``, for ``settle`` to move away; what is still there at the end is removed."""
    make_folder(root, folder)
    path = folder / f"{TEMPORARY}-{uuid.uuid4().hex}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def settle(root: Path, temporary_path: Path, path: Path) -> None:
    """Give a finished temporary file its final name, so that it is there whole or not at all after a crash."""
    make_folder(root, path.parent)
    with access(path):
        sync(temporary_path)
        temporary_path.replace(path)
    with suppress(OSError):  # not every network file system can sync a folder, and the content is safe
        sync(path.parent)


def write(root: Path, path: Path, data: bytes) -> None:
    """Write a whole file under ``path``, or nothing."""
    with temporary(root, path.parent) as new, access(path):
        new.write_bytes(data)
        settle(root, new, path)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
