"""Our C++ for CPUs: compiled by Inductor's compiler for this machine at its first use, and kept in Inductor's cache."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pifa_compile import _torch

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cpu"


@functools.cache
def begin(name: str, kind: str = "") -> Future[ctypes.CDLL | None]:
    """Have ``library(name, kind)`` compiled by a thread: a cold compilation of a graph has another core to spare."""
    _torch.find_cpp_flags()  # in the caller's thread, which may look as well
    return _COMPILER.submit(_compiled, name, kind)


def library(name: str, kind: str = "") -> ctypes.CDLL | None:
    """The compiled library of ``cpu/<name>.cpp``; None, and one line in the log, where it cannot be compiled.

    kind  what KIND stands for in the source
    """
    return begin(name, kind).result()


def _compiled(name: str, kind: str) -> ctypes.CDLL | None:
    try:
        return _torch.compile_cpp(_whole(name, kind))
    except Exception as error:  # compilers fail in many ways, and whatever it was, there is a slower form
        log.warning("kernels/cpu/%s.cpp cannot be compiled, layers take slower forms: %s", name, error)
        return None


_COMPILER = ThreadPoolExecutor(1, "pifa-cpp")


def function(
    compiled: ctypes.CDLL | None, entry: str, argtypes: tuple[Any, ...], restype: Any = None
) -> Callable[..., Any] | None:
    """An entry of a library; None where the library, or the entry on this processor, cannot be had."""
    found = getattr(compiled, entry, None)
    if found is not None:
        found.argtypes, found.restype = argtypes, restype
    return found


def _whole(name: str, kind: str) -> str:
    """The source with its own header in it, and the processor: Inductor's cache knows a source by its text alone."""
    text = (SOURCES / f"{name}.cpp").read_text(encoding="utf-8")
    text = text.replace('#include "numbers.h"', (SOURCES / "numbers.h").read_text(encoding="utf-8"))
    text = f"// for {' '.join(sorted(_torch.cpu_instructions()))}\n{text}"
    return f"#define KIND {kind}\n{text}" if kind else text


def define(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator ``pifa::<name>`` of CPU tensors, defined once per process."""
    if not hasattr(torch.ops.pifa, name):
        fragment = torch.library.Library("pifa", "FRAGMENT")
        fragment.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        fragment.impl(name, function, "CPU")
        torch.library.register_fake(f"pifa::{name}", fake, lib=fragment)
        _LIBRARIES.append(fragment)
    return getattr(torch.ops.pifa, name).default


_LIBRARIES: list[Any] = []  # a library unregisters its operators when it is collected
