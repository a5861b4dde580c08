"""With the setting ``kernel = auto`` on a GPU: find the fastest kernel of each layer when the engine starts.

Builders call ``choose_kernels`` after the weights are loaded and before CUDA graphs are captured. Results are kept on
disk (``kernels/choice_cache.py``), so that later starts, and ranks that start later, time nothing. Ranks of a tensor
parallel model choose independently: all kernels give the same result up to rounding, so ranks need not agree. Equal
ranks have equal cache keys and, after the first start, share one file.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from vllm.logger import init_logger

from minference_vllm import __version__
from minference_vllm.backend.compat import vllm_version
from minference_vllm.backend.variants import Variant, empty_inputs, random_inputs
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.plan import Chunk
from minference_vllm.core.tiling import whole_tile
from minference_vllm.kernels import choice_cache, choose
from minference_vllm.kernels.autotune import Budget, Trial, gpu_clock
from minference_vllm.kernels.choice_cache import Choice
from minference_vllm.kernels.kernel import Kernel
from minference_vllm.prefill.kernel_trial import DENSITIES, result_in_words, run_trial, trial_chunk, trial_pages

logger = init_logger(f"vllm.{__name__}")

_chosen: dict[Variant, str] = {}
"""Names of the chosen kernels in this process."""
_left_out: set[tuple[Variant, str]] = set()
"""Kernels that have failed in this process."""
_budget = Budget()
"""Time left for all trials of this process."""


def choose_kernels(layers: Sequence[Any], spec: Any, vllm_config: Any, device: torch.device) -> None:
    """Set each layer's kernel to the fastest that can run it. Kernels are timed if the fastest is not known, once per
    variant. A kernel that the user chose is kept.

    Args:
        layers: vLLM's attention layers that have our implementation, are prepared and run sparsely.
        spec: vLLM's spec of their KV cache.

    Raises:
        RuntimeError: every kernel failed; the message names the variant and each kernel's error.
    """
    before = len(_chosen)
    for layer in layers:
        LayerChoice(layer, spec, vllm_config, device).choose()
    if len(_chosen) > before:
        # Free memory for the CUDA graphs, which have a pool of their own.
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class LayerChoice:
    """Kernel candidates of one layer that is prepared and runs sparsely."""

    layer: Any
    """vLLM's attention layer with our implementation."""
    spec: Any
    """vLLM's spec of its KV cache."""
    vllm_config: Any
    device: torch.device

    @cached_property
    def _inputs(self) -> Inputs:
        chunk = Chunk(request=0, query_start=0, context_len=0, seq_len=1)
        return empty_inputs(self.layer, self.spec, self.vllm_config.model_config.dtype, chunk, self.device)

    @cached_property
    def _variant(self) -> Variant:
        return Variant.of(self.layer, self._inputs, self.layer.impl.sparse_layer.patterns)

    @cached_property
    def _chunk(self) -> Chunk:
        tokens = self.vllm_config.scheduler_config.max_num_batched_tokens
        return trial_chunk(self.vllm_config.model_config.max_model_len, tokens)

    def candidates(self) -> list[Kernel]:
        """Kernels that the layer may run: several only if the setting is ``auto`` and the fastest is not known. Failed
        kernels are left out, unless all have failed."""
        impl = self.layer.impl
        if impl.runtime.settings.kernel != "auto" or self.device.type != "cuda":
            return [impl.sparse_layer.kernel]
        able = choose.candidates("auto", self._inputs.query.dtype, self._inputs.cache, impl.needs_own_kernel)
        left = [kernel for kernel in able if (self._variant, kernel.name) not in _left_out] or able
        if len(left) > 1 and self._variant not in _chosen:
            folder = choice_cache.default_folder()
            known = choice_cache.load(folder, self._key(), [kernel.name for kernel in left])
            if known is not None:
                _chosen[self._variant] = known.kernel
                self._log(known, f"timed at an earlier start, kept in {folder}")
        name = _chosen.get(self._variant)
        return [kernel for kernel in left if kernel.name == name] or left

    def leave_out(self, kernel: Kernel, reason: object) -> None:
        """Do not use this kernel for layers of this variant from now on."""
        _left_out.add((self._variant, kernel.name))
        _chosen.pop(self._variant, None)
        logger.warning("minference: kernel %r is left out for layers of %s: %s", kernel.name, self._variant, reason)

    def choose(self) -> None:
        """Set the layer's kernel to the fastest.

        Raises:
            RuntimeError: see ``choose_kernels``.
        """
        kernels, settings = self.candidates(), self.layer.impl.runtime.settings
        if len(kernels) > 1:
            if self._chunk.seq_len < settings.min_context or self._chunk.query_len < settings.min_chunk:
                return  # no chunk is ever sparse
            name = self._timed(kernels)
            kernels = [kernel for kernel in kernels if kernel.name == name]
        self.layer.impl.run_by(kernels[0], self._inputs.query.dtype, self._inputs.cache)

    @torch.inference_mode()
    def _timed(self, kernels: Sequence[Kernel]) -> str:
        """Time these kernels and return the name of the fastest."""
        begin, page = time.perf_counter(), self.spec.block_size
        trial = Trial([kernel.name for kernel in kernels], gpu_clock(self.device), _budget)
        dtype, impl = self.vllm_config.model_config.dtype, self.layer.impl
        try:
            count, pages = trial_pages(-(-self._chunk.seq_len // page), self.spec.real_page_size_bytes, self.device)
            inputs = random_inputs(self.layer, self.spec, dtype, self._chunk, count, pages)
            run_trial(trial, kernels, inputs, impl.sparse_layer.patterns, impl.runtime.settings.tile)
        except torch.OutOfMemoryError as error:
            logger.warning("minference: kernels for layers of %s are not timed to the end: %s", self._variant, error)
        for kernel in kernels:
            if kernel.name in trial.failed:
                self.leave_out(kernel, trial.failed[kernel.name])
        try:
            name = trial.fastest()
        except RuntimeError as error:
            raise RuntimeError(f"minference: no kernel runs layers of {self._variant} here: {error}") from None
        _chosen[self._variant] = name
        choice, how = Choice(name, trial.totals()), f"timed in {time.perf_counter() - begin:.1f} s"
        self._log(choice, f"{how}, until the time for it was used up" if trial.is_over else how)
        # Not stored if a kernel failed or was not timed to the end: the next start may do better.
        if len(trial.medians) == len(DENSITIES) and len(choice.seconds) == len(kernels) and not trial.is_over:
            choice_cache.store(choice_cache.default_folder(), self._key(), choice)
        return name

    def _log(self, choice: Choice, how: str) -> None:
        found = result_in_words(choice, self._chunk.query_len, self._chunk.seq_len)
        logger.info("minference: kernel %s; layers of %s; %s", found, self._variant, how)

    def _key(self) -> dict[str, str | int]:
        """Cache key: everything that the timings depend on."""
        try:
            triton = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            triton = "none"
        return {
            "gpu": torch.cuda.get_device_name(self.device),
            "torch": str(torch.__version__),
            "triton": triton,
            "vllm": vllm_version(),
            "flash_attention": str(getattr(self.vllm_config.attention_config, "flash_attn_version", None)),
            "minference-vllm": __version__,
            "layer": str(self._variant),
            "heads_per_list": self._variant.heads_per_list,
            "tile": whole_tile(self.layer.impl.runtime.settings.tile, self.spec.block_size),
            "chunk_len": self._chunk.query_len,
            "seq_len": self._chunk.seq_len,
        }
