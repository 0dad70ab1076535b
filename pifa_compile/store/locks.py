"""One writer per run, and none while the store is swept."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pifa_compile.errors import DamagedError, RunBusyError, StoreError
from pifa_compile.store import files

_SWEEP = ".sweep.lock"  # no run id begins with a dot
_log = logging.getLogger(__name__)


@contextmanager
def writing(root: Path, run_id: str) -> Iterator[None]:
    """Be the one writer of a run; waits for another to end, and for a sweep to end."""
    lock = _lock(root, f"{run_id}.lock")
    with files.access(Path(lock.lock_file)):
        if not _try(lock):
            _log.warning("waiting for %s, which is writing run %r", holder(root, run_id), run_id)
            _wait(lock, run_id)
    try:
        with files.access(root / "locks"), _lock(root, _SWEEP):
            pass
        files.write(root, _holder_path(root, run_id), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        lock.release()


@contextmanager
def idle(root: Path, run_id: str, wish: str) -> Iterator[None]:
    """Keep writers of a run away; RunBusyError, which tells the user's ``wish``, if there is one."""
    lock = _lock(root, f"{run_id}.lock")
    with files.access(Path(lock.lock_file)):
        if not _try(lock):
            raise RunBusyError(run_id, holder(root, run_id), wish)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def sweeping(root: Path) -> Iterator[None]:
    """Keep all writers away; RunBusyError if there is one.

    A writer takes its own lock first and the sweeper's lock after it, for a moment. So a writer that is not seen here,
    because it took its own lock later, waits for the sweeper's before it reads or writes anything.
    """
    sweep = _lock(root, _SWEEP)
    with files.access(Path(sweep.lock_file)):
        sweep.acquire()
    try:
        for path in sorted((root / "locks").glob("[!.]*.lock")):
            with idle(root, path.name.removesuffix(".lock"), "sweep the store"):
                pass
        yield
    finally:
        sweep.release()


def holder(root: Path, run_id: str) -> str:
    """Who writes the run, in words."""
    try:
        return files.read(root, _holder_path(root, run_id), 400).decode() or "another process"
    except (OSError, StoreError, UnicodeDecodeError):
        return "another process"


def _holder_path(root: Path, run_id: str) -> Path:
    # Beside the lock, not in it: some versions of filelock empty the lock file when they open it.
    return root / "locks" / f"{run_id}.holder"


def _lock(root: Path, name: str) -> FileLock:
    path = root / "locks" / name
    files.make_folder(root, path.parent)
    if path.is_symlink():  # to another lock, or to a file that locking would empty
        raise DamagedError(path, "a lock is no link", "remove the link")
    return FileLock(path, thread_local=False)


def _wait(lock: FileLock, run_id: str) -> None:
    try:
        lock.acquire()
    except RuntimeError as error:  # a deadlock, which filelock sees
        raise RunBusyError(run_id, "this very thread", "write it again") from error


def _try(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True
