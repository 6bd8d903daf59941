"""What a checkpoint is: its dimensions, by config and names, and whether two folders are one model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from streamshard.checkpoint.file_names import MODEL_CONFIG_NAME
from streamshard.checkpoint.folder import Checkpoint
from streamshard.errors import InputError, printable
from streamshard.internvl.detection import dims_from_names
from streamshard.internvl.model_config import (
    INNER,
    OTHER,
    Dims,
    check_config,
    config_layout,
    dims_from_config,
    llm_architecture,
)

__all__ = ["adapter_architecture", "dimensions", "dims_of_hf", "dims_of_source", "model_dims"]

# What must be equal in both configs, by the names of the custom and of the HF config. The order of
# the weights says nothing of these, and a wrong one is a model that talks nonsense.
_LLM_KEYS = (
    "hidden_size",
    "intermediate_size",
    "rms_norm_eps",
    "rope_theta",
    "hidden_act",
    "num_experts_per_tok",
    "norm_topk_prob",
)
_TOP_KEYS = (("downsample_ratio", "downsample_ratio"), ("select_layer", "vision_feature_layer"))
_VISION_KEYS = (
    "image_size",
    "patch_size",
    "layer_norm_eps",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
)


def adapter_architecture(config: Mapping[str, Any], name: str) -> str | None:
    """The custom class that an adapter's name is of, where the base is HF and of type llama."""
    inner = config.get("text_config")
    if isinstance(inner, dict) and inner.get("model_type") == "llama":
        # Such a base does not say which custom class it came from; the adapter's names do.
        internlm2 = re.search(
            r"\.(?:attention\.w|feed_forward\.w|tok_embeddings\.)|language_model\.output\.", name
        )
        return "InternLM2ForCausalLM" if internlm2 else "LlamaForCausalLM"
    return None


def model_dims(source: Checkpoint, reference: Checkpoint, layout: str) -> Dims:
    """The dimensions of a model that goes to `layout`; both configs must agree on them.

    What one of them leaves out, as transformers does with defaults, the other one says. Raises
    `InputError` if they are of different models, or describe what HF cannot express.
    """
    configs = {OTHER[layout]: source, layout: reference}
    custom, hf = configs["custom"], configs["hf"]
    architecture = None
    if custom.config is not None:
        where = printable(str(custom.path / MODEL_CONFIG_NAME))
        _check_layout(custom, "custom", where)
        check_config(custom.config, where)
        architecture = llm_architecture(custom.config, where)
    found = {}
    for side, checkpoint in (("custom", custom), ("hf", hf)):
        if checkpoint.config is not None:
            where = printable(str(checkpoint.path / MODEL_CONFIG_NAME))
            _check_layout(checkpoint, side, where)
            found[side] = dims_from_config(
                checkpoint.config, architecture=architecture, where=where
            )
    if not found:
        raise InputError(
            f"{printable(str(source.path))}: has no config.json, so the heads of its attention are not "
            "known. Give the whole folder."
        )
    if len(found) < 2:
        return next(iter(found.values()))
    _compare_dims(found["custom"], found["hf"], reference.path)
    _compare_configs(custom, hf, reference.path)
    said = {
        field.name: getattr(found["custom"], field.name)
        for field in fields(Dims)
        if getattr(found["hf"], field.name) is None
    }
    return replace(found["hf"], **said)


def _check_layout(checkpoint: Checkpoint, side: str, where: str) -> None:
    found = config_layout(checkpoint.config or {})
    if found != side:
        kind = "neither layout" if found is None else f"the {found} layout"
        raise InputError(
            f"{where}: model_type is of {kind}, but a {side} model (model_type "
            f"{'internvl_chat' if side == 'custom' else 'internvl'}) was expected here. "
            "Are the two folders swapped?"
        )


def _compare_dims(custom: Dims, hf: Dims, path: Path) -> None:
    for field in fields(Dims):
        if field.name == "tied":
            continue
        one, other = getattr(custom, field.name), getattr(hf, field.name)
        if one is not None and other is not None and one != other:
            raise InputError(
                f"{printable(str(path))}: is of another model: {field.name} is {one} in the custom "
                f"config but {other} in the HF config. Give the reference of the same model."
            )


def _compare_configs(custom: Checkpoint, hf: Checkpoint, path: Path) -> None:
    one, other = custom.config or {}, hf.config or {}
    pairs = [(key, one.get(key), other.get(name)) for key, name in _TOP_KEYS]
    for inner, twin, keys in (
        ("llm_config", "text_config", _LLM_KEYS),
        ("vision_config", "vision_config", _VISION_KEYS),
    ):
        mine, theirs = one.get(inner) or {}, other.get(twin) or {}
        pairs += [(f"{inner}.{key}", _value(mine, key), _value(theirs, key)) for key in keys]
    for key, left, right in pairs:
        if left is not None and right is not None and left != right:
            raise InputError(
                f"{printable(str(path))}: is of another model: {key} is "
                f"{printable(str(left))} in the custom config but {printable(str(right))} in the HF "
                "config, and the weights were trained with one of them. Give the "
                "reference of the same model, or make the configs agree."
            )


def _value(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    if key == "rope_theta" and value is None and isinstance(config.get("rope_parameters"), dict):
        value = config["rope_parameters"].get("rope_theta")
    if isinstance(value, list) and len(set(map(str, value))) == 1:
        value = value[0]  # HF has [height, width]
    return value


def dimensions(found: Checkpoint) -> dict[str, Any] | None:
    """The dimensions in `config.json`, as far as they can be told without another folder."""
    if found.config is None:
        return None
    try:
        dims = dims_from_config(found.config)
    except InputError:
        try:
            # What HF calls llama has several custom classes; the dimensions are the same.
            dims = dims_from_config(found.config, architecture="LlamaForCausalLM")
        except InputError:
            return None
    return {
        "vision_layers": dims.blocks,
        "vision_hidden": dims.vision_hidden,
        "layers": dims.layers,
        "heads": dims.heads,
        "kv_heads": dims.kv_heads,
        "head_dim": dims.head_dim,
        "experts": dims.experts,
    }


def dims_of_hf(found: Checkpoint, config: Mapping[str, Any] | None) -> Dims | None:
    """The dimensions of an HF checkpoint; None if it has no config, and cannot get one."""
    config = found.config or config
    if config is None:
        return None
    inner = config.get("text_config")
    llama = isinstance(inner, dict) and inner.get("model_type") == "llama"
    return dims_from_config(config, architecture="LlamaForCausalLM" if llama else None)


def dims_of_source(source: Checkpoint, layout: str) -> Dims:
    """The dimensions by the config, or by the names where there is none."""
    if source.config is None:
        return dims_from_names(source.tensors, layout)
    where = printable(str(source.path / MODEL_CONFIG_NAME))
    inner = source.config.get(INNER[layout])
    # What HF calls llama has several custom classes, but the same names in HF.
    llama = layout == "hf" and isinstance(inner, dict) and inner.get("model_type") == "llama"
    architecture = "LlamaForCausalLM" if llama else None
    return dims_from_config(source.config, architecture=architecture, where=where)
