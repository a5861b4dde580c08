"""Registers, spills and matrix-product loops in the machine code of a compiled Triton kernel, and a model of the time
of such a loop.

The model: a step takes the cycles in which its warps issue their instructions, plus those of the tensor cores, plus the
stall for keys and values. Nothing overlaps: with one block per multiprocessor, which waits at its barriers, tensor
cores and the other units do not run at the same time. The model is accurate to plus or minus 30 %.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TENSOR_CORES = {80: "HMMA|IMMA", 90: "HGMMA|IGMMA", 100: r"UTC\w*MMA"}
"""Regular expressions of tensor-core instructions, by architecture."""
OF_FEW_ROWS = "HMMA|IMMA"
"""The same for products of fewer than 64 rows, on every architecture."""
SCHEDULERS, ISSUE = 4, 0.75
"""Schedulers per multiprocessor, and the share of cycles in which one issues an instruction."""
TENSOR_FLOPS = 4096
"""Per cycle and multiprocessor, 16-bit operands, sm_90."""
LATENCY = 1000
"""Latency of keys from global memory under load, in cycles."""


@dataclass(frozen=True)
class Loop:
    """One loop with tensor-core instructions."""

    instructions: int
    """Per warp and step."""
    buffers: int
    """Steps whose keys fit into shared memory; 1: no prefetching."""
    ahead: float
    """Steps between the copy of keys and the wait for them (from the depth of DEPBAR); 0: in the same step."""

    def rate(self, warps: int, flops: float) -> float:
        """Modelled FLOPs per cycle of one multiprocessor with one block; ``flops``: of one step of the block."""
        busy = self.instructions * warps / SCHEDULERS / ISSUE + flops / TENSOR_FLOPS
        return flops / (busy + max(0.0, LATENCY - self.ahead * busy))


@dataclass(frozen=True)
class MachineCode:
    registers: int
    spill_loads: int
    spill_stores: int
    loop_spills: int
    """Loads and stores in innermost loops, which run once per step; the others run once per program."""
    tensor_core: int
    async_copies: int
    loops: tuple[Loop, ...]
    """Innermost loops with tensor-core instructions, in order."""


def machine_code(compiled: Any, arch: int, few_rows: bool = False, with_loops: bool = True) -> MachineCode:
    """Analyse a kernel compiled by ``triton.compile``.

    Args:
        few_rows: its products have fewer than 64 rows.
        with_loops: False: do not look for loops, as for nested loops, which the compiler may restructure.
    """
    multiply = OF_FEW_ROWS if few_rows else TENSOR_CORES[arch]
    usage, code = _tool_says(compiled, "cuobjdump", "-res-usage"), disassembled(compiled)
    instructions, loops = innermost(code)
    registers = re.search(r"REG:(\d+)", usage)
    if not registers or not instructions:
        raise RuntimeError(f"{TOOLS} says nothing of this kernel: {usage}")

    def count(pattern: str, among: list[str] = instructions) -> int:
        return sum(bool(re.search(rf"\b({pattern})\b", one)) for one in among)

    bodies = [instructions[loop] for loop in loops]
    loop_spills = sum(count("LDL|STL", body) for body in bodies)
    bodies = [body for body in bodies if any(re.search(rf"\b({multiply})\b", one) for one in body)]
    bodies = bodies if with_loops else []
    buffers = buffers_of(compiled.asm["ttgir"], len(bodies)) if with_loops else []
    return MachineCode(
        int(registers.group(1)),
        count("LDL"),
        count("STL"),
        loop_spills,
        count(multiply),
        count("LDGSTS"),
        tuple(Loop(len(body), depth, ahead(body)) for body, depth in zip(bodies, buffers, strict=True)),
    )


def disassembled(compiled: Any) -> str:
    """The machine code of a kernel compiled by ``triton.compile``, as printed by ``nvdisasm``."""
    return _tool_says(compiled, "nvdisasm", "-c", "-ndf")


def _tool_says(compiled: Any, tool: str, *arguments: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(TOOLS / tool), *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def innermost(code: str) -> tuple[list[str], list[slice]]:
    """All instructions in the output of ``nvdisasm``, and the slices that are innermost loops."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label.group(1)] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            instructions.append(instruction.group(1))
    loops = []
    for place, text in enumerate(instructions):
        target = re.search(r"\bBRA\b.*`\((\.L\w+)\)", text)
        if target and labels[target.group(1)] <= place:
            loops.append((labels[target.group(1)], place))
    return instructions, [
        slice(first, last + 1)
        for first, last in loops
        if not any(first <= begin and end <= last and (begin, end) != (first, last) for begin, end in loops)
    ]


def ahead(body: list[str]) -> float:
    """``Loop.ahead`` of these instructions.

    Asynchronous copies form groups, one or more per step. A wait allows a given number of the latest groups to be
    pending.
    """
    groups = sum("LDGDEPBAR" in one for one in body)
    depths = [int(found.group(1), 16) for one in body if (found := re.search(r"DEPBAR\.LE SB0, (0x[0-9a-f]+)", one))]
    return min(depths) / groups if groups and depths else 0.0


def buffers_of(ttgir: str, loops: int) -> list[int]:
    """Buffers of each loop with a matrix product, from its allocation of shared memory ``[buffers, rows, columns]``."""
    found, buffers, loop = [], 1, None
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        if loop is None and re.search(r"\bscf\.for\b", line):
            loop, multiplies = indent, False
        elif loop is None and (shape := re.search(r"ttg\.local_alloc\b.*!ttg\.memdesc<(\d+)x\d+x\d+x", line)):
            buffers = int(shape.group(1))
        elif loop is not None:
            multiplies |= bool(re.search(r"\b(tt\.dot|\w+\.(warp_group_dot|tc_gen5_mma))\b", line))
            if indent == loop and line.lstrip().startswith("}"):
                loop = None
                if multiplies:
                    found.append(buffers)
                    buffers = 1
    if len(found) != loops:
        raise RuntimeError(f"{loops} loops with tensor-core instructions in machine code, {len(found)} in TTGIR")
    return found
