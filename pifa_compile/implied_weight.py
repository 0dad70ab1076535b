"""What a factored layer gives as its ``weight``: a tensor without memory, computed where somebody computes with it.

Models look at the weights of their layers: T5 casts to the dtype of one, others ask for a device, and PyTorch's own
attention multiplies by one without calling the layer. All of that goes on as with a dense layer; only to write to it is
refused, since nothing would come of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx.node import map_aggregate

from pifa_compile import _torch
from pifa_compile.errors import ImpliedWeightError


class ImpliedWeight(Tensor):
    """A weight of known shape, dtype and device, whose content ``compute()`` gives, anew at each use."""

    compute: Callable[[], Tensor]
    _is_hf_initialized = True  # transformers, which asks, must not draw it at random

    @staticmethod
    def of(shape: tuple[int, ...], like: Tensor, compute: Callable[[], Tensor]) -> ImpliedWeight:
        """A weight of this shape in the dtype and on the device of ``like``."""
        made: ImpliedWeight = _torch.tensor_without_memory(ImpliedWeight, shape, like)
        made.compute = compute
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name
        if attribute in _FACTS:
            return _torch.as_plain_tensor(func, args, kwargs or {})
        changed = args[:1] or tuple((kwargs or {}).values())
        if _writes(attribute) and any(isinstance(value, cls) for value in changed):
            raise ImpliedWeightError(attribute)
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given: Any = map_aggregate((args, kwargs or {}), lambda v: v.compute() if isinstance(v, cls) else v)
        return func(*given[0], **given[1])


#: What is known without the content.
_FACTS = frozenset(
    {"dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_leaf", "grad", "grad_fn", "is_cuda", "is_cpu"}
    | {"is_meta", "is_sparse", "is_quantized", "is_nested", "names", "size", "dim", "numel", "element_size", "__len__"}
    | {"is_floating_point", "is_complex", "is_inference", "nbytes", "itemsize", "stride", "is_contiguous", "__hash__"}
)


def _writes(name: str) -> bool:
    """Whether a function of this name changes its first argument, or hands it out to be changed."""
    inplace = name.endswith("_") and not name.endswith("__")
    return inplace or name in ("data", "__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")
