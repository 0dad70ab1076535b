"""The factors this process has loaded, and tensors made of them: every caller gets the same ones."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from pifa_compile.digest import digest
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
            for gone in [known for known, other in _LOADED.items() if not (other.alive or _can_be_had(known, other))]:
                del _LOADED[gone]
            factors = _again(key, held) if held is not None else None
            if factors is None:
                factors = store.factors(record).to(dtype=dtype, device=device)
                if held is not None:  # a graph may have kept the coefficients
                    factors = replace(factors, **held.living())  # type: ignore[arg-type]
            _LOADED[key] = _Held(factors)
            _CONTENT.update({t: (*key, name) for name, t in factors.tensors().items()})
        return factors


def _again(key: _Key, held: _Held) -> Factors | None:
    """The factors, where all that is gone can be had back from what was derived of it; None where it cannot."""
    matrices = {name: t for name in held.names if (t := _had_back((*key, name), held.living().get(name))) is not None}
    return held.put_together(matrices) if len(matrices) == len(held.names) else None


def _can_be_had(key: _Key, held: _Held) -> bool:
    return any(_is_kept((*key, name)) for name in held.names)


def _is_kept(content: Hashable) -> bool:
    """Whether anything that was derived of this content is held."""
    made = _DERIVED_OF.get(content, {})
    return any((key in _DERIVED and _DERIVED[key]() is not None) or _is_kept(key) for key in made)


def _had_back(content: Hashable, living: Tensor | None) -> Tensor | None:
    """The tensor of this content: the living one, or a copy made of one that was derived of it; None if none is."""
    if living is not None:
        return living
    for key, back in _DERIVED_OF.get(content, {}).items():
        ref = _DERIVED.get(key)
        found = _had_back(key, None if ref is None else ref())
        if found is not None:
            with torch.inference_mode(False), torch.no_grad():
                return back(found)
    return None


def derived(
    label: str,
    sources: Sequence[Tensor],
    make: Callable[[], Tensor],
    back: Sequence[Callable[[Tensor], Tensor]] = (),
) -> Tensor:
    """``make()``, a tensor that ``label`` and the content of the sources determine; made once while somebody holds it.

    back  makes each of the first sources again from the derived tensor, exactly and as a copy

    So graphs that are compiled again share what the passes make of factors. It is an ordinary tensor also in
    inference mode, and the sources need not be kept for it.
    """
    with _LOCK:
        contents = [_content(t) for t in sources]
        key = (label, *contents)
        ref = _DERIVED.get(key)
        found = None if ref is None else ref()
        if found is None:
            for gone in [known for known, other in _DERIVED.items() if other() is None]:
                _forget(gone)
            with torch.inference_mode(False), torch.no_grad():
                found = make()
            _DERIVED[key], _CONTENT[found] = TensorWeakRef(found), key
            for content, function in zip(contents, back, strict=False):
                _DERIVED_OF.setdefault(content, {})[key] = function
        return found


def _forget(key: Hashable) -> None:
    """Let go of what is known of a derived tensor that nobody holds, unless another was derived of it."""
    if key in _DERIVED_OF:
        return
    del _DERIVED[key]
    for content in [content for content, made in _DERIVED_OF.items() if key in made]:
        del _DERIVED_OF[content][key]
        if not _DERIVED_OF[content]:
            del _DERIVED_OF[content]


def _content(tensor: Tensor) -> Hashable:
    """What stands for the tensor's content: where it was loaded from, what it was derived from, else its digest."""
    known = _CONTENT.get(tensor)
    return known if known is not None else (digest(tensor), str(tensor.device))


class _Held:
    """Factors for as long as somebody holds them or their matrices: a compiled graph keeps the matrices alone."""

    def __init__(self, factors: Factors) -> None:
        self._factors = weakref.ref(factors)
        tensors = factors.tensors()
        self._matrices = {name: TensorWeakRef(t) for name, t in tensors.items() if t.dim() == 2 and t.numel()}
        self._rest: dict[str, Tensor] = {name: t for name, t in tensors.items() if name not in self._matrices}
        self._y_scale = factors.y_scale if isinstance(factors, PifaFactors) else 1.0

    @property
    def names(self) -> frozenset[str]:
        """Of the matrices."""
        return frozenset(self._matrices)

    @property
    def alive(self) -> bool:
        return any(ref() is not None for ref in self._matrices.values())

    def living(self) -> dict[str, Tensor]:
        """The matrices that somebody holds, by name."""
        return {name: t for name, ref in self._matrices.items() if (t := ref()) is not None}

    def get(self) -> Factors | None:
        """The factors, put together again from their matrices if need be; None if one of these is gone."""
        factors = self._factors()
        if factors is None:
            found = self.living()
            if len(found) == len(self._matrices):
                factors = self.put_together(found)
                self._factors = weakref.ref(factors)
        return factors

    def put_together(self, matrices: dict[str, Tensor]) -> Factors:
        """The factors with these matrices and all else as it was."""
        return factors_from_tensors(matrices | self._rest, self._y_scale)


_Key = tuple[str, str | None, torch.dtype, str]
_LOCK = threading.Lock()
_LOADED: dict[_Key, _Held] = {}
_DERIVED: dict[Hashable, TensorWeakRef] = {}
_DERIVED_OF: dict[Hashable, dict[Hashable, Callable[[Tensor], Tensor]]] = {}  # and the way back, by content
_CONTENT: MutableMapping[Tensor, Hashable] = WeakTensorKeyDictionary()
