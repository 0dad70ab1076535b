"""What ptxas and the SASS say of a kernel that is compiled for sm_90, without a driver."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pretend_h200.codegen import Kernel
from pretend_h200.device import target


@dataclass(frozen=True)
class Cubin:
    """Counts of one compiled kernel; stores by their SASS name, e.g. ``STG.E.128``."""

    registers: int
    spills: int
    shared_bytes: int
    wgmma: int
    mma: int
    async_copies: int
    tma_loads: int
    stores: dict[str, int]
    lanes: list[int]  # of a warp, over the dimensions of what the last store writes
    waits: int  # for the kernel ahead
    triggers: int  # of the kernel behind
    sass: str


def compile_kernel(kernel: Kernel) -> Cubin:
    """Compile a kernel of a generated program for the pretended device."""
    import triton
    from torch._inductor.codecache import PyCodeCache
    from triton.compiler import ASTSource

    function = getattr(PyCodeCache.load(kernel.source), kernel.name)
    names = list(kernel.signature)
    constants = {(names.index(name),): value for name, value in kernel.constants.items()}
    attributes = {(i,): [["tt.divisibility", 16]] for i in kernel.aligned}
    source = ASTSource(fn=function, signature=kernel.signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    compiled = triton.compile(source, target=target(), options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        sass = _output(tools / "nvdisasm", file.name)
    operations = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M))
    return Cubin(
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        spills=_count(operations, "STL") + _count(operations, "LDL"),
        shared_bytes=compiled.metadata.shared,
        wgmma=_count(operations, "HGMMA"),
        mma=_count(operations, "HMMA"),
        async_copies=_count(operations, "LDGSTS"),
        tma_loads=_count(operations, "UTMALDG"),
        lanes=_lanes(compiled.asm["ttgir"]),
        stores={name: count for name, count in sorted(operations.items()) if name.startswith("STG")},
        waits=_count(operations, "ACQBULK"),
        triggers=_count(operations, "PREEXIT"),
        sass=sass,
    )


def _lanes(ttgir: str) -> list[int]:
    (*_, layout) = re.findall(r"tt\.store .*, (#\w+)>", ttgir)
    found = re.search(rf"^{layout} = .*threadsPerWarp = \[([\d, ]+)\]", ttgir, re.M)
    return [int(number) for number in found.group(1).split(",")]


def _count(operations: Counter[str], name: str) -> int:
    return sum(count for full, count in operations.items() if full.split(".")[0] == name)


def _output(*command: object) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout
