"""Compile every Triton launch that a backend makes, for a GPU that need not be there.

A backend runs on meta tensors; each launch goes to Triton's own just-in-time compiler for a named
target instead of to a GPU, so signature, specialisation and options are those of a real launch.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton
from d2l_kernels import triton_support
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# bytes of shared memory that one program can have (CUDA C++ Programming Guide, table of compute
# capabilities: 163 KB on 8.0 and 227 KB on 9.0)
SHARED = {80: 163 << 10, 90: 227 << 10}


class Target:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@dataclass(frozen=True)
class Compiled:
    """One compiled launch and what it needs of a GPU."""

    name: str
    capability: int
    options: dict
    binary: object

    @cached_property
    def usage(self) -> dict[str, int]:
        """Read registers, stack, local and static shared memory from the cubin."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.binary.asm["cubin"])
            file.flush()
            command = [TOOLS / "cuobjdump", "-res-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        (line,) = (row for row in text.splitlines() if "REG:" in row)
        return {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}

    @property
    def shared(self) -> int:
        """Bytes of shared memory, dynamic and static."""
        return self.binary.metadata.shared + self.usage["SHARED"]

    @property
    def dots(self) -> set[str]:
        """Types of the operands of every matrix product that the kernel asks for."""
        products = re.findall(r"tt\.dot .*? : tensor<[\dx]*(\w+)>", self.binary.asm["ttir"])
        return set(products)

    @cached_property
    def tensor_core(self) -> str:
        """Name the tensor-core instructions of the machine code: HGMMA, HMMA or none."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.binary.asm["cubin"])
            file.flush()
            text = subprocess.run(
                [TOOLS / "nvdisasm", file.name], capture_output=True, text=True, check=True
            ).stdout
        return next((name for name in ("HGMMA", "HMMA") if name in text), "none")

    def __str__(self) -> str:
        return f"{self.name} for sm_{self.capability} {self.options}"


@contextmanager
def compiling(capability: int) -> Iterator[list[Compiled]]:
    """Compile instead of launching, inside a ``with`` block; yields the list that fills."""
    found: list[Compiled] = []

    def compile_only(kernel, grid, *args, **options):
        if 0 not in grid:
            binary = kernel.warmup(*args, grid=grid, **options)
            found.append(Compiled(kernel.__name__, capability, options, binary))

    launch, triton_support.launch = triton_support.launch, compile_only
    driver.set_active(Target(capability))
    try:
        yield found
    finally:
        triton_support.launch = launch
        driver.set_active(None)
