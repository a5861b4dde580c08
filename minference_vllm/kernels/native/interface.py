"""Arguments of our CPU kernels: the structures and functions of ``csrc/cpu/interface.h``, field by field.

A library is used only if it was built with the same interface: ``difference`` compares names, types and offsets.
"""

from __future__ import annotations

import ctypes
from typing import Any

_SCALARS: dict[Any, str] = {ctypes.c_int32: "int32", ctypes.c_int64: "int64", ctypes.c_float: "float32"}


def _pointer(element: str) -> type[ctypes.c_void_p]:
    """A ``c_void_p`` whose name says what it points to."""
    return type(f"{element}*", (ctypes.c_void_p,), {})


_VoidPtr, _BoolPtr, _Float32Ptr = _pointer("void"), _pointer("bool"), _pointer("float32")
_Uint8Ptr, _Int8Ptr, _Int16Ptr = _pointer("uint8"), _pointer("int8"), _pointer("int16")
_Uint16Ptr = _pointer("uint16")
_Int32Ptr, _Int64Ptr = _pointer("int32"), _pointer("int64")


class Cache(ctypes.Structure):
    _fields_ = (
        ("key", _VoidPtr),
        ("value", _VoidPtr),
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
        ("query", _VoidPtr),
        ("out", _VoidPtr),
        ("lse", _Float32Ptr),
        ("query_token_stride", ctypes.c_int64),
        ("query_head_stride", ctypes.c_int64),
        ("out_token_stride", ctypes.c_int64),
        ("out_head_stride", ctypes.c_int64),
        ("pages", _Int64Ptr),
        ("tile_starts", _Int64Ptr),
        ("blocks", _Int32Ptr),
        ("num_blocks", _Int32Ptr),
        ("columns", _Int32Ptr),
        ("num_columns", _Int32Ptr),
        ("column_codes", _Uint8Ptr),
        ("sinks", _Float32Ptr),
        ("remainder_key", _Float32Ptr),
        ("remainder_value", _Float32Ptr),
        ("remainder_bias", _Float32Ptr),
        ("seq_len", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("tiles", ctypes.c_int32),
        ("max_blocks", ctypes.c_int32),
        ("max_columns", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


class RemainderArguments(ctypes.Structure):
    _fields_ = (
        ("cache", Cache),
        ("query", _VoidPtr),
        ("query_token_stride", ctypes.c_int64),
        ("query_head_stride", ctypes.c_int64),
        ("pages", _Int64Ptr),
        ("tile_starts", _Int64Ptr),
        ("blocks", _Int32Ptr),
        ("num_blocks", _Int32Ptr),
        ("columns", _Int32Ptr),
        ("num_columns", _Int32Ptr),
        ("sampled", _Int64Ptr),
        ("heads", _Int32Ptr),
        ("key", _Float32Ptr),
        ("value", _Float32Ptr),
        ("bias", _Float32Ptr),
        ("seq_len", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("num_heads", ctypes.c_int32),
        ("num_wanted", ctypes.c_int32),
        ("heads_per_list", ctypes.c_int32),
        ("tiles", ctypes.c_int32),
        ("max_blocks", ctypes.c_int32),
        ("max_columns", ctypes.c_int32),
        ("num_sampled", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("log_step", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


class RowArguments(ctypes.Structure):
    _fields_ = (
        ("cache", Cache),
        ("query", _VoidPtr),
        ("query_token_stride", ctypes.c_int64),
        ("query_head_stride", ctypes.c_int64),
        ("pages", _Int64Ptr),
        ("row_index", _Int64Ptr),
        ("heads", _Int32Ptr),
        ("context_len", ctypes.c_int64),
        ("seq_len", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("num_heads", ctypes.c_int32),
        ("num_wanted", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


class RowShareArguments(ctypes.Structure):
    _fields_ = (("row_arguments", RowArguments), ("log_norms", _Float32Ptr), ("shares", _Uint16Ptr))


class ColumnDiagonalArguments(ctypes.Structure):
    _fields_ = (
        ("row_arguments", RowArguments),
        ("group_starts", _Int32Ptr),
        ("columns", _Float32Ptr),
        ("diagonals", _Float32Ptr),
        ("num_groups", ctypes.c_int32),
    )


class KeyCodeArguments(ctypes.Structure):
    _fields_ = (
        ("cache", Cache),
        ("pages", _Int64Ptr),
        ("heads", _Int32Ptr),
        ("to_key", _Float32Ptr),
        ("center", _Float32Ptr),
        ("codes", _Int8Ptr),
        ("seq_len", ctypes.c_int64),
        ("num_heads", ctypes.c_int32),
        ("num_wanted", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("max_code", ctypes.c_int32),
        ("max_norm", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


class RepresentativeArguments(ctypes.Structure):
    _fields_ = (
        ("low", _Float32Ptr),
        ("key_size", _Float32Ptr),
        ("tile_starts", _Int64Ptr),
        ("out", _Float32Ptr),
        ("position", _Int32Ptr),
        ("count", _Int32Ptr),
        ("context_len", ctypes.c_int64),
        ("chunk", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("tiles", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("step", ctypes.c_int32),
        ("per_tile", ctypes.c_int32),
        ("wanted", ctypes.c_int32),
        ("least_size", ctypes.c_float),
        ("least_apart", ctypes.c_float),
        ("alike", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


class QuantizedQK(ctypes.Structure):
    _fields_ = (
        ("query", _Int8Ptr),
        ("position", _Int32Ptr),
        ("count", _Int32Ptr),
        ("keys", _Int8Ptr),
        ("dequant_scale", _Int16Ptr),
        ("seq_len", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("tiles", ctypes.c_int32),
        ("per_tile", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("bins_per_bit", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


class TileScoreBinArguments(ctypes.Structure):
    _fields_ = (
        ("qk", QuantizedQK),
        ("all_groups", _BoolPtr),
        ("bins", _Uint8Ptr),
        ("tile_starts", _Int64Ptr),
        ("tile", ctypes.c_int32),
    )


class BinMassArguments(ctypes.Structure):
    _fields_ = (
        ("bins", _Uint8Ptr),
        ("tile_of_row", _Int64Ptr),
        ("weights", _Uint16Ptr),
        ("mass", _Float32Ptr),
        ("seq_len", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("tiles", ctypes.c_int32),
        ("squared", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class ThresholdArguments(ctypes.Structure):
    _fields_ = (
        ("mass", _Float32Ptr),
        ("places", _Int64Ptr),
        ("threshold", _Int32Ptr),
        ("heads", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("places_per_head", ctypes.c_int32),
        ("sampled", ctypes.c_int32),
        ("first", ctypes.c_int32),
        ("share", ctypes.c_float),
        ("row_share", ctypes.c_float),
        ("errors", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


class KeyArguments(ctypes.Structure):
    _fields_ = (
        ("bins", _Uint8Ptr),
        ("threshold", _Int32Ptr),
        ("counts", _Int32Ptr),
        ("listed_pages", _BoolPtr),
        ("columns", _Int32Ptr),
        ("seq_len", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("tiles", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("max_columns", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class SampleArguments(ctypes.Structure):
    _fields_ = (
        ("bins", _Uint8Ptr),
        ("threshold", _Int32Ptr),
        ("first_keys", _Int64Ptr),
        ("own_keys", _Int64Ptr),
        ("listed_pages", _BoolPtr),
        ("increments", _Int32Ptr),
        ("num_columns", _Int32Ptr),
        ("columns", _Int32Ptr),
        ("codes", _Uint8Ptr),
        ("seq_len", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("tiles", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("max_columns", ctypes.c_int32),
        ("max_code", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


FUNCTIONS: dict[str, type[ctypes.Structure]] = {
    "attend": AttendArguments,
    "remainder": RemainderArguments,
    "row_shares": RowShareArguments,
    "column_diagonal_scores": ColumnDiagonalArguments,
    "key_codes": KeyCodeArguments,
    "representatives": RepresentativeArguments,
    "tile_score_bins": TileScoreBinArguments,
    "mass_by_bin": BinMassArguments,
    "threshold": ThresholdArguments,
    "page_counts": KeyArguments,
    "keys_above": KeyArguments,
    "sampled_keys": SampleArguments,
}
"""The functions of a library, without their prefix, and the structure that each takes."""


def _fields(kind: type[ctypes.Structure]) -> list[tuple[str, Any]]:
    return [(name, part) for name, part, *_ in kind._fields_]


def _structures(kind: type[ctypes.Structure]) -> dict[str, type[ctypes.Structure]]:
    """A structure and the structures in its fields, by name."""
    found = {kind.__name__: kind}
    for _, part in _fields(kind):
        if issubclass(part, ctypes.Structure):
            found |= _structures(part)
    return found


def interface() -> dict[str, str]:
    """What a matching library's ``minference_describe_interface`` returns: each field, structure and function."""
    lines = {}
    structures = {name: kind for taken in FUNCTIONS.values() for name, kind in _structures(taken).items()}
    for name, kind in structures.items():
        for field, part in _fields(kind):
            lines[f"{name}.{field}"] = f"{_SCALARS.get(part, part.__name__)} at byte {getattr(kind, field).offset}"
        lines[f"sizeof({name})"] = str(ctypes.sizeof(kind))
    return lines | {name: f"a function of {taken.__name__}" for name, taken in FUNCTIONS.items()}


def difference(library: ctypes.CDLL) -> str | None:
    """The first difference between a library's interface and this one; None if they are the same.

    A name that only one of the two has is reported first: it may have moved the fields that differ.
    """
    describe = getattr(library, "minference_describe_interface", None)
    if describe is None:
        return "the library does not describe its interface"
    describe.restype = ctypes.c_char_p
    built = dict(line.split(": ") for line in describe().decode().splitlines())
    ours = interface()
    differing = [name for name in built | ours if built.get(name) != ours.get(name)]
    if not differing:
        return None
    name = min(differing, key=lambda name: name in built and name in ours)
    return f"{name} is {built.get(name, 'absent')} in the library, {ours.get(name, 'absent')} in this package"
