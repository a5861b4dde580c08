"""Everything that depends on vLLM's versions and private parts, in one place."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm.v1.attention.backend import CommonAttentionMetadata

NAME = "MINFERENCE"
OLDEST, NEWEST = (0, 26), (0, 33)
FIRST_RELEASE = (0, 2)
"""Builds from a checkout without vLLM's tags have lower numbers."""
CLASS_PATHS = {
    "cpu": "minference_vllm.backend.cpu.MInferenceCPUBackend",
    "cuda": "minference_vllm.backend.gpu_parent.MInferenceGPUBackend",
}


class StartError(RuntimeError):
    """vLLM cannot start with minference; the message says why and what to do.

    Not a ValueError: pydantic, with which vLLM validates its configuration, would wrap that in its own error, followed
    by an excerpt of the configuration and a link. This way the message is the last line of the traceback.
    """


def check_vllm() -> str:
    """Check the installed vLLM and describe its version.

    A release is judged by its number. A build from source often has no meaningful number (``0.1.dev1+g3f2a9c1``,
    ``dev``): it is judged by whether it has the parts that we use.

    Raises:
        RuntimeError: a release outside the supported range, or a build that lacks parts.
    """
    version = vllm_version()
    span = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    supported = f"minference-vllm supports vLLM {span}"
    number = re.match(r"v?(\d+)\.(\d+)", version)
    release = (int(number[1]), int(number[2])) if number else (0, 0)
    if release >= FIRST_RELEASE:
        if not OLDEST <= release <= NEWEST:
            raise RuntimeError(f"{supported}, found {version}")
        return f"{version} (supported: {span})"
    from minference_vllm.backend.vllm_parts import missing_parts, vllm_folder

    missing = list(missing_parts(vllm_folder()))
    if missing:
        others = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise RuntimeError(f"{supported}; this build from source, {version!r}, lacks {', '.join(missing[:3])}{others}")
    return f"{version}, a build from source with all that minference uses (supported: {span}, others untested)"


def vllm_version() -> str:
    """vLLM's version; ``vllm.__version__`` if no distribution named ``vllm`` is installed, as in a source tree."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        from vllm import __version__

        return str(__version__)


def register_name() -> None:
    """Bind the name to vLLM's slot for custom backends. Idempotent.

    A member added by ``register_backend("MINFERENCE", ...)`` would not survive the spawn of the engine process: the
    configuration is pickled by value and unpickled before plugins load. An enum *alias* of CUSTOM pickles as CUSTOM,
    which every process knows.

    Raises:
        RuntimeError: another plugin has taken the slot. If one takes it later, the name is removed with a warning,
            since the alias would stand for that plugin's backend; selecting it then raises an error that says so.
    """
    from vllm.v1.attention.backends import registry

    custom = registry.AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() not in CLASS_PATHS.values():
        raise RuntimeError(_slot_is_taken_by(custom.get_path()))
    registry.register_backend(custom, CLASS_PATHS["cpu" if vllm_platform().is_cpu() else "cuda"])
    registry.AttentionBackendEnum._member_map_[NAME] = custom
    if not isinstance(registry._ATTN_OVERRIDES, _WatchedOverrides):
        registry._ATTN_OVERRIDES = _WatchedOverrides(registry._ATTN_OVERRIDES)


def refuse_name(reason: str) -> None:
    """Make selecting our name raise StartError with this reason, instead of vLLM's "Unknown attention backend".
    Nothing else changes: the name is not a member, and the platform is not patched. Idempotent."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    AttentionBackendEnum._member_map_ = _RefusingMembers(AttentionBackendEnum._member_map_, reason)


class _RefusingMembers(dict[str, Any]):
    """The members of vLLM's backend enum, with the reason why ours is missing."""

    def __init__(self, members: dict[str, Any], reason: str) -> None:
        super().__init__(members)
        self.reason = reason

    def __missing__(self, name: str) -> Any:
        raise StartError(self.reason) if name == NAME else KeyError(name)


def unavailable(reason: str) -> str:
    return f"attention backend 'minference' is not available: {reason}"


def _slot_is_taken_by(path: str) -> str:
    return (
        f"minference-vllm needs vLLM's slot for a custom attention backend, which {path} has taken; "
        "uninstall that plugin, or leave it out with VLLM_PLUGINS=minference"
    )


class _WatchedOverrides(dict[Any, str]):
    """vLLM's table of overridden backends, which removes our name if another plugin takes the slot."""

    def __setitem__(self, backend: Any, path: str) -> None:
        super().__setitem__(backend, path)
        if backend.name != "CUSTOM" or path in CLASS_PATHS.values():
            return
        if type(backend)._member_map_.pop(NAME, None) is not None:
            reason = unavailable(_slot_is_taken_by(path))
            logging.getLogger("vllm.minference_vllm").warning(reason)
            refuse_name(reason)


def vllm_platform() -> Any:
    """vLLM's platform: one object per process, shared by all of vLLM and resolved on first use."""
    from vllm.platforms import current_platform

    return current_platform


def platform_name(platform: Any) -> str:
    """The class of a platform, with its module."""
    return f"{type(platform).__module__}.{type(platform).__qualname__}"


def serves_what_is_selected(platform: Any) -> bool:
    """Whether this is a platform of vLLM's that serves the selected attention backend or says why it cannot.

    Only the CUDA platform does. CPU platforms log a line and serve another backend, and platforms of other plugins may
    do the same.
    """
    return type(platform).__module__ == "vllm.platforms.cuda"


def resolved_class() -> str | None:
    """The class that our name stands for after vLLM has loaded its plugins; None if the name is still unknown."""
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    load_general_plugins()
    member = AttentionBackendEnum.__members__.get(NAME)
    return None if member is None else str(member.get_path())


def selects_minference(vllm_config: Any) -> bool:
    """Whether this configuration names our backend, for all layers or for some kind of KV-cache group."""
    attention = vllm_config.attention_config
    return any(map(is_minference, [attention.backend, *getattr(attention, "backend_per_kind", {}).values()]))


def is_minference(backend: Any) -> bool:
    """Whether a member of vLLM's backend enum (or None) stands for our backend."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return (
        backend is AttentionBackendEnum.CUSTOM
        and backend.is_overridden()
        and backend.get_path() in CLASS_PATHS.values()
    )


def add_worker_method(name: str, method: Callable[[Any], Any]) -> None:
    """Let ``collective_rpc(name)`` call ``method(worker)`` if this is a worker process. Idempotent."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, name, method)


async def ask_every_engine(engine_client: Any, method: str) -> list[list[Any]]:
    """The workers' results of ``collective_rpc(method)``, by data-parallel engine of a server's client.

    vLLM's own call asks all engines but returns only the first one's results.
    """
    client = getattr(engine_client, "engine_core", None)
    engines = getattr(client, "core_engines", ())
    ask = getattr(client, "_call_utility_async", None)
    if len(engines) < 2 or ask is None:
        return [await engine_client.collective_rpc(method)]
    return await asyncio.gather(*(ask("collective_rpc", method, None, (), None, engine=engine) for engine in engines))


def slice_requests(common: CommonAttentionMetadata, first: int, last: int) -> CommonAttentionMetadata:
    """The metadata of requests ``[first, last)`` of a batch, as if they were a batch of their own."""
    import dataclasses

    starts = common.query_start_loc_cpu
    begin, end = int(starts[first]), int(starts[last])
    lengths = (starts[first + 1 : last + 1] - starts[first:last]).tolist()
    fields: dict[str, Any] = {
        "query_start_loc": common.query_start_loc[first : last + 1] - begin,
        "query_start_loc_cpu": starts[first : last + 1] - begin,
        "seq_lens": common.seq_lens[first:last],
        "num_reqs": last - first,
        "num_actual_tokens": end - begin,
        "max_query_len": max(lengths),
        "block_table_tensor": common.block_table_tensor[first:last],
        "slot_mapping": common.slot_mapping[begin:end],
    }
    for per_request in ("seq_lens_cpu_upper_bound", "_seq_lens_cpu", "is_prefilling", "dcp_local_seq_lens", "req_idx"):
        value = getattr(common, per_request, None)
        if value is not None:
            fields[per_request] = value[first:last]
    # Values that vLLM has cached for the whole batch.
    fields |= {field.name: None for field in dataclasses.fields(common) if field.name.endswith("_cache")}
    return dataclasses.replace(common, **fields)


def host_seq_lens(common: CommonAttentionMetadata, is_draft: bool = False) -> list[int] | None:
    """The sequence length of each request, without a host synchronisation; None if the host does not know them.

    Exact for prefills; on a GPU a decode that verifies drafted tokens may be shorter.

    Args:
        is_draft: whether it is a draft model's batch. vLLM adds a token to these lengths, but only on the device.
    """
    if common.seq_lens.device.type == "cpu":
        return [int(length) for length in common.seq_lens[: common.num_reqs].tolist()]
    # The upper bound is the newer field; before 0.30 there were the lengths themselves, perhaps unset.
    for name in () if is_draft else ("seq_lens_cpu_upper_bound", "_seq_lens_cpu"):
        lengths = getattr(common, name, None)
        if lengths is not None:
            return [int(length) for length in lengths[: common.num_reqs].tolist()]
    return None


def dense_batch_reason(common: CommonAttentionMetadata) -> str | None:
    """Why a whole batch is left to vLLM's path (its mask is not plain causal), or None."""
    if common.causal is not True:
        return "not causal"
    if getattr(common, "mm_req_doc_ranges", None):
        return "tokens of images attend both ways"
    if getattr(common, "rswa_prefix_lens", None) is not None:
        return "reference sliding window"
    return None


def page_reasons(spec: Any) -> list[str]:
    """Why pages of this vLLM KV-cache spec do not consist of the keys and values of the layer's heads alone; empty if
    they do. Padding after a page does not matter, extra data inside it (e.g. per-token scales) does."""
    plain = spec.block_size * spec.num_kv_heads * 2 * spec.head_size * spec.dtype.itemsize
    stored = spec.real_page_size_bytes
    return [] if stored == plain else [f"pages of {stored} bytes, where keys and values take {plain}"]


def gpu_pages(kv_cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the keys and the values in the cache of vLLM's FlashAttention or Triton backend, each
    ``[num_blocks, num_kv_heads, block_size, D]``.

    Args:
        kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * D]``, keys and values side by side; or, with a separate
            dimension for keys and values, ``[2, num_blocks, block_size, num_kv_heads, D]`` or ``[num_blocks, 2,
            block_size, num_kv_heads, D]``. Strides are arbitrary, so the memory layout may be NHD or HND.

    Raises:
        ValueError: the cache has none of these shapes.
    """
    shape = tuple(kv_cache.shape)
    if len(shape) == 4 and shape[3] == 2 * head_size:
        return kv_cache[..., :head_size], kv_cache[..., head_size:]
    # With two blocks the dimensions would be ambiguous.
    if len(shape) == 5 and shape[4] == head_size and shape[:2].count(2) == 1:
        key, value = kv_cache.unbind(shape.index(2))
        return key.transpose(1, 2), value.transpose(1, 2)
    raise ValueError(f"minference does not know a KV cache of shape {shape} with heads of {head_size}")
