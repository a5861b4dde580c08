"""Static account of every variant of the Triton kernels on NVIDIA GPUs, compiled ahead of time without a GPU.

Prints registers, spills, shared memory, tensor-core and asynchronous-copy instructions, and blocks per multiprocessor.
For the loops of attention it also prints the instructions per warp and key, the number of buffers (what Triton made of
num_stages), the steps between an asynchronous copy and its wait, and on sm_90 the TFLOP/s by a model
(``machine_code``). The model's only factor is calibrated such that a dense flash attention kernel in Triton
(``dense_kernel``) reaches its known speed.

Exits with 1 if a default variant spills in a loop, does not fit, has no tensor-core instructions, or by the model
reads whole pages or single keys at less than 80 % of the dense kernel's speed. The other variants (rarer head sizes,
soft cap and sinks, FP8 caches) are only shown, and only with --all.

    python tools/kernel_account.py [--arch 80 90 100] [--all] [--csv FILE]
"""

from __future__ import annotations

import argparse
import csv
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dense_kernel
import triton
from kernel_variants import DEFAULT, ESTIMATES, OTHERS, RANKS, STRIDE, TILE, Variant, compile_kernel
from machine_code import Loop, machine_code

from minference_vllm.triton_kernels import (
    antidiagonal,
    approx_lse,
    attention,
    calibration,
    chunk_queries,
    column_diagonal,
    fit,
    key_codes,
    key_lists,
    low_rank,
    page_means,
    physical_lists,
    remainder,
    representatives,
    thresholds,
)
from minference_vllm.triton_kernels.launch import LaunchShape, launch_shape

# Per multiprocessor: shared memory in bytes. All have 65,536 registers, 2,048 threads and 32 blocks.
SHARED_MEMORY = {80: 167936, 90: 233472, 100: 233472}
WITHOUT_TENSOR_CORES = (
    "block_mean", "key_lists", "left_out", "physical_lists", "threshold", "unlike_rows",
    "value_norms",
)  # fmt: skip
DENSE_TFLOPS = 380
"""Dense flash attention in Triton on an H100: bf16, head size 128, long sequences."""
LEAST_OF_DENSE = 0.8
MODELLED = (64, 128)
"""Head sizes with a launch shape of the dense kernel."""
NARROW = LaunchShape(block_m=128, block_n=64, block_own=64, stages=5)
"""An alternative to the launched shape on Hopper: half as many keys per step, and more stages."""
LISTS = dict.fromkeys(("p_threshold", "p_lists", "p_num_blocks"), "*i32") | {"p_overflowed": "*u8"}
REPRESENTATIVES = 32
LOOPS = ("whole pages", "single keys", "own pages")
"""Of the attention kernel, in order. The last one has a few steps per tile, independent of the context."""


@dataclass(frozen=True)
class LoopAccount:
    name: str
    loop: Loop
    keys: int
    """Per step."""
    tflops: float | None
    """By the model; None if it is not calibrated."""
    of_dense: float | None
    """``tflops`` as a share of the dense kernel's at this head size."""

    def __str__(self) -> str:
        per_key = self.loop.instructions / self.keys
        model = "" if self.tflops is None else f"  model {self.tflops:3.0f} TFLOP/s, {self.of_dense:.2f} of dense"
        return (
            f"    {self.name:12s} {self.loop.instructions:4d} instructions / {self.keys:3d} keys = {per_key:5.2f}, "
            f"{self.loop.buffers} buffers, read {self.loop.ahead:.1f} steps ahead{model}"
        )


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
    loop_spills: int
    shared_kib: float
    tensor_core: int
    async_copies: int
    blocks_per_sm: int
    loops: tuple[LoopAccount, ...] = ()

    @property
    def problems(self) -> list[str]:
        found = []
        if self.loop_spills:
            found.append(f"spills {self.loop_spills} in loops")
        if not self.tensor_core and self.kernel.removesuffix(" sampled") not in WITHOUT_TENSOR_CORES:
            found.append("no tensor-core instruction")
        if not self.blocks_per_sm:
            found.append("does not fit a multiprocessor")
        for one in self.loops:
            if one.name in LOOPS[:2] and one.of_dense is not None and one.of_dense < LEAST_OF_DENSE:
                found.append(f"{one.name} at {one.of_dense:.2f} of the dense kernel")
        return found

    @property
    def row(self) -> dict[str, Any]:
        """For a CSV file."""
        values = {name: value for name, value in vars(self).items() if name != "loops"}
        for name in LOOPS:
            one = next((one for one in self.loops if one.name == name), None)
            prefix = name.replace(" ", "_")
            values[f"{prefix}_instructions_per_key"] = one and round(one.loop.instructions / one.keys, 2)
            values[f"{prefix}_buffers"] = one and one.loop.buffers
            values[f"{prefix}_steps_ahead"] = one and one.loop.ahead
            values[f"{prefix}_model_tflops"] = one and one.tflops and round(one.tflops)
        return values


def account(
    kernel: str,
    variant: str,
    default: bool,
    compiled: Any,
    arch: int,
    loops: Sequence[tuple[str, int]] = (),
    rows: int = 0,
    head_size: int = 0,
    few_rows: bool = False,
) -> Account:
    """The account of one kernel.

    Args:
        loops: names and keys per step of all loops with tensor-core instructions; empty: loops are not examined.
        rows, head_size: shape of the queries in each of these loops.
        few_rows: see ``machine_code``.
    """
    code = machine_code(compiled, arch, few_rows, with_loops=bool(loops))
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    per_warp = -(-code.registers * 32 // 256) * 256
    fits = [65536 // max(1, per_warp * warps), SHARED_MEMORY[arch] // (shared + 1024), 2048 // (32 * warps), 32]
    if loops and len(loops) != len(code.loops):
        raise RuntimeError(f"{kernel} {variant}: {len(code.loops)} loops with tensor-core instructions, not {loops}")
    modelled = arch == 90 and head_size in MODELLED
    found = []
    for (name, keys), loop in zip(loops, code.loops, strict=False):
        rate = loop.rate(warps, 4 * rows * keys * head_size)
        model = (DENSE_TFLOPS * rate / dense_rate(128), rate / dense_rate(head_size)) if modelled else (None, None)
        found.append(LoopAccount(name, loop, keys, *model))
    return Account(
        kernel,
        variant,
        default,
        arch,
        triton.__version__,
        warps,
        code.registers,
        code.spill_loads,
        code.spill_stores,
        code.loop_spills,
        round(shared / 1024, 1),
        code.tensor_core,
        code.async_copies,
        min(fits),
        tuple(found),
    )


@functools.cache
def compiled_dense(head_size: int) -> Any:
    types = dict.fromkeys(("p_query", "p_key", "p_value", "p_out"), "*bf16")
    types |= {"stride_row": "i32!", "stride_head": "i32!", "scale_log2": "fp32"}
    constants = {"GROUP": 4, "D": head_size, "BLOCK": dense_kernel.BLOCK}
    shape = {"num_warps": dense_kernel.NUM_WARPS, "num_stages": dense_kernel.NUM_STAGES}
    return compile_kernel(dense_kernel.dense_kernel, types, constants, 90, **shape)


@functools.cache
def dense_rate(head_size: int) -> float:
    """Modelled FLOPs per cycle of the dense kernel's loop over the keys before a tile, on Hopper."""
    block = dense_kernel.BLOCK
    loop = machine_code(compiled_dense(head_size), 90).loops[0]
    return loop.rate(dense_kernel.NUM_WARPS, 4 * block * block * head_size)


def dense_account(head_size: int) -> Account:
    block, name = dense_kernel.BLOCK, f"bf16 D={head_size} contiguous"
    loops = (("keys before", block), ("own keys", block // 2))
    return account("dense_flash", name, False, compiled_dense(head_size), 90, loops, block, head_size)


def attention_account(variant: Variant, default: bool, arch: int, launch: LaunchShape | None = None) -> Account:
    """``launch``: another launch shape than the variant's own."""
    function, constants = attention.sparse_attention_kernel, variant.constants
    launch = launch or launch_shape(
        arch // 10, variant.head_size, variant.dtype.itemsize, 1 if variant.fp8 else variant.dtype.itemsize
    )
    heads_per_list = variant.group if variant.packed else 1
    own = {
        "LISTS": variant.group // heads_per_list,
        "HEADS_PER_LIST": heads_per_list,
        "UNIT": 16,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_OWN": launch.block_own,
        "STAGES": launch.stages,
    }
    flags = dict.fromkeys(("WITH_SOFTCAP", "WITH_SINKS", "WITH_LSE"), variant.extras)
    flags |= {"WITH_REMAINDER": variant.remainder, "CAUSAL": True, "CONTINUES": variant.continues}
    flags["COUNTED"] = variant.counted
    flags["WITH_LSE"] |= variant.continues
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    compiled = compile_kernel(
        function, variant.types(function), constants | own | flags, arch, num_warps=launch.num_warps
    )
    keys = launch.block_n, launch.block_n, launch.block_own
    loops = tuple(zip(LOOPS, keys, strict=True))
    head_size = variant.constants["D"]
    name = f"{variant.name} {launch.block_m}x{launch.block_n}"
    return account("sparse_attention", name, default, compiled, arch, loops, launch.block_m, head_size)


def lists_account(variant: Variant, arch: int) -> Account:
    function = physical_lists.physical_lists_kernel
    block_n = launch_shape(arch // 10, variant.head_size, 2, 2).block_n
    own = {"LISTS": variant.group, "BLOCK": physical_lists.BLOCK, "WORK": physical_lists.WORK, "BLOCK_N": block_n}
    own |= {"PAGE": variant.page, "CAUSAL": True, "COUNTED": variant.counted}
    compiled = compile_kernel(function, variant.types(function), own, arch, num_warps=4)
    return account("physical_lists", variant.name, True, compiled, arch)


def remainder_accounts(variant: Variant, default: bool, arch: int) -> list[Account]:
    heads_per_list = variant.group if variant.packed else 1
    of_lists, of_keys = remainder.constants(
        heads_per_list, variant.group, variant.head_size, variant.page, variant.dtype,
        1 if variant.fp8 else variant.dtype.itemsize,
    )  # fmt: skip
    kernels = {
        "left_out": (remainder.left_out_kernel, of_lists),
        "remainder": (remainder.remainder_kernel, of_keys | {"WITH_SOFTCAP": variant.extras}),
    }
    rows = []
    for name, (function, shape) in kernels.items():
        constants = {key: value for key, value in shape.items() if key in function.arg_names}
        compiled = compile_kernel(function, variant.types(function), constants, arch, num_warps=shape["num_warps"])
        rows.append(account(name, variant.name, default, compiled, arch, few_rows=True))
    return rows


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
    """Accounts of the kernels for ``low_rank``, scored by all rows and by representatives."""
    variant = Variant()
    quantized = {"p_query": "*i8", "p_key": "*i8", "p_scale": "*i16", "p_position": "*i32"}
    own = dict.fromkeys(("p_rows", "p_drawn", "p_alone"), "*i64") | {"p_levels": "*fp32", "p_codes": "*i8"}
    own |= {"p_taken": "*i1", "p_scale": "*i16", "p_threshold": "*i32", "p_position": "*i32"}
    floats = ("p_to_query", "p_to_key", "p_sum", "p_moment", "p_start", "p_vectors", "p_key_size", "p_norm")
    own |= dict.fromkeys(floats, "*fp32")
    own |= dict.fromkeys(("factor", "alone_share", "missable", "row_missable", "errors"), "fp32")
    shared = variant.constants | {"BLOCK_N": calibration.BLOCK_N, "WITH_SOFTCAP": False, "TILE": TILE}
    shared["num_warps"] = calibration.NUM_WARPS
    lists = {"TILE": TILE}
    of_thresholds = {"ROWS": thresholds.ROWS, "num_warps": thresholds.NUM_WARPS}
    of_keys = key_codes.constants(variant.group, variant.head_size, variant.page, rank, variant.dtype)
    of_queries = chunk_queries.constants(variant.head_size, rank)
    of_fit = variant.constants | {"BLOCK_N": fit.BLOCK_N, "COLUMNS": fit.COLUMNS, "STEP": fit.STEP, "RANK": rank}
    of_fit |= {"WIDTH": rank, "R": of_queries["R"], "num_warps": fit.NUM_WARPS}
    of_tile = representatives.launch_shape(variant.head_size, rank, TILE, REPRESENTATIVES)
    kernels: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
        "unlike_rows": (chunk_queries.unlike_rows_kernel, own, of_queries),
        "query_codes": (chunk_queries.query_codes_kernel, own, of_queries | lists),
        "moments": (fit.moments_kernel, own, of_fit),
        "fit": (fit.fit_kernel, own, of_fit),
        "representatives": (representatives.representatives_kernel, own, of_tile),
        "key_codes": (key_codes.key_codes_kernel, own, of_keys),
        "value_norms": (calibration.value_norms_kernel, own, shared | {"KEYS": calibration.KEYS, "num_warps": 4}),
    }
    for sampled, name in ((False, ""), (True, " sampled")):
        squared, drawn = {"SQUARED": sampled}, lists | key_lists.constants(variant.page, sampled)
        kernels[f"share_levels{name}"] = calibration.share_levels_kernel, own, shared | squared
        kernels[f"threshold{name}"] = thresholds.threshold_kernel, own, of_thresholds | squared
        kernels[f"key_lists{name}"] = key_lists.key_lists_kernel, LISTS, drawn
    for count, name in ((0, ""), (REPRESENTATIVES, " representatives")):
        of_lse, bins_kernel, of_bins = low_rank.launch_shape(rank, TILE, TILE, count, arch // 10)
        kernels["approx_lse"] = approx_lse.approx_lse_kernel, quantized, of_lse
        kernels[f"bins{name}"] = bins_kernel, quantized, of_bins
    found = []
    for name, (function, kinds, shape) in kernels.items():
        constants = {key: value for key, value in shape.items() if key in function.arg_names}
        types = variant.types(function) | {key: kind for key, kind in kinds.items() if key in function.arg_names}
        warps = shape["num_warps"]
        stages = shape.get("num_stages", 3)
        compiled = compile_kernel(function, types, constants, arch, num_warps=warps, num_stages=stages)
        found.append(account(name, f"rank={rank}", default, compiled, arch))
    return found


def accounts(arch: int, everything: bool) -> list[Account]:
    rows = [dense_account(head_size) for head_size in MODELLED] if arch == 90 else []
    rows += [attention_account(variant, True, arch) for variant in DEFAULT]
    for variant in OTHERS if everything else ():
        # GPUs before compute capability 8.9 have no FP8, and Triton rejects it.
        if arch >= 89 or not variant.fp8:
            rows.append(attention_account(variant, False, arch))
    if arch == 90 and everything:
        rows += [attention_account(variant, False, arch, NARROW) for variant in ESTIMATES]
    rows += [lists_account(variant, arch) for variant in (*ESTIMATES, Variant(counted=True))]
    rows += [row for variant in ESTIMATES for row in estimate_accounts(variant, arch)]
    for variant in DEFAULT:
        if variant.remainder and not variant.continues:
            rows += remainder_accounts(variant, True, arch)
    for variant in OTHERS if everything else ():
        if variant.remainder and not variant.continues and (arch >= 89 or not variant.fp8):
            rows += remainder_accounts(variant, False, arch)
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
            f"{row.kernel:16s} {row.variant:41s} sm_{row.arch:<4d} regs {row.registers:3d} spills {row.spill_loads}/"
            f"{row.spill_stores} smem {row.shared_kib:6.1f}K tensor {row.tensor_core:3d} async {row.async_copies:3d} "
            f"blocks/SM {row.blocks_per_sm}  {verdict}"
        )
        for loop in row.loops:
            print(loop)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0].row))
            writer.writeheader()
            writer.writerows(row.row for row in rows)
    return int(any(row.default and row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
