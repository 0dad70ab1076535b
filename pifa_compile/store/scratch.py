"""What a run under way has computed and can compute again: too large for memory, and kept to go on after a kill.

The files have the names of leftovers, so that ``Store.gc`` removes those of a run that nobody continues. They are
not brought to the disk by force: after a power failure what is torn is seen, because everything is verified on read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pifa_compile.digest import digest_many
from pifa_compile.errors import DamagedError, StoreAccessError
from pifa_compile.store import files
from pifa_compile.store.json_text import canonical, parse

_CURE = "remove the file: what was in it is computed again"


class Scratch:
    """Named sets of tensors of one run, in files of a store. For whoever writes the run, alone."""

    def __init__(self, root: Path, run_id: str) -> None:
        self._root, self._folder = root, root / "scratch"
        self._start = f"{files.TEMPORARY}-{run_id}"

    def put(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
        """Write tensors, and facts as JSON, under a name; what had the name before is gone."""
        try:
            str(self._folder).encode()
        except UnicodeEncodeError as error:  # safetensors would write the file and not read it
            raise StoreAccessError(self._folder, "the name of the folder is not UTF-8") from error
        files.make_folder(self._root, self._folder)
        path, new = self._path(name), self._path(f"{name}.new")
        plain = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
        body = {"facts": dict(facts or {}), "tensors": dict(zip(plain, digest_many(list(plain.values())), strict=True))}
        with files.access(path):
            try:
                save_file(plain, new, {"body": json.dumps(body), "sha256": hashlib.sha256(canonical(body)).hexdigest()})
            except SafetensorError as error:  # how safetensors reports a full disk
                raise StoreAccessError(path, error) from error
            new.replace(path)

    def get(self, name: str, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and facts of a name. Raises DamagedError if they are not what was written, or missing."""
        path = self._path(name)
        if not path.is_file():
            raise DamagedError(path, "it is missing", _CURE)
        try:
            with files.access(path), safe_open(files.inside(self._root, path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
            body = parse(metadata["body"].encode())
            facts, digests = body["facts"], body["tensors"]
        except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise DamagedError(path, f"it cannot be read ({type(error).__name__}: {error})", _CURE) from error
        found = dict(zip(tensors, digest_many(list(tensors.values())), strict=True))
        if metadata.get("sha256") != hashlib.sha256(canonical(body)).hexdigest() or digests != found:
            raise DamagedError(path, "it is not what was written", _CURE)
        # Copied out of the mapping of the file, all of which would stay in memory as long as one of them does.
        return {key: t.to(device, copy=True) for key, t in tensors.items()}, facts

    def has(self, name: str) -> bool:
        """Whether there is such a name, whole or damaged."""
        return self._path(name).is_file()

    def drop(self, name: str) -> None:
        """Remove a name, if it is there."""
        with files.access(self._folder):
            self._path(name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all of the run."""
        with files.access(self._folder):
            for path in self._folder.glob(f"{self._start}~*"):
                path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{self._start}~{name}"
