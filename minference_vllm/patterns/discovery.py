"""Choose the pattern file that a model runs with, and say why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minference_vllm.patterns.file import PatternFile, load_pattern_file, parse_patterns, shipped_pattern_files
from minference_vllm.patterns.kinds import HeadPattern
from minference_vllm.settings import Settings

DEFAULTS = {"cpu": "default_cpu", "cuda": "default_cuda"}
"""The shipped default by platform, for models without a file of their own: the cheapest that loses no more text than
``docs/benchmarks.md`` says."""
CHECKPOINT_FILE = "sparse_attention_config.json"


def discover_patterns(settings: Settings, model: Any, platform: str) -> tuple[PatternFile, str]:
    """The patterns a model runs with, and a description of where they come from and why.

    The first of: the user's file; the checkpoint's own (in its configuration, or ``sparse_attention_config.json``
    beside its weights); a shipped file found on this model, else on its architecture; the shipped default. The first
    two are taken as they are, since they were written for this model. A shipped file is taken only if it has as many
    layers and heads as the model.

    Args:
        model: vLLM's model configuration, or a ``checkpoint.Checkpoint``.
        platform: one of ``DEFAULTS``.

    Raises:
        PatternError: the file that was found cannot be used.
    """
    if settings.patterns is not None:
        return load_pattern_file(settings.patterns), f"{settings.patterns} (the setting 'patterns')"
    dual_chunk = getattr(model.hf_config, "dual_chunk_attention_config", None) or {}
    if dual_chunk.get("sparse_attention_config"):
        source = "the checkpoint's configuration"
        return parse_patterns(dual_chunk["sparse_attention_config"], source), source
    beside = _file_beside_weights(model)
    if beside is not None:
        return load_pattern_file(str(beside)), f"{beside} (the checkpoint's own)"
    names = model_names(model.model)
    architectures = {name.lower() for name in getattr(model.hf_config, "architectures", None) or ()}
    for wanted, kind in ((names, "this model"), (architectures, "this architecture")):
        for name in shipped_pattern_files():
            patterns = load_pattern_file(name)
            if patterns.model and model_names(patterns.model) & wanted and _fits(patterns, model):
                return patterns, f"shipped {name!r} (found on {kind}: {patterns.model})"
    default = DEFAULTS[platform]
    return load_pattern_file(default), (
        f"shipped {default!r}, the default (no file was set, the checkpoint has none, none ships for this model)"
    )


def default_pattern(platform: str = "cpu") -> HeadPattern:
    """The pattern of every head if none is given: that of the shipped ``default_cpu`` or ``default_cuda``.

    Raises:
        ValueError: ``platform`` is neither ``"cpu"`` nor ``"cuda"``.
    """
    if platform not in DEFAULTS:
        raise ValueError(f"platform must be one of {', '.join(map(repr, DEFAULTS))}, not {platform!r}")
    return load_pattern_file(DEFAULTS[platform]).default


def model_names(model: str) -> set[str]:
    """The names that refer to a model, in lower case: as given (``organisation/name``), and without folders or
    organisation. A folder of the Hugging Face cache refers to the model it holds."""
    parts = Path(model).parts
    for part in parts:
        if part.startswith("models--"):
            return model_names(part.removeprefix("models--").replace("--", "/"))
    return {model.lower(), parts[-1].lower()} if parts else {model.lower()}


def _fits(patterns: PatternFile, model: Any) -> bool:
    try:
        patterns.check_model(model.get_total_num_hidden_layers(), total_query_heads(model))
    except ValueError:
        return False
    return True


def layer_configs(config: Any) -> list[Any]:
    """The configurations of a model's layers; a single entry if they do not differ.

    Args:
        config: transformers' configuration of the text model. A heterogeneous one (Gemma 4, whose layers have heads of
            two sizes) has the fields that differ only in its per-layer configurations.
    """
    return list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]


def total_query_heads(model: Any) -> int:
    """Maximum query heads of a layer, before tensor parallelism; 0 for a model without attention."""
    return max(int(getattr(config, "num_attention_heads", None) or 0) for config in layer_configs(model.hf_text_config))


def _file_beside_weights(model: Any) -> Path | None:
    """The checkpoint's own pattern file: in its folder, or on the Hugging Face hub."""
    if Path(model.model).is_dir():
        path = Path(model.model) / CHECKPOINT_FILE
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model.model, CHECKPOINT_FILE, revision=getattr(model, "revision", None)))
    except (OSError, ValueError):
        # The usual case: most checkpoints have none. Offline, the hub's cache has been searched.
        return None
