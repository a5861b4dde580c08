"""A CUDA release of vLLM on a machine without a GPU: what has to be faked for its Python code to run on CPU tensors.

Faked are the platform (an H100), the compiled operators, FlashAttention and the writing of the cache (torch code with
their documented meaning), and the version of the distribution. Everything else is vLLM's own.
"""

from __future__ import annotations

import importlib.metadata
import sys
import types
from pathlib import Path
from typing import Any

import torch

COMPILED = ("_C", "_C_stable_libtorch", "_moe_C", "_moe_C_stable_libtorch", "cumem_allocator", "_rocm_C", "_qutlass_C")
"""vLLM's compiled modules that importing its Python code looks for."""
OPERATORS = {"_C", "_moe_C", "_C_cache_ops", "_C_stable_libtorch", "_rocm_C", "_C_custom_ar", "_C_utils"}
"""Their namespaces of operators."""
CAPABILITY = (9, 0)


def install(version: str, folder: Path) -> None:
    """Make ``import vllm`` find the files below ``folder``, with stand-ins for the parts that cannot run here."""
    assert not any(name.split(".")[0] in ("vllm", "minference_vllm") for name in sys.modules), "too late"
    sys.path.insert(0, str(folder))
    of_others = importlib.metadata.version
    importlib.metadata.version = lambda name: version if name == "vllm" else of_others(name)
    _fake_operators()
    import vllm

    assert Path(vllm.__file__).is_relative_to(folder), f"vllm comes from {vllm.__file__}"
    for name in COMPILED:
        sys.modules[f"vllm.{name}"] = types.ModuleType(f"vllm.{name}")
    _fake_flash_attention_modules()
    _fake_platform()
    import vllm.v1.attention.backends.flash_attn as backend

    backend.flash_attn_varlen_func = flash_attention
    backend.reshape_and_cache_flash = write_cache
    backend.get_scheduler_metadata = lambda **sizes: None
    backend.merge_attn_states = merge_states
    torch.cuda.get_device_capability = lambda *device: CAPABILITY  # type: ignore[assignment]


class _Operator:
    """Stands for a compiled operator that vLLM only looks up; when called, it reports that something is unsupported."""

    def __init__(self) -> None:
        self.default, self._schema = self, None

    def __call__(self, *arguments: Any, **keywords: Any) -> bool:
        return False


def _fake_operators() -> None:
    find, register_fake = torch._ops._OpNamespace.__getattr__, torch.library.register_fake

    def find_or_stand_in(namespace: Any, name: str) -> Any:
        try:
            return find(namespace, name)
        except AttributeError:
            if name.startswith("__") or namespace.name not in OPERATORS:
                raise
            return _Operator()

    def register_known(op: Any, *arguments: Any, **keywords: Any) -> Any:
        if isinstance(op, str) and op.split("::")[0] in OPERATORS:
            return lambda function: function
        return register_fake(op, *arguments, **keywords)

    torch._ops._OpNamespace.__getattr__ = find_or_stand_in  # type: ignore[method-assign]
    torch.library.register_fake = register_known


def _fake_platform() -> None:
    import vllm.platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class H100(CudaPlatformBase):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*CAPABILITY)

        @classmethod
        def has_device_capability(cls, capability: Any, device_id: int = 0) -> bool:
            wanted = capability if isinstance(capability, tuple) else divmod(capability, 10)
            return wanted <= CAPABILITY

        @classmethod
        def num_compute_units(cls, *device: int) -> int:
            return 132

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA H100"

        @classmethod
        def log_warnings(cls) -> None:
            """The original queries the driver."""

    # vLLM recognises the CUDA platform by its module's name.
    H100.__module__ = CudaPlatformBase.__module__
    vllm.platforms._current_platform = H100()


def _fake_flash_attention_modules() -> None:
    """``vllm.vllm_flash_attn``, which is compiled code in the wheel."""
    package = types.ModuleType("vllm.vllm_flash_attn")
    interface = types.ModuleType("vllm.vllm_flash_attn.flash_attn_interface")
    package.__path__ = []
    for module in (package, interface):
        module.fa_version_unsupported_reason = lambda version: None  # type: ignore[attr-defined]
        module.is_fa_version_supported = lambda version: version in (2, 3)  # type: ignore[attr-defined]
    for name in ("flash_attn_varlen_func", "get_scheduler_metadata", "compile_flash_attn_varlen_func_from_specs"):
        setattr(package, name, None)  # replaced where they are used
    sys.modules[package.__name__], sys.modules[interface.__name__] = package, interface


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    softmax_scale: float,
    out: torch.Tensor | None = None,
    causal: bool = True,
    window_size: list[int] | None = None,
    softcap: float = 0.0,
    s_aux: torch.Tensor | None = None,
    return_softmax_lse: bool = False,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    **others: Any,
) -> Any:
    """``flash_attn_varlen_func`` over pages ``k``, ``v`` ``[pages, B, HK, D]``, in float32."""
    assert window_size in (None, [-1, -1]) and not softcap and s_aux is None
    out = torch.empty(q.shape, dtype=torch.bfloat16) if out is None else out
    lse = torch.empty(q.shape[1], len(q))
    starts, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
    assert len(q) == len(out) == starts[-1], "rows without a request"

    def scale(factor: torch.Tensor | None, request: int) -> float:
        return 1.0 if factor is None else float(factor[request, 0])

    for request, length in enumerate(lengths):
        rows = slice(starts[request], starts[request + 1])
        pages = block_table[request, : -(-length // k.shape[1])].long()
        keys, values = (
            cache[pages].flatten(0, 1)[:length].float().mul_(scale(factor, request)).repeat_interleave(
                q.shape[1] // cache.shape[2], 1
            )
            for cache, factor in ((k, k_descale), (v, v_descale))
        )  # fmt: skip
        query = q[rows].float() * (scale(q_descale, request) * softmax_scale)
        scores = torch.einsum("qhd,khd->hqk", query, keys)
        if causal:
            positions = torch.arange(length - scores.shape[1], length)
            scores.masked_fill_(torch.arange(length) > positions[:, None], -torch.inf)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(out.dtype)
        lse[:, rows] = scores.logsumexp(-1)
    return (out, lse) if return_softmax_lse else out


def write_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """``reshape_and_cache_flash`` into pages ``[pages, B, HK, D]``."""
    page, slot = slot_mapping // key_cache.shape[1], slot_mapping % key_cache.shape[1]
    for rows, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        rows = rows[: len(slot_mapping)]
        if kv_cache_dtype.startswith("fp8"):
            rows = (rows.float() / scale).to(torch.float8_e4m3fn).view(cache.dtype)
        cache[page, slot] = rows.to(cache.dtype)


def merge_states(
    output: torch.Tensor, first: torch.Tensor, first_lse: torch.Tensor, second: torch.Tensor, second_lse: torch.Tensor
) -> None:
    """``merge_attn_states``: two parts of a row's keys, with log-sum-exps ``[H, rows]``."""
    share = torch.sigmoid(first_lse - second_lse).T[..., None]
    output.copy_(first * share + second * (1 - share))
