"""Every fact about vLLM's versions and private parts, in one place."""

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
"""Lower numbers are those that builds have where no tag of vLLM's repository was there to count from."""
CLASS_PATHS = {
    "cpu": "minference_vllm.backend.cpu.MInferenceCPUBackend",
    "cuda": "minference_vllm.backend.gpu_parent.MInferenceGPUBackend",
}


class StartError(RuntimeError):
    """vLLM cannot start with minference; the message says why and what to do.

    No ValueError: pydantic, in which vLLM checks its configuration, would put that into an error of its own, before an
    excerpt of the configuration and a link. So this message is the last line of the traceback.
    """


def check_vllm() -> str:
    """What to say of the installed vLLM.

    A release is judged by its number. A build from source often has none that tells anything (``0.1.dev1+g3f2a9c1``,
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
    """vLLM's version; the package's own word where no distribution named ``vllm`` is installed, as in a source tree."""
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
        RuntimeError: another plugin has taken the slot. One that takes it later takes the name out of use again, with
            a warning: the alias would stand for that plugin's backend, and whoever selects it is told so.
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
    """Let the selection of our name raise StartError with this reason, in place of vLLM's "Unknown attention backend".
    Nothing else changes: the name is no member, and the platform is left alone. Idempotent."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    AttentionBackendEnum._member_map_ = _RefusingMembers(AttentionBackendEnum._member_map_, reason)


class _RefusingMembers(dict[str, Any]):
    """The members of vLLM's enum of backends, with a reason why ours is not among them."""

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
    """vLLM's table of overridden backends, which gives our name up when another plugin takes the slot."""

    def __setitem__(self, backend: Any, path: str) -> None:
        super().__setitem__(backend, path)
        if backend.name != "CUSTOM" or path in CLASS_PATHS.values():
            return
        if type(backend)._member_map_.pop(NAME, None) is not None:
            reason = unavailable(_slot_is_taken_by(path))
            logging.getLogger("vllm.minference_vllm").warning(reason)
            refuse_name(reason)


def vllm_platform() -> Any:
    """vLLM's platform: one object per process, which all of vLLM imports; found on first use."""
    from vllm.platforms import current_platform

    return current_platform


def platform_name(platform: Any) -> str:
    """The class of a platform, with its module."""
    return f"{type(platform).__module__}.{type(platform).__qualname__}"


def serves_what_is_selected(platform: Any) -> bool:
    """Whether this is a platform of vLLM's that serves the selected attention backend or says why it cannot.

    Only the one for CUDA does: those for CPUs log a line and serve another backend, and so may any that is not vLLM's.
    """
    return type(platform).__module__ == "vllm.platforms.cuda"


def resolved_class() -> str | None:
    """The class that our name stands for once vLLM has loaded its plugins; None when they have left it unknown."""
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
    """Let ``collective_rpc(name)`` call ``method(worker)`` in this process, if it is a worker's. Idempotent."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, name, method)


async def ask_every_engine(engine_client: Any, method: str) -> list[list[Any]]:
    """What the workers answer to ``collective_rpc(method)``, by data-parallel engine of a server's client.

    vLLM's own asks them all and hands on what the first one answers.
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
    # What vLLM has worked out from the whole batch's lengths.
    fields |= {field.name: None for field in dataclasses.fields(common) if field.name.endswith("_cache")}
    return dataclasses.replace(common, **fields)


def host_seq_lens(common: CommonAttentionMetadata, is_draft: bool = False) -> list[int] | None:
    """The sequence length of each request, without waiting for the GPU; None when the host does not know them.

    Exact for prefills; on a GPU a decode that verifies drafted tokens may be shorter.

    Args:
        is_draft: a draft model's batch. vLLM makes those longer by a token, and tells the device alone.
    """
    if common.seq_lens.device.type == "cpu":
        return [int(length) for length in common.seq_lens[: common.num_reqs].tolist()]
    # The upper bound is the newer field; before 0.30 the lengths themselves were there, perhaps unfilled.
    for name in () if is_draft else ("seq_lens_cpu_upper_bound", "_seq_lens_cpu"):
        lengths = getattr(common, name, None)
        if lengths is not None:
            return [int(length) for length in lengths[: common.num_reqs].tolist()]
    return None


def dense_batch_reason(common: CommonAttentionMetadata) -> str | None:
    """Why a whole batch is left to vLLM's path, or None: masks that are not plainly causal."""
    if common.causal is not True:
        return "not causal"
    if getattr(common, "mm_req_doc_ranges", None):
        return "tokens of images attend both ways"
    if getattr(common, "rswa_prefix_lens", None) is not None:
        return "reference sliding window"
    return None


def page_reasons(spec: Any) -> list[str]:
    """Why pages of this KV-cache spec of vLLM's are not keys and values of the layer's heads and nothing else; empty
    when they are. Padding behind a page does not matter, padding inside of it (scales of single tokens, say) does."""
    plain = spec.block_size * spec.num_kv_heads * 2 * spec.head_size * spec.dtype.itemsize
    stored = spec.real_page_size_bytes
    return [] if stored == plain else [f"pages of {stored} bytes, where keys and values take {plain}"]


def gpu_pages(kv_cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the keys and the values in the cache of vLLM's FlashAttention or Triton backend, each
    ``[num_blocks, num_kv_heads, block_size, D]``.

    Args:
        kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * D]``, keys and values side by side; or, with dimensions
            for the two of them, ``[2, num_blocks, block_size, num_kv_heads, D]`` or ``[num_blocks, 2, block_size,
            num_kv_heads, D]``. The strides say how the bytes lie (NHD or HND), so they may be any.

    Raises:
        ValueError: none of these.
    """
    shape = tuple(kv_cache.shape)
    if len(shape) == 4 and shape[3] == 2 * head_size:
        return kv_cache[..., :head_size], kv_cache[..., head_size:]
    # With two blocks nobody could say which of the dimensions is which.
    if len(shape) == 5 and shape[4] == head_size and shape[:2].count(2) == 1:
        key, value = kv_cache.unbind(shape.index(2))
        return key.transpose(1, 2), value.transpose(1, 2)
    raise ValueError(f"minference does not know a KV cache of shape {shape} with heads of {head_size}")
