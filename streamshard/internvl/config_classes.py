"""The classes that read `config.json`: which there are, and what they assume for absent keys.

transformers writes no key that has the default of its class, so that an absent one means this. Sources:
the classes `InternVLConfig`, `InternVLVisionConfig`, `QianfanOCRConfig`, `LlamaConfig`, `Qwen2Config`,
`Qwen3Config`, `Qwen3MoeConfig`, `Phi3Config`, `GptOssConfig` of transformers; InternVL's
`InternVLChatConfig`, `InternVisionConfig`, `InternLM2Config`; InternLM3's own `InternLM3Config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from streamshard.internvl.families import Family, Layout
from streamshard.values import frozen

__all__ = ["KINDS", "TOP_DEFAULTS", "VISION_DEFAULTS", "Kind", "llm_defaults"]


@frozen
class Kind:
    """What a `model_type` at the top of a config means.

    `keys` are the layout whose keys the config has, `title` the name of a relative of InternVL, which
    has no model of the other layout (see `relatives`), `defaults` those of its own class.
    """

    keys: Layout
    title: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)


# InternVisionConfig has the values of the 6B encoder with 48 layers (also for the 300M encoder),
# InternVLVisionConfig those of 300M without biases.
VISION_DEFAULTS: dict[Layout, dict[str, Any]] = {
    "custom": {
        "num_hidden_layers": 48,
        "hidden_size": 3200,
        "intermediate_size": 12800,
        "num_attention_heads": 25,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 14,
        "qkv_bias": False,
        "qk_normalization": True,
        "norm_type": "rms_norm",
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
    },
    "hf": {
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_channels": 3,
        "image_size": 448,
        "patch_size": 14,
        "attention_bias": False,
        "use_qk_norm": False,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
    },
}
TOP_DEFAULTS: dict[Layout, dict[str, Any]] = {
    "custom": {"downsample_ratio": 0.5, "select_layer": -1, "ps_version": "v1"},
    "hf": {"downsample_ratio": 0.5, "vision_feature_layer": -1, "tie_word_embeddings": True},
}

# By model_type. The relatives have InternVL's modules under InternVL's names, and more of their own.
KINDS: dict[str, Kind] = {
    "internvl_chat": Kind("custom"),
    "internvl": Kind("hf"),
    "skywork_chat": Kind("custom", "Skywork-R1V"),
    "internvlu_chat": Kind("custom", "InternVL-U"),
    "interns1": Kind("hf", "Intern-S1"),
    "qianfan_ocr": Kind(
        "hf", "Qianfan-OCR", {"attention_bias": True, "tie_word_embeddings": False}
    ),
}

_COMMON = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
}
_LLAMA = {**_COMMON, "attention_bias": False, "mlp_bias": False}
_QWEN2 = {
    **_COMMON,
    "attention_bias": False,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "max_position_embeddings": 32768,
}
_QWEN3 = {**_QWEN2, "head_dim": 128}
# None for key-value heads stands for as many as heads, None for head_dim for hidden size by heads.
_LLM_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "qwen3_moe": {
        **{key: value for key, value in _QWEN2.items() if key != "max_window_layers"},
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    "internlm2": {**_COMMON, "bias": True},
    "internlm3": {
        **_COMMON,
        "num_key_value_heads": 32,
        "qkv_bias": False,
        "bias": False,
        "max_position_embeddings": 32768,
    },
    "phi3": {
        **_COMMON,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "sliding_window": None,
    },
    "gpt_oss": {
        **_COMMON,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "attention_bias": True,
        "num_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
        "max_position_embeddings": 131072,
        "sliding_window": 128,
    },
}


def llm_defaults(family: Family, layout: Layout) -> Mapping[str, Any]:
    """What the class of the language model's config in a layout assumes for absent keys."""
    return _LLM_DEFAULTS[family.name if layout == "custom" else family.hf_type]
