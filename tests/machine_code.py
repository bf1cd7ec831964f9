"""What NVRTC makes of a kernel in CUDA C++: what it takes of a multiprocessor, its instructions."""

import re
import subprocess
from pathlib import Path

import triton

from mobilellm_fast.kernels.cuda_source import compile_source

REGISTERS = 65536  # of a multiprocessor
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class MachineCode:
    """A kernel, compiled and taken apart again.

    Args:
        source, constants, architecture: see `compile_source`.
        folder: for files.

    Attributes:
        used: by what `cuobjdump` calls it, `REG`, `STACK` and `LOCAL`: of a thread.
        arguments_nbytes: of each argument.
        text: as `nvdisasm` prints it.
        instructions: name and operands of each, in order.
    """

    def __init__(self, source, constants, architecture, folder):
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(compile_source(source, constants, architecture))
        usage = _run("cuobjdump", "-res-usage", cubin)
        self.used = {
            key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)
        }
        elf = _run("cuobjdump", "-elf", cubin)
        sizes = re.findall(r"Ordinal : 0x0\s+Offset  : 0x\w+\s+Size    : (0x\w+)", elf)
        self.arguments_nbytes = [int(size, 16) for size in sizes]
        self.text, self._name = _run("nvdisasm", cubin), source.stem
        self.instructions = re.findall(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*)", self.text, re.M
        )

    @property
    def names(self):
        """The instructions without their operands."""
        return [name for name, _ in self.instructions]

    @property
    def shared_nbytes(self):
        """Shared memory of a program, as the kernel says it."""
        place = self.text[self.text.index(f"{self._name}_shared_nbytes:") :]
        kind, numbers = re.search(r"\.(byte|word)\s+(.*)", place).groups()
        values = [int(value, 16) for value in re.findall(r"0x\w+", numbers)]
        return values[0] if kind == "word" else int.from_bytes(values[:4], "little")

    def check_registers(self, threads):
        """Hold it to spill nothing, and to leave registers for so many threads."""
        assert self.used["REG"] * threads <= REGISTERS
        assert self.used["STACK"] == self.used["LOCAL"] == 0


def _run(tool, *arguments):
    command = [_TOOLS / tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
