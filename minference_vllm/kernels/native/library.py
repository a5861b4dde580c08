"""What our CPU kernels are called with: the argument structures of ``csrc/cpu``, field by field."""

from __future__ import annotations

import ctypes


class Cache(ctypes.Structure):
    _fields_ = (
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("page_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("block_size", ctypes.c_int32),
        ("head_size", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("element", ctypes.c_int32),
    )


class AttendArguments(ctypes.Structure):
    _fields_ = (
        ("cache", Cache),
        ("query", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("query_token_stride", ctypes.c_int64),
        ("query_head_stride", ctypes.c_int64),
        ("out_token_stride", ctypes.c_int64),
        ("out_head_stride", ctypes.c_int64),
        ("pages", ctypes.c_void_p),
        ("tile_starts", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("num_blocks", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("num_columns", ctypes.c_void_p),
        ("column_keys", ctypes.c_void_p),
        ("column_values", ctypes.c_void_p),
        ("column_row", ctypes.c_void_p),
        ("seq_len", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("tiles", ctypes.c_int32),
        ("max_blocks", ctypes.c_int32),
        ("max_columns", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


class RowArguments(ctypes.Structure):
    _fields_ = (
        ("cache", Cache),
        ("query", ctypes.c_void_p),
        ("query_token_stride", ctypes.c_int64),
        ("query_head_stride", ctypes.c_int64),
        ("pages", ctypes.c_void_p),
        ("row_index", ctypes.c_void_p),
        ("heads", ctypes.c_void_p),
        ("context_len", ctypes.c_int64),
        ("seq_len", ctypes.c_int64),
        ("num_heads", ctypes.c_int32),
        ("num_wanted", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


class WeightArguments(ctypes.Structure):
    _fields_ = (("of", RowArguments), ("weights", ctypes.c_void_p))


class EstimateArguments(ctypes.Structure):
    _fields_ = (
        ("of", RowArguments),
        ("group_starts", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("diagonals", ctypes.c_void_p),
        ("num_groups", ctypes.c_int32),
    )


class FactorArguments(ctypes.Structure):
    _fields_ = (
        ("query", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("step", ctypes.c_void_p),
        ("chunk", ctypes.c_int64),
        ("seq_len", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("levels_per_bit", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


class LevelArguments(ctypes.Structure):
    _fields_ = (
        ("of", FactorArguments),
        ("lowest", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("tile_starts", ctypes.c_void_p),
        ("tiles", ctypes.c_int32),
        ("tile", ctypes.c_int32),
    )


class RowMassArguments(ctypes.Structure):
    _fields_ = (
        ("of", FactorArguments),
        ("rows", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("mass", ctypes.c_void_p),
        ("num_rows", ctypes.c_int32),
        ("tile", ctypes.c_int32),
    )


class MassArguments(ctypes.Structure):
    _fields_ = (
        ("levels", ctypes.c_void_p),
        ("list", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("mass", ctypes.c_void_p),
        ("seq_len", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("lists", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class KeyArguments(ctypes.Structure):
    _fields_ = (
        ("levels", ctypes.c_void_p),
        ("threshold", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("outside", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("seq_len", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("tiles", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("max_columns", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


INTERFACE = 6
"""Counts the changes of the structures above and in ``csrc/cpu``; a library built from another one must not run."""
FUNCTIONS = {
    "attend": AttendArguments,
    "row_weights": WeightArguments,
    "last_query_scores": EstimateArguments,
    "tile_levels": LevelArguments,
    "row_mass": RowMassArguments,
    "mass_by_level": MassArguments,
    "page_counts": KeyArguments,
    "columns_at_levels": KeyArguments,
}
"""The functions of a library, without their prefix, and the structure that each takes."""
