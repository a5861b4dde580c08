"""What every variant of the Triton kernels costs on NVIDIA GPUs, compiled ahead of time: no GPU is needed.

Prints registers, spills, shared memory, tensor-core and asynchronous-copy instructions, and blocks per multiprocessor.
Exits with 1 when a default variant spills, does not fit, or has lost its tensor-core instructions; the other variants
(rarer head sizes, soft cap and sinks, FP8 caches) are only shown, and only with --all.

    python tools/kernel_account.py [--arch 80 90 100] [--all] [--csv FILE]
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

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minference_vllm.patterns.kinds import LowRank
from minference_vllm.triton_kernels import antidiagonal, attention, column_diagonal, low_rank, page_means

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Per multiprocessor: shared memory in bytes. All have 65,536 registers, 2,048 threads and 32 blocks.
SHARED_MEMORY = {80: 167936, 90: 233472, 100: 233472}
TENSOR_CORES = {80: r"HMMA", 90: r"HGMMA", 100: r"UTC\w*MMA"}


@dataclass(frozen=True)
class Account:
    kernel: str
    variant: str
    default: bool
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
        if not self.tensor_core and self.kernel not in ("block_mean", "mass"):
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


def account(kernel: str, variant: str, default: bool, compiled: Any, arch: int) -> Account:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        code = subprocess.run([TOOLS / "nvdisasm", "-c", "-ndf", file.name], capture_output=True, text=True).stdout
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
        default,
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


@dataclass(frozen=True)
class Variant:
    """A shape that models use."""

    dtype: torch.dtype = torch.bfloat16
    head_size: int = 128
    page: int = 128
    fp8: bool = False
    extras: bool = False
    """Soft cap, sinks and log-sum-exp."""
    group: int = 4
    """Query heads per KV head."""
    packed: bool = False
    """Whether they share their lists."""

    @property
    def name(self) -> str:
        cache = " fp8 cache" if self.fp8 else ""
        extras = " cap+sinks+lse" if self.extras else ""
        packed = f" packed {self.group}" if self.packed else ""
        return f"{_SHORT[self.dtype]} D={self.head_size} page={self.page}{cache}{extras}{packed}"

    @property
    def constants(self) -> dict[str, Any]:
        compute, precision = attention.compute_type(self.dtype)
        return {
            "GROUP": self.group,
            "HEAD_SIZE": self.head_size,
            "D": triton.next_power_of_2(self.head_size),
            "PAGE": self.page,
            "COMPUTE": compute,
            "PRECISION": precision,
        }

    def types(self, function: Any) -> dict[str, str]:
        """Triton's names of the arguments' types; what is not listed is a length, int32."""
        query, cache = f"*{_SHORT[self.dtype]}", "*fp8e4nv" if self.fp8 else f"*{_SHORT[self.dtype]}"
        pointers = {"p_query": query, "p_out": query, "p_key": cache, "p_value": cache}
        pointers |= {"p_pages": "*i64", "p_tile_starts": "*i64", "p_bin_row": "*i64", "p_bins": "*u8"}
        floats = ("p_lse", "p_sinks", "p_mean", "p_scores", "p_weights", "p_mass")
        pointers |= {name: "*fp32" for name in floats}
        integers = ("p_blocks", "p_num_blocks", "p_columns", "p_num_columns", "p_heads", "p_rows", "p_lowest")
        pointers |= {name: "*i32" for name in integers}
        if function is column_diagonal.column_diagonal_kernel:
            pointers |= {"p_columns": "*fp32", "p_nearer": "*fp32", "p_farther": "*fp32"}
        scalars = {name: "fp32" for name in ("scale_log2", "softcap_log2", "value_scale", "key_scale")}
        strides = {name: "i64!" for name in function.arg_names if name.startswith("stride_")}
        return {name: "i32" for name in function.arg_names} | pointers | scalars | strides


_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16"}
DEFAULT = (
    Variant(head_size=64, page=16),
    Variant(page=16),
    Variant(page=128),
    Variant(torch.float16, page=64),
    Variant(page=16, packed=True),
    Variant(packed=True, group=7),
)
OTHERS = (
    Variant(head_size=96),
    Variant(head_size=256),
    Variant(extras=True),
    Variant(fp8=True),
    Variant(head_size=64, fp8=True),
    Variant(head_size=64, packed=True),
    Variant(head_size=256, packed=True),
    Variant(fp8=True, packed=True),
)
ESTIMATES = (Variant(page=16), Variant(page=128))
RANKS = {LowRank().rank: True, 16: False, 64: False}
"""Ranks, and whether they are the default."""
TILE, STRIDE = 128, 16
"""Rows of a query tile, and tokens of an antidiagonal's square: the defaults."""


def attention_account(variant: Variant, default: bool, arch: int) -> Account:
    function = attention.sparse_attention_kernel
    launch = attention.launch_shape(arch // 10, variant.head_size)
    flags = dict.fromkeys(("WITH_SOFTCAP", "WITH_SINKS", "WITH_LSE"), variant.extras) | {"CAUSAL": True}
    heads_per_list = variant.group if variant.packed else 1
    blocks = {"HEADS_PER_LIST": heads_per_list, "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n}
    compiled = compile_kernel(
        function,
        variant.types(function),
        variant.constants | blocks | flags,
        arch,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return account("sparse_attention", variant.name, default, compiled, arch)


def estimate_accounts(variant: Variant, arch: int) -> list[Account]:
    squares = {"STRIDE": STRIDE, "BLOCK_R": antidiagonal.BLOCK_R, "BLOCK_C": antidiagonal.BLOCK_C}
    squares |= {"BLOCK_D": antidiagonal.BLOCK_D_BYTES // variant.dtype.itemsize}
    warps = column_diagonal.NUM_WARPS
    tiles = {"TILE": TILE} | antidiagonal.mass_slots(TILE, variant.page, STRIDE)
    kernels: dict[str, tuple[Any, dict[str, Any], int]] = {
        "row_lse": (column_diagonal.row_lse_kernel, {"BLOCK_N": column_diagonal.BLOCK_N}, warps),
        "column_diagonal": (column_diagonal.column_diagonal_kernel, {}, warps),
        "block_mean": (page_means.block_mean_kernel, {"SLOTS": variant.page}, page_means.NUM_WARPS),
        "square_lse": (antidiagonal.square_lse_kernel, squares, antidiagonal.NUM_WARPS),
        "square_mass": (antidiagonal.square_mass_kernel, squares | tiles, antidiagonal.NUM_WARPS),
    }
    rows = []
    for name, (function, own, num_warps) in kernels.items():
        constants = {key: value for key, value in variant.constants.items() if key in function.arg_names} | own
        compiled = compile_kernel(
            function, variant.types(function), constants, arch, num_warps=num_warps, num_stages=3
        )  # fmt: skip
        rows.append(account(name, variant.name, True, compiled, arch))
    return rows


def low_rank_accounts(rank: int, default: bool, arch: int) -> list[Account]:
    def types(function: Any) -> dict[str, str]:
        return Variant().types(function) | {"p_query": "*i8", "p_key": "*i8", "p_scale": "*i16"}

    of_rows, of_tiles = low_rank.launch_shape(rank, TILE)
    kernels: dict[str, tuple[Any, dict[str, Any]]] = {
        "peak_lse": (low_rank.peak_lse_kernel, of_rows),
        "tile_bins": (low_rank.tile_bins_kernel, of_tiles),
        "mass": (low_rank.mass_kernel, {"BLOCK_N": low_rank.WEIGHTS}),
    }
    rows = []
    for name, (function, constants) in kernels.items():
        compiled = compile_kernel(
            function, types(function), constants, arch, num_warps=low_rank.NUM_WARPS, num_stages=3
        )
        rows.append(account(name, f"int8 rank={rank}", default, compiled, arch))
    return rows


def accounts(arch: int, everything: bool) -> list[Account]:
    rows = [attention_account(variant, True, arch) for variant in DEFAULT]
    for variant in OTHERS if everything else ():
        # Before compute capability 8.9 GPUs have no FP8 and Triton refuses it.
        if arch >= 89 or not variant.fp8:
            rows.append(attention_account(variant, False, arch))
    rows += [row for variant in ESTIMATES for row in estimate_accounts(variant, arch)]
    ranks = [rank for rank, default in RANKS.items() if default or everything]
    return rows + [row for rank in ranks for row in low_rank_accounts(rank, RANKS[rank], arch)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=list(SHARED_MEMORY), default=list(SHARED_MEMORY))
    parser.add_argument("--all", action="store_true", help="also the variants that are only shown")
    parser.add_argument("--csv", type=Path, default=None)
    args = parser.parse_args()
    rows = [row for arch in args.arch for row in accounts(arch, args.all)]
    for row in rows:
        verdict = ", ".join(row.problems) or "ok"
        print(
            f"{row.kernel:16s} {row.variant:34s} sm_{row.arch:<4d} regs {row.registers:3d} spills {row.spill_loads}/"
            f"{row.spill_stores} smem {row.shared_kib:6.1f}K tensor {row.tensor_core:3d} async {row.async_copies:3d} "
            f"blocks/SM {row.blocks_per_sm}  {verdict}"
        )
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(map(asdict, rows))
    return int(any(row.default and row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
