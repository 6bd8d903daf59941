"""Whether two configs, one of each layout, are of the same model, in what no tensor shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from streamshard.internvl.config_classes import TOP_DEFAULTS, VISION_DEFAULTS, llm_defaults
from streamshard.internvl.families import FAMILIES, Layout
from streamshard.internvl.model_config import INNER, pair_of, section_of, with_defaults

__all__ = ["differences", "rope_scaling"]

# What must be equal in both configs. The weights say nothing of these, and a wrong one is a model
# that talks nonsense.
_LLM_KEYS = (
    "hidden_size",
    "intermediate_size",
    "rms_norm_eps",
    "rope_theta",
    "partial_rotary_factor",
    "hidden_act",
    "num_experts_per_tok",
    "norm_topk_prob",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
    "swiglu_limit",
    "swiglu_alpha",
)
_TOP_KEYS = (("downsample_ratio", "downsample_ratio"), ("select_layer", "vision_feature_layer"))
# What InternVLChatModel always does, and HF configs can say otherwise.
_FIXED = {"projector_hidden_act": "gelu", "vision_feature_select_strategy": "default"}
_FIXED_VISION = {
    "use_mean_pooling": True,
    "use_absolute_position_embeddings": True,
    "use_mask_token": False,
}
_VISION_KEYS = (
    "image_size",
    "patch_size",
    "layer_norm_eps",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "hidden_act",
)

# What the classes assume in the settings of the scaling, for each kind that has them.
_ROPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "yarn": {"beta_fast": 32, "beta_slow": 1, "truncate": True},
}
_ROPE_LENGTHS = {
    "dynamic": ("max_position_embeddings",),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("original_max_position_embeddings", "max_position_embeddings"),
}
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}


def differences(
    custom: Mapping[str, Any], hf: Mapping[str, Any], family: str
) -> Iterator[tuple[str, Any, Any]]:
    """The settings in which a custom and an HF config differ: what, and the value of each.

    A key that is absent means what its class assumes.
    """
    one = {**TOP_DEFAULTS["custom"], **_stated(custom)}
    other = {**TOP_DEFAULTS["hf"], **_stated(hf)}
    pairs = [(key, one[key], other[name]) for key, name in _TOP_KEYS]
    seen, twin = _vision(custom, "custom"), _vision(hf, "hf")
    pairs += [
        (f"vision_config.{key}", _alike(seen, key), _alike(twin, key)) for key in _VISION_KEYS
    ]
    pairs += [(key, value, other.get(key, value)) for key, value in _FIXED.items()]
    pairs += [
        (f"vision_config.{key}", value, twin.get(key, value))
        for key, value in _FIXED_VISION.items()
    ]
    if custom.get("force_image_size"):
        size = pair_of(custom, "force_image_size", "config.json")
        pairs.append(("force_image_size", size, pair_of(twin, "image_size", "vision_config")))
    mine, theirs = _llm(custom, "custom", family), _llm(hf, "hf", family)
    pairs += [(f"llm_config.{key}", mine.get(key), theirs.get(key)) for key in _LLM_KEYS]
    yield from (pair for pair in pairs if pair[1] != pair[2])


def _stated(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value is not None}


def _vision(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    section = section_of(config, "vision_config", "config.json")
    return with_defaults(section, VISION_DEFAULTS[layout])


def _alike(section: Mapping[str, Any], key: str) -> object:
    """A value, where HF may have [height, width] for one number."""
    value = section.get(key)
    if isinstance(value, list) and len(set(map(str, value))) == 1:
        return value[0]
    return value


def _llm(config: Mapping[str, Any], layout: Layout, family: str) -> dict[str, Any]:
    """The settings of the language model as its class has them."""
    section = section_of(config, INNER[layout], "config.json")
    found = with_defaults(section, llm_defaults(FAMILIES[family], layout))
    rope = section.get("rope_scaling") or section.get("rope_parameters") or {}
    # transformers 5, which alone reads HF configs in this way, believes the settings of the scaling.
    places = (section, rope) if layout == "custom" else (rope, section)
    for key, default in (("rope_theta", found["rope_theta"]), ("partial_rotary_factor", 1.0)):
        found[key] = places[0].get(key) or places[1].get(key) or default
    if found.get("use_sliding_window") is False:
        # The class forgets what is not used.
        found["sliding_window"] = found["max_window_layers"] = None
    found["layer_types"] = _sliding_layers(found, family)
    return found


def _sliding_layers(llm: Mapping[str, Any], family: str) -> list[int] | None:
    """Which layers see a window only, stated or as the class chooses them; None if it does not."""
    if family not in ("qwen2", "qwen3", "gpt_oss"):
        return None
    stated, count = llm.get("layer_types"), llm["num_hidden_layers"]
    if isinstance(stated, list):
        return [layer for layer, kind in enumerate(stated) if kind != "full_attention"]
    if family == "gpt_oss":
        return list(range(0, count, 2))
    return [] if llm["sliding_window"] is None else list(range(llm["max_window_layers"], count))


def rope_scaling(config: Mapping[str, Any], family: str) -> dict[str, Any] | None:
    """The scaling of rotary positions in the words of transformers 5; None if there is none."""
    layout: Layout = "custom" if config.get(INNER["custom"]) else "hf"
    inner = section_of(config, INNER[layout], "config.json")
    stated = inner.get("rope_scaling") or inner.get("rope_parameters") or {}
    if not stated.keys() - {"rope_theta"} and family == "gpt_oss":
        stated = _GPT_OSS_ROPE
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind == "default":
        return None
    kind = "longrope" if kind == "su" or (kind == "yarn" and family == "phi3") else kind
    rest = {
        key: value
        for key, value in stated.items()
        if value is not None
        and key not in ("type", "rope_type", "rope_theta", "partial_rotary_factor")
    }
    # The lengths that the formula of the kind is made of.
    whole = with_defaults(inner, llm_defaults(FAMILIES[family], layout))
    whole.setdefault("original_max_position_embeddings", whole["max_position_embeddings"])
    lengths = {key: whole[key] for key in _ROPE_LENGTHS.get(kind, ())}
    return {"rope_type": kind, **lengths, **_ROPE_DEFAULTS.get(kind, {}), **rest}
