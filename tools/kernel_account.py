"""What every variant of the Triton kernels costs on NVIDIA GPUs, compiled ahead of time: no GPU is needed.

Prints registers, spills, shared memory, tensor-core and asynchronous-copy instructions, and blocks per multiprocessor.
Exits with 1 when a default variant spills, does not fit, or has lost its tensor-core instructions.

    python tools/kernel_account.py [--arch 80 90 100] [--csv FILE]
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter replaces the functions that are compiled here

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minference_vllm.triton_kernels import sparse_attention

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Per multiprocessor: shared memory in bytes. All have 65,536 registers, 2,048 threads and 32 blocks.
SHARED_MEMORY = {80: 167936, 90: 233472, 100: 233472}
TENSOR_CORES = {80: r"HMMA", 90: r"HGMMA", 100: r"UTC\w*MMA"}


@dataclass(frozen=True)
class Account:
    kernel: str
    variant: str
    arch: int
    triton: str
    warps: int
    registers: int
    spill_loads: int
    spill_stores: int
    shared_kib: float
    tensor_core: int
    async_copies: int
    blocks_per_sm: int

    @property
    def problems(self) -> list[str]:
        found = []
        if self.spill_loads or self.spill_stores:
            found.append(f"spills {self.spill_loads}/{self.spill_stores}")
        if not self.tensor_core:
            found.append("no tensor-core instruction")
        if not self.blocks_per_sm:
            found.append("does not fit a multiprocessor")
        return found


def compile_kernel(function: Any, types: dict[str, str], constants: dict[str, Any], arch: int, **options: int) -> Any:
    """Compile one variant; a type ending in ``!``, and every pointer, is known to be divisible by 16."""
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        kind = types[name]
        if kind.endswith("!") or kind.startswith("*"):
            attributes[(position,)] = [["tt.divisibility", 16]]
        signature[name] = kind.rstrip("!")
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def account(kernel: str, variant: str, compiled: Any, arch: int) -> Account:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+)", usage)
    registers = int(found.group(1)) if found else 0
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    per_warp = -(-registers * 32 // 256) * 256
    fits = [65536 // max(1, per_warp * warps), SHARED_MEMORY[arch] // (shared + 1024), 2048 // (32 * warps), 32]

    def count(pattern: str) -> int:
        return len(re.findall(rf"\b{pattern}\b", code))

    return Account(
        kernel,
        variant,
        arch,
        triton.__version__,
        warps,
        registers,
        count("LDL"),
        count("STL"),
        round(shared / 1024, 1),
        count(TENSOR_CORES[arch]),
        count("LDGSTS"),
        min(fits),
    )


def sparse_attention_variants(arch: int) -> list[Account]:
    """The shapes that models use: head sizes, page sizes, element types."""
    function = sparse_attention.sparse_attention_kernel
    accounts = []
    for dtype, head_size, page in (("bf16", 64, 16), ("bf16", 128, 16), ("bf16", 128, 128), ("fp16", 128, 64)):
        pointers = {name: f"*{dtype}" for name in ("p_query", "p_key", "p_value", "p_out")}
        pointers |= {"p_lse": "*fp32", "p_pages": "*i64", "p_tile_starts": "*i64"}
        pointers |= {name: "*i32" for name in ("p_blocks", "p_num_blocks", "p_columns", "p_num_columns")}
        strides = {name: "i64!" for name in function.arg_names if name.startswith("stride_")}
        scalars = {"num_tiles": "i32", "num_rows": "i32", "max_blocks": "i32", "max_columns": "i32"}
        constants = {
            "GROUP": 4,
            "HEAD_SIZE": head_size,
            "D": head_size,
            "PAGE": page,
            "BLOCK_M": sparse_attention.BLOCK_M,
            "BLOCK_N": sparse_attention.key_block(arch // 10, head_size),
            "WITH_LSE": False,
        }
        compiled = compile_kernel(
            function,
            pointers | strides | scalars | {"scale_log2": "fp32"},
            constants,
            arch,
            num_warps=sparse_attention.NUM_WARPS,
            num_stages=sparse_attention.NUM_STAGES,
        )
        accounts.append(account("sparse_attention", f"{dtype} D={head_size} page={page}", compiled, arch))
    return accounts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=list(SHARED_MEMORY), default=list(SHARED_MEMORY))
    parser.add_argument("--csv", type=Path, default=None)
    args = parser.parse_args()
    rows = [row for arch in args.arch for row in sparse_attention_variants(arch)]
    for row in rows:
        verdict = ", ".join(row.problems) or "ok"
        print(
            f"{row.kernel:18s} {row.variant:20s} sm_{row.arch:<4d} regs {row.registers:3d} spills {row.spill_loads}/"
            f"{row.spill_stores} smem {row.shared_kib:6.1f}K tensor {row.tensor_core:3d} async {row.async_copies:3d} "
            f"blocks/SM {row.blocks_per_sm}  {verdict}"
        )
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(map(asdict, rows))
    return int(any(row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
