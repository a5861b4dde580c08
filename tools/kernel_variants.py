"""The variants of the Triton kernels that ``kernel_account.py`` compiles, and their compilation without a GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter replaces the functions that are compiled here

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minference_vllm.patterns.kinds import LowRank
from minference_vllm.triton_kernels import attention, column_diagonal, physical_lists


def compile_kernel(function: Any, types: dict[str, str], constants: dict[str, Any], arch: int, **options: int) -> Any:
    """Compile one variant. Pointers and arguments with a type ending in ``!`` are specialised as divisible by 16."""
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
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options | {"enable_fp_fusion": True})


@dataclass(frozen=True)
class Variant:
    """A layer shape that models use, and the options of a kernel."""

    dtype: torch.dtype = torch.bfloat16
    head_size: int = 128
    page: int = 128
    fp8: bool = False
    extras: bool = False
    """Soft cap, sinks and log-sum-exp."""
    remainder: bool = False
    """Whether attention starts from the remainder."""
    continues: bool = False
    """Whether attention continues from the result of FlashAttention 4."""
    group: int = 4
    """Query heads per KV head."""
    packed: bool = False
    """Whether the query heads of a KV head share their lists."""
    counted: bool = False
    """Whether columns may have counts above 1."""

    @property
    def name(self) -> str:
        cache = " fp8 cache" if self.fp8 else ""
        extras = " cap+sinks+lse" if self.extras else ""
        remainder = " remainder" if self.remainder else ""
        continues = " after FA4" if self.continues else ""
        packed = f" packed {self.group}" if self.packed else ""
        packed += " counted" if self.counted else ""
        return f"{_SHORT[self.dtype]} D={self.head_size} page={self.page}{cache}{extras}{remainder}{continues}{packed}"

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
        """Triton's names of the argument types; arguments that are not listed are int32 lengths."""
        query, cache = f"*{_SHORT[self.dtype]}", "*fp8e4nv" if self.fp8 else f"*{_SHORT[self.dtype]}"
        pointers = {"p_query": query, "p_out": query, "p_key": cache, "p_value": cache}
        positions = ("p_pages", "p_tile_starts", "p_bin_row", "p_order")
        pointers |= {name: "*i64" for name in positions} | dict.fromkeys(("p_bins", "p_marks", "p_codes"), "*u8")
        floats = ["p_lse", "p_sinks", "p_mean", "p_scores", "p_weights", "p_mass"]
        floats += ["p_left_key", "p_left_value", "p_bias"]
        pointers |= {name: "*fp32" for name in floats}
        integers = ["p_blocks", "p_num_blocks", "p_columns", "p_num_columns", "p_heads", "p_rows", "p_lowest"]
        integers += ["p_table", "p_listed", "p_singles", "p_work", "p_slots", "p_wanted", "p_count"]
        pointers |= {name: "*i32" for name in integers}
        if function is column_diagonal.column_diagonal_kernel:
            pointers |= {"p_columns": "*fp32", "p_nearer": "*fp32", "p_farther": "*fp32"}
        if function in (attention.sparse_attention_kernel, physical_lists.physical_lists_kernel):
            pointers["p_counts"] = "*fp32"
        scalars = dict.fromkeys(("scale_log2", "softcap_log2", "value_scale", "key_scale", "log_step"), "fp32")
        strides = {name: "i32!" for name in function.arg_names if name.startswith("stride_")}
        return {name: "i32" for name in function.arg_names} | pointers | scalars | strides


_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16"}
DEFAULT = (
    Variant(head_size=64, page=16),
    Variant(page=16),
    Variant(page=128),
    Variant(torch.float16, page=64),
    Variant(page=16, packed=True),
    Variant(packed=True, group=7),
    Variant(head_size=64, page=16, remainder=True),
    Variant(page=16, remainder=True),
    Variant(page=128, remainder=True),
    Variant(page=16, packed=True, remainder=True),
    Variant(head_size=64, page=16, counted=True),
    Variant(page=16, counted=True),
    Variant(page=128, counted=True),
    Variant(page=128, continues=True, counted=True),
    Variant(page=128, continues=True),
    Variant(page=128, continues=True, remainder=True),
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
    Variant(head_size=96, page=48, remainder=True),
    Variant(head_size=256, remainder=True),
    Variant(extras=True, remainder=True),
    Variant(fp8=True, remainder=True),
    Variant(head_size=256, fp8=True, remainder=True),
    Variant(page=528, packed=True, group=7, remainder=True),
    Variant(head_size=256, counted=True),
    Variant(fp8=True, counted=True),
    Variant(head_size=64, continues=True, remainder=True),
    Variant(head_size=96, continues=True),
    Variant(continues=True, packed=True),
)
ESTIMATES = (Variant(page=16), Variant(page=128))
RANKS = {LowRank().rank: True, 16: False}
"""Rank -> whether it is the default."""
TILE, STRIDE = 128, 16
"""Default rows of a query tile, and tokens per side of an antidiagonal's square."""
