"""Which pattern file a model runs with when several could be meant, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minference_vllm.patterns.file import PatternFile, load_pattern_file, parse_patterns, shipped_pattern_files
from minference_vllm.patterns.kinds import HeadPattern
from minference_vllm.settings import Settings

DEFAULTS = {"cpu": "default_cpu", "cuda": "default_cuda"}
"""What is shipped for a model that nobody has looked at, by platform: the cheapest there that loses no more text than
``docs/benchmarks.md`` says."""
CHECKPOINT_FILE = "sparse_attention_config.json"


def discover_patterns(settings: Settings, model: Any, platform: str) -> tuple[PatternFile, str]:
    """The patterns a model runs with, and where they came from and why, in words.

    The first of: the user's file; the checkpoint's own (in its configuration, or ``sparse_attention_config.json``
    beside its weights); a shipped file found on this model, else on its architecture; the shipped default. The first
    two are taken as they are: whoever wrote them meant this model. A shipped file is taken only when it describes as
    many layers and heads as the model has.

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
    """What every head runs where no pattern is given: the pattern of the shipped ``default_cpu`` or ``default_cuda``.

    Raises:
        ValueError: ``platform`` is neither ``"cpu"`` nor ``"cuda"``.
    """
    if platform not in DEFAULTS:
        raise ValueError(f"platform must be one of {', '.join(map(repr, DEFAULTS))}, not {platform!r}")
    return load_pattern_file(DEFAULTS[platform]).default


def model_names(model: str) -> set[str]:
    """The names by which a model may be meant, in lower case: as it stands (``organisation/name``), and without folders
    or organisation. A folder of the Hugging Face cache stands for the model it holds."""
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
    """What differs from layer to layer in a model's configuration; one entry where nothing does.

    Args:
        config: transformers' configuration of the text model. A heterogeneous one (Gemma 4, whose layers have heads of
            two sizes) refuses to say what differs; its layers' configurations do.
    """
    return list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]


def total_query_heads(model: Any) -> int:
    """Query heads per layer, before tensor parallelism: the most that a layer has; 0 in a model without attention."""
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
        # The usual case: most checkpoints have none. Offline, the hub's cache has been asked.
        return None
