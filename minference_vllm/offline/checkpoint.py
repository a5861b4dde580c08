"""A model's configuration, read from its checkpoint without the weights and without starting vLLM."""

from __future__ import annotations

from typing import Any

import torch

from minference_vllm.backend.limits import (
    attention_chunk_reasons,
    gpu_head_size_reasons,
    unsupported_layer_reasons,
)
from minference_vllm.backend.runtime import model_patterns
from minference_vllm.kernels.choose import VLLMS, own_kernel_reason
from minference_vllm.patterns.discovery import layer_configs, total_query_heads
from minference_vllm.patterns.file import PatternFile
from minference_vllm.settings import Settings, load_settings

GENERATES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "ChatModel")
"""Name suffixes of the architectures that vLLM serves for text generation."""

CHUNKED = "chunked_attention"
FULL, WINDOWED = ("full_attention", "attention", "hybrid"), ("sliding_attention", "hybrid_sliding")
"""Kinds of layers with softmax attention, as transformers names them; hybrid layers have another kind beside it."""

BESIDE_ITSELF = ("cohere2", "cohere2_moe")
"""Models whose sliding window does not count the row itself."""


class Checkpoint:
    """A model's configuration, with the attributes of vLLM's ``ModelConfig`` that pattern discovery and support
    checks read.

    Args:
        model: a folder, or a name on the Hugging Face hub.
        trust_remote_code: as vLLM's option.

    Raises:
        OSError: no such model, or no configuration in it.
        ValueError: a model that transformers does not know, or one without layers.
    """

    def __init__(self, model: str, trust_remote_code: bool = False) -> None:
        from transformers import AutoConfig

        self.model = model
        try:
            self.hf_config: Any = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        except OSError as error:
            raise OSError(f"{model}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{model}: {error}") from None
        self.hf_text_config: Any = self.hf_config.get_text_config()
        if not isinstance(getattr(self.hf_text_config, "num_hidden_layers", None), int):
            raise ValueError(f"{model}: the configuration has no num_hidden_layers")

    @property
    def use_mla(self) -> bool:
        return getattr(self.hf_text_config, "kv_lora_rank", None) is not None

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(getattr(self.hf_config, "is_encoder_decoder", False))

    @property
    def runner_type(self) -> str:
        return "generate" if not self.architectures or self.architectures[0].endswith(GENERATES) else "pooling"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored weights; vLLM serves float32 checkpoints in bfloat16 unless told otherwise."""
        return getattr(self.hf_text_config, "dtype", None) or getattr(self.hf_config, "dtype", None) or torch.float32

    @property
    def architectures(self) -> list[str]:
        return list(getattr(self.hf_config, "architectures", None) or [])

    @property
    def num_heads(self) -> int:
        return total_query_heads(self)

    def get_total_num_hidden_layers(self) -> int:
        return int(self.hf_text_config.num_hidden_layers)

    def fixed_layers(self, settings: Settings) -> dict[int, str]:
        """Layer -> what runs on this machine instead of its patterns, and why, as far as the configuration tells."""
        return {
            layer: fixed
            for layer, (config, kind) in enumerate(zip(self._configs(), self._kinds(), strict=False))
            if (fixed := self._fixed(config, kind, settings))
        }

    def chunked_layers(self) -> list[int]:
        """Layers whose rows attend within chunks of the sequence."""
        return [layer for layer, kind in enumerate(self._kinds()) if kind == CHUNKED]

    def _configs(self) -> list[Any]:
        """The configuration of every layer."""
        configs = layer_configs(self.hf_text_config)
        return configs * self.get_total_num_hidden_layers() if len(configs) == 1 else configs

    def _kinds(self) -> list[str]:
        """The kind of every layer."""
        num_layers, kinds = self.get_total_num_hidden_layers(), getattr(self.hf_text_config, "layer_types", None)
        if kinds:
            return list(kinds[:num_layers])
        # Without a list of kinds, a window applies to every layer.
        windowed = [getattr(config, "sliding_window", None) is not None for config in self._configs()]
        return ["sliding_attention" if window else "full_attention" for window in windowed]

    def _fixed(self, config: Any, kind: str, settings: Settings) -> str | None:
        """What runs in a layer of this configuration instead of its patterns, and why; None if patterns run."""
        if kind not in (*FULL, *WINDOWED, CHUNKED):
            return f"no patterns: {kind.replace('_', ' ')}"
        # Our own kernels support soft caps and sinks, the CPU kernel also sliding windows.
        on_gpu, kernel = torch.cuda.is_available(), settings.kernel
        head_size = _head_size(config)
        native = not on_gpu and own_kernel_reason(kernel, self.dtype, head_size) is None
        own = native or (on_gpu and kernel not in VLLMS)
        window = getattr(config, "sliding_window", None) if kind in WINDOWED else None
        if window is not None and config.model_type in BESIDE_ITSELF:
            window += 1
        reasons = unsupported_layer_reasons(
            sliding_window=window,
            logits_soft_cap=None if own else getattr(config, "attn_logit_softcapping", None),
            alibi_slopes=True if getattr(config, "alibi", False) or config.model_type == "bloom" else None,
            sinks=True if config.model_type == "gpt_oss" and not own else None,
            is_decoder=True,
            kv_cache_dtype="auto",
            dtype=self.dtype,
            min_window=settings.min_context if native else None,
        )
        if on_gpu:
            reasons += gpu_head_size_reasons(head_size)
        if kind == CHUNKED:
            reasons += attention_chunk_reasons(getattr(config, "attention_chunk_size", None), settings.min_context)
        return f"dense: {', '.join(reasons)}" if reasons else None

    def __str__(self) -> str:
        architecture = self.architectures[0] if self.architectures else self.hf_config.model_type
        # Heterogeneous models have layers of several kinds.
        heads = dict.fromkeys(filter(None, map(_heads, layer_configs(self.hf_text_config))))
        described = " and ".join(heads) or "no attention heads"
        return (
            f"{self.model} ({architecture}, {self.get_total_num_hidden_layers()} layers, {described}, "
            f"{str(self.dtype).removeprefix('torch.')})"
        )


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _heads(config: Any) -> str | None:
    """The number of query and KV heads in words; None: no attention heads."""
    heads = getattr(config, "num_attention_heads", None)
    return f"{heads} query heads over {getattr(config, 'num_key_value_heads', None) or heads}" if heads else None


def planned_patterns(checkpoint: Checkpoint, pattern_file: str | None = None) -> tuple[PatternFile, str, Settings]:
    """What serving the model would run with: patterns, where they came from and why, and the settings.

    Args:
        pattern_file: the setting ``patterns``; None: from the environment.

    Raises:
        PatternError: the file cannot be used, or describes another model.
        SettingsError: the environment has an invalid setting.
    """
    settings = load_settings({"minference": {} if pattern_file is None else {"patterns": pattern_file}})
    return *model_patterns(settings, checkpoint), settings
