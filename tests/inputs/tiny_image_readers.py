"""Models that also read images; the tests give them only text."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from tiny_decoders import WITHOUT_HEAD_DIM
from tiny_models import SIZES, VOCABULARY, random_model, save

SECTIONS = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
QWEN_TEXT: dict[str, Any] = {**WITHOUT_HEAD_DIM, "vocab_size": VOCABULARY + 8, "rope_parameters": SECTIONS}
"""Positions in three dimensions. Image tokens have ids that no prompt contains."""
MARKS = {
    name: VOCABULARY + number
    for number, name in enumerate(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"))
}


TEXT_ALONE: dict[str, Any] = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
"""Arguments of ``LLM``: reserve no memory for images."""


def torchvision_environment(folder: Path) -> dict[str, str]:
    """Environment in which vLLM can import these models: if torchvision is missing, with a stand-in in this folder."""
    if importlib.util.find_spec("torchvision") is not None:
        return {}
    return {"PYTHONPATH": str(torchvision_stand_in(folder))}


def torchvision_stand_in(folder: Path) -> Path:
    """Modules named torchvision without working functions. vLLM and transformers import it for images, which the tests
    do not use, and no build of it runs with a CPU build of torch from PyPI."""
    package, metadata = folder / "torchvision", folder / "torchvision-0.28.0.dist-info"
    package.mkdir(parents=True)
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    (package / "__init__.py").write_text(
        "import sys\nfrom unittest.mock import MagicMock\n\n"
        'for name in ("io", "transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional"):\n'
        '    sys.modules[f"torchvision.{name}"] = MagicMock()\n'
    )
    return folder


def qwen2_vl(folder: Path) -> Path:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 1, "embed_dim": 64, "hidden_size": 256, "mlp_ratio": 1, "num_heads": 2}
    config = Qwen2VLConfig(text_config=QWEN_TEXT, vision_config=vision, **MARKS)
    return save(random_model(Qwen2VLForConditionalGeneration, config), folder)


def qwen2_5_vl(folder: Path) -> Path:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 256}
    config = Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config={**vision, "fullatt_block_indexes": [0]}, **MARKS)
    return save(random_model(Qwen2_5_VLForConditionalGeneration, config), folder)


def llava(folder: Path) -> Path:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config=LlamaConfig(**SIZES | {"vocab_size": VOCABULARY + 8}),
        vision_config=CLIPVisionConfig(**vision, image_size=28, patch_size=14),
        image_token_index=VOCABULARY,
        image_seq_length=4,
    )
    return save(random_model(LlavaForConditionalGeneration, config), folder)
