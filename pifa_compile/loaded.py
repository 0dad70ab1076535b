"""The factors this process has loaded: every caller gets the same tensors."""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from pifa_compile.factors import Factors, PifaFactors, factors_from_tensors
from pifa_compile.store import LayerRecord, Store


def shared_factors(store: Store, record: LayerRecord, dtype: torch.dtype, device: torch.device) -> Factors:
    """The verified factors of a record in ``dtype`` on ``device``, loaded at most once while somebody holds them.

    So a recompilation reads nothing again, and two graphs over one model hold its factors once.
    """
    key = (str(store.root), record.object, dtype, str(device))
    with _LOCK:
        held = _LOADED.get(key)
        factors = None if held is None else held.get()
        if factors is None:
            for gone in [known for known, other in _LOADED.items() if not other.alive]:
                del _LOADED[gone]
            factors = store.factors(record).to(dtype=dtype, device=device)
            _LOADED[key] = _Held(factors)
        return factors


class _Held:
    """Factors for as long as somebody holds them or their matrices: a compiled graph keeps the matrices alone."""

    def __init__(self, factors: Factors) -> None:
        self._factors = weakref.ref(factors)
        tensors = factors.tensors()
        self._matrices = {name: TensorWeakRef(t) for name, t in tensors.items() if t.dim() == 2 and t.numel()}
        self._rest: dict[str, Tensor] = {name: t for name, t in tensors.items() if name not in self._matrices}
        self._y_scale = factors.y_scale if isinstance(factors, PifaFactors) else 1.0

    @property
    def alive(self) -> bool:
        return all(ref() is not None for ref in self._matrices.values())

    def get(self) -> Factors | None:
        """The factors, put together again from their matrices if need be; None if one of these is gone."""
        factors = self._factors()
        if factors is None:
            found = {name: t for name, ref in self._matrices.items() if (t := ref()) is not None}
            if len(found) == len(self._matrices):
                factors = factors_from_tensors(found | self._rest, self._y_scale)
                self._factors = weakref.ref(factors)
        return factors


_LOCK = threading.Lock()
_LOADED: dict[tuple[str, str | None, torch.dtype, str], _Held] = {}
