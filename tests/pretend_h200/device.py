"""A context in which torch, Inductor and Triton find one H200. Code can be generated; nothing can be launched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

CAPABILITY = (9, 0)
PROCESSORS = 132
NAME = "NVIDIA H200"
PROPERTIES = SimpleNamespace(
    name=NAME,
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=PROCESSORS,
    total_memory=141 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    clock_rate=1980000,
    memory_clock_rate=3201000,
    memory_bus_width=5120,
    gcnArchName="",
)


def target() -> Any:
    """What Triton compiles for."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)


class Driver:
    """The part of a Triton driver that is asked for before anything is launched."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> Any:
        return target()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return CAPABILITY


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **keywords: value


@contextmanager
def pretend_h200() -> Iterator[None]:
    """Enter the context; everything is as before when it is left."""
    import torch._inductor.utils as inductor_utils
    import torch._subclasses.fake_tensor as fake_tensor
    import torch.utils._triton as triton_utils
    import triton
    from torch._dynamo import device_interface
    from torch._inductor.runtime import hints, triton_helpers

    device_interface.init_device_reg()
    cuda = device_interface.CudaInterface
    answers: list[tuple[Any, dict[str, Any]]] = [
        (
            torch.cuda,
            {
                "is_available": True,
                "device_count": 1,
                "current_device": 0,
                "get_device_properties": PROPERTIES,
                "get_device_capability": CAPABILITY,
                "get_device_name": NAME,
                "is_initialized": True,
                "is_bf16_supported": True,
                "is_tf32_supported": True,
                "synchronize": None,
                "_lazy_init": None,
            },
        ),
        (
            cuda,
            {
                "is_available": True,
                "device_count": 1,
                "current_device": 0,
                "get_compute_capability": 90,
                "get_device_properties": PROPERTIES,
                "is_triton_capable": True,
                "raise_if_triton_unavailable": None,
                "is_bf16_supported": True,
            },
        ),
        (cuda.Worker, {"get_device_properties": PROPERTIES, "current_device": 0}),
        (fake_tensor, {"init_gpu_context": None}),  # it would allocate a byte
        (triton_helpers, {"set_driver_to_gpu": None}),
        (
            inductor_utils,
            {"get_max_num_sms": PROCESSORS, "is_big_gpu": True, "get_gpu_type": "cuda"},
        ),
    ]
    with ExitStack() as stack:
        for owner, methods in answers:
            for name, answer in methods.items():
                function: Any = staticmethod(_always(answer)) if isinstance(owner, type) else _always(answer)
                stack.enter_context(mock.patch.object(owner, name, function, create=True))
        stack.enter_context(mock.patch.object(torch.version, "cuda", torch.version.cuda or "13.0"))
        driver, active = triton.runtime.driver, getattr(triton.runtime.driver, "_active", None)
        driver.set_active(Driver())
        stack.callback(lambda: setattr(driver, "_active", active))
        for remembered in (hints.DeviceProperties.create, triton_utils.has_triton):
            remembered.cache_clear()
            stack.callback(remembered.cache_clear)
        yield
