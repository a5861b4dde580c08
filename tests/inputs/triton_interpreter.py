"""Fixes for triton's CPU interpreter (``TRITON_INTERPRET=1``), which gets bf16 wrong. Import before running a kernel.

Seen on triton 3.6 to 3.9: ``tl.dot`` multiplies the raw bits of bf16 operands, and casts from float32 truncate where
GPUs round. ``test_triton_kernels.py`` has a self-test that both are fixed.

Two steps that take half of its time and change nothing are skipped.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
_create_dot, _cast, _patch_lang = Builder.create_dot, Builder.cast_impl, interpreter._patch_lang


def to_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar == tl.bfloat16:
        return interpreter.TensorHandle(to_float(handle.data), tl.float32)
    return handle


def create_dot(self: Any, a: Any, b: Any, c: Any, *args: Any, **kwargs: Any) -> Any:
    return _create_dot(self, _widened(a), _widened(b), c, *args, **kwargs)


def cast_impl(self: Any, source: Any, target: Any) -> Any:
    before, after = source.dtype.scalar, target.scalar
    if before == tl.float32 and after == tl.bfloat16:
        return interpreter.TensorHandle(to_bf16(source.data), after)
    if before == tl.bfloat16 and after == tl.float32:
        return interpreter.TensorHandle(to_float(source.data), after)
    return _cast(self, source, target)


Builder.create_dot, Builder.cast_impl = create_dot, cast_impl


def patch_lang(function: Any) -> Any:
    """Skip functions called by a kernel if the modules that they see are already patched."""
    seen = [module for module in function.__globals__.values() if module is tl or module is tl.core]
    return _patch_lang(function) if any(tl.core.is_builtin(module.load) for module in seen) else None


interpreter._patch_lang = patch_lang
# It checks integers for overflow, and ignores the result unless in debug mode.
options = interpreter.interpreter_builder.options
if not options.debug:
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
