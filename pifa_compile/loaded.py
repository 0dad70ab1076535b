"""The factors this process has loaded: every caller gets the same tensors."""

from __future__ import annotations

import threading
import weakref
from collections.abc import MutableMapping

import torch

from pifa_compile.factors import Factors
from pifa_compile.store import LayerRecord, Store


def shared_factors(store: Store, record: LayerRecord, dtype: torch.dtype, device: torch.device) -> Factors:
    """The verified factors of a record in ``dtype`` on ``device``, loaded at most once while somebody holds them.

    So a recompilation reads nothing again, and two graphs over one model hold its factors once.
    """
    key = (str(store.root), record.object, dtype, str(device))
    with _LOCK:
        factors = _LOADED.get(key)
        if factors is None:
            factors = _LOADED[key] = store.factors(record).to(dtype=dtype, device=device)
        return factors


_LOCK = threading.Lock()
_LOADED: MutableMapping[tuple[str, str | None, torch.dtype, str], Factors] = weakref.WeakValueDictionary()
