"""Estimated time of a sparse layer of the default on an H100, from operation counts; nothing here was measured.

The device time of each part is the maximum of three: instructions (of the part's loop in the machine code for Hopper,
times its steps) at one per scheduler and cycle, bytes at the memory bandwidth, and matrix products at the throughput of
the tensor cores. Host time is 5 microseconds per operation or launch (``tests/backend/test_layer_account.py``). The
host runs ahead of the GPU, so a layer takes the larger of the two. Dense attention is FlashAttention 3 at 616 TFLOP/s.

Not modelled: caches, stalls, atomic additions, and how well blocks fill the multiprocessors. Expect the parts of the
index to take up to twice as long.

    python tools/layer_model.py [--density 0.19 0.1 0.05 0.02]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import kernel_account
from kernel_variants import Variant, compile_kernel
from machine_code import disassembled, innermost

from minference_vllm.selection import score_bins
from minference_vllm.triton_kernels import (
    approx_lse,
    calibration,
    in_thread,
    key_lists,
    low_rank,
    representative_bins,
    tile_bins,
)

HEADS, KV_HEADS, DIM, PAGE, CHUNK, TILE, RANK, REPRESENTATIVES, ROWS = 32, 8, 128, 128, 8192, 128, 32, 32, 128
ALL_ASKED = 1 / 3
"""Share of tiles that are scored by all rows instead of representatives, on SmolLM2 at 16K tokens."""
LENGTHS = {"32K": 1 << 15, "128K": 1 << 17, "1M": 1 << 20}
HOST_CALLS = {"32K": 17 + 13, "128K": 19 + 23, "1M": 47 + 163}
"""Operations plus launches of a layer."""
HOST_CALL = 5e-6
FIT = 100e-6
"""Seconds of the fit, a guess: 160 dependent steps in one block per head."""
LANES_PER_SECOND = 132 * 4 * 32 * 1.7e9
BYTES_PER_SECOND, TENSOR_FLOPS, FLASH_ATTENTION_3 = 3.3e12, 600e12, 616e12
"""``TENSOR_FLOPS`` is for 16-bit operands; int8 has twice as many."""


@dataclass(frozen=True)
class Work:
    """Operation counts of one part of a layer."""

    instructions: float = 0.0
    """Lane instructions in total."""
    size: float = 0.0
    """Bytes."""
    flops: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.instructions / LANES_PER_SECOND, self.size / BYTES_PER_SECOND, self.flops / TENSOR_FLOPS)


def per_element(
    function: Any, kinds: dict[str, str], shape: dict[str, Any], elements: int, multiplies: bool = True
) -> float:
    """Lane instructions per element of a matrix product, in the kernel's main loop.

    Args:
        multiplies: False: the kernel has no matrix product; count per element that its longest loop reads, as if every
            branch was taken.
    """
    variant, warps = Variant(), shape["num_warps"]
    constants = {name: value for name, value in (variant.constants | shape).items() if name in function.arg_names}
    types = variant.types(function) | {name: kind for name, kind in kinds.items() if name in function.arg_names}
    code = disassembled(compile_kernel(function, types, constants, 90, num_warps=warps, num_stages=3))
    instructions, loops = innermost(code)
    bodies = [instructions[loop] for loop in loops]
    products = [body for body in bodies if any("MMA" in one for one in body)]
    return len(products[0] if multiplies else max(bodies, key=len)) * warps * 32 / elements


def parts(length: int) -> dict[str, Work]:
    """The index of one layer."""
    tiles, pairs = CHUNK // TILE, float(CHUNK) * (length - CHUNK / 2)
    scores, measured = pairs / TILE * REPRESENTATIVES * HEADS, pairs / CHUNK * ROWS * HEADS
    # Keys of some groups, and the tiles' own keys.
    asked = approx_lse.most_groups(length) * score_bins.PEAK_KEYS + TILE
    sampled = float(tiles) * asked * approx_lse.BLOCK_M * HEADS * (1 + ALL_ASKED)
    of_every_row = pairs * HEADS * ALL_ASKED
    of_rows, _, of_bins = low_rank.launch_shape(RANK, TILE, TILE, REPRESENTATIVES)
    _, _, of_all = low_rank.launch_shape(RANK, TILE, TILE)
    codes = {"p_query": "*i8", "p_key": "*i8", "p_scale": "*i16", "p_position": "*i32"}
    of_measured = {"BLOCK_N": calibration.BLOCK_N, "WITH_SOFTCAP": False, "TILE": TILE, "SQUARED": True}
    of_measured["num_warps"] = calibration.NUM_WARPS
    own = {"p_rows": "*i64", "p_levels": "*fp32", "p_norm": "*fp32"}
    size = calibration.ROWS.value * calibration.BLOCK_N
    keys = in_thread.THREADS.value * score_bins.PEAK_KEYS
    elements = of_rows["BLOCK_M"] * keys, representative_bins.QUERIES * of_bins["BLOCK_N"]
    keys_read, bins = float(length) * KV_HEADS * DIM * 2, float(HEADS) * tiles * length

    def work(
        function: Any, kinds: dict[str, str], shape: dict[str, Any], count: float, step: int, **more: float
    ) -> Work:
        return Work(per_element(function, kinds, shape, step) * count, **more)

    lists = key_lists.constants(PAGE, sampled=True) | {"TILE": TILE}
    keys_at_once = lists["PAGES"] * PAGE
    of_lists = per_element(key_lists.key_lists_kernel, kernel_account.LISTS, lists, keys_at_once, multiplies=False)
    of_bytes = {"size": bins, "flops": scores * RANK}
    exact = {"size": keys_read, "flops": measured * 2 * DIM}
    return {
        "codes of keys": Work(size=keys_read + HEADS * length * RANK, flops=4.0 * HEADS * length * DIM * RANK),
        "denominators": work(approx_lse.approx_lse_kernel, codes, of_rows, sampled, elements[0]),
        "bins": work(representative_bins.representative_bins_kernel, codes, of_bins, scores, elements[1], **of_bytes),
        "bins of all rows": work(
            tile_bins.tile_bins_kernel,
            codes,
            of_all,
            of_every_row,
            of_all["BLOCK_M"] * of_all["BLOCK_N"],
            flops=of_every_row * RANK,
        ),
        "measured rows": work(calibration.share_levels_kernel, own, of_measured, measured, size, **exact),
        "lists": Work(of_lists * bins, size=bins),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, nargs="+", default=[0.19, 0.1, 0.05, 0.02], help="of attention")
    args = parser.parse_args()
    attention = kernel_account.attention_account(Variant(page=PAGE, counted=True), True, 90)
    pace = min(loop.tflops for loop in attention.loops[:2] if loop.tflops is not None) * 1e12
    print(f"milliseconds of a layer; chunk of {CHUNK} tokens, {HEADS} heads of {DIM} over {KV_HEADS}")
    for name, length in LENGTHS.items():
        flops = 4.0 * DIM * HEADS * CHUNK * (length - CHUNK / 2)
        dense, found = flops / FLASH_ATTENTION_3, {part: work.seconds for part, work in parts(length).items()}
        index, host = FIT + sum(found.values()), HOST_CALLS[name] * HOST_CALL
        shares = ", ".join(f"{part} {1e3 * seconds:.2f}" for part, seconds in found.items())
        print(f"{name}: dense {1e3 * dense:.1f}, host {1e3 * host:.2f}, index {1e3 * index:.2f} ({shares})")
        for density in args.density:
            layer = max(host, index + density * flops / pace)
            print(f"    density {density}: {1e3 * layer:.2f}, {dense / layer:.1f} times as fast as dense")


if __name__ == "__main__":
    main()
