"""What a checkpoint is, asked once: layout, names, dimensions, tie; and whether two are one model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from streamshard.checkpoint.file_names import MODEL_CONFIG_NAME
from streamshard.checkpoint.folder import Checkpoint
from streamshard.checkpoint.tokenizer import Tokenizer
from streamshard.errors import InputError, printable
from streamshard.internvl.detection import Detected, detect, dims_from_names, layout_of
from streamshard.internvl.families import LAYOUTS, Layout
from streamshard.internvl.model_config import (
    INNER,
    OTHER,
    Dims,
    check_config,
    config_layout,
    dims_from_config,
    llm_architecture,
)
from streamshard.internvl.spelling import flat_names
from streamshard.internvl.tied_embeddings import embedding_and_head, tied_names
from streamshard.tensors.lazy import Stored

__all__ = ["Model", "architecture_of", "dimensions", "dims_of", "model_dims"]

# How the tensors of InternLM2 are called, and no others of what HF has as llama.
_INTERNLM2 = re.compile(
    r"\.(?:attention\.w|feed_forward\.w|tok_embeddings\.)|language_model\.output\."
)

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


@dataclass(frozen=True)
class Model:
    """What a checkpoint is, told once: made where it is opened, and passed on.

    Every answer takes a pass over all names, of which there may be 40,000: it is found when somebody
    first asks, and is the same for all who ask later.
    """

    checkpoint: Checkpoint

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def where(self) -> str:
        """What messages call it."""
        return printable(str(self.path))

    @property
    def tensors(self) -> Mapping[str, Stored]:
        return self.checkpoint.tensors

    @property
    def config(self) -> Mapping[str, Any] | None:
        return self.checkpoint.config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer among the folder's files."""
        return Tokenizer.of(self.where, self.checkpoint.side_files)

    @cached_property
    def layout(self) -> Layout | None:
        """The layout of the names; None where they do not tell."""
        return layout_of(self.tensors)

    @cached_property
    def detected(self) -> Detected:
        """Spelling, family and evidence; raises `InputError` if this is no InternVL."""
        return detect(self.tensors, self.config)

    def given(self, layout: Layout) -> Mapping[str, str]:
        """The names of `layout` in the flat spelling, to those of the tensors.

        Raises `InputError` if two of them are the same tensor.
        """
        if layout not in self._given:
            self._given[layout] = MappingProxyType(flat_names(self.tensors, layout))
        return self._given[layout]

    @cached_property
    def _given(self) -> dict[Layout, Mapping[str, str]]:
        return {}

    @cached_property
    def embedding_and_head(self) -> tuple[str | None, str | None]:
        """The names of both, as far as they are there."""
        return embedding_and_head(self.tensors)

    @cached_property
    def tie(self) -> tuple[str, str] | None:
        """Embedding and head if the config has them as one; the bytes may differ all the same."""
        return tied_names(*self.embedding_and_head, self.config, lambda: self.detected)

    @cached_property
    def dims(self) -> Dims:
        """The dimensions by the config, or by the names where there is none."""
        if self.config is None:
            return dims_from_names(self.tensors, self.layout or "custom")
        return dims_of(self.config, where=printable(str(self.path / MODEL_CONFIG_NAME)))


def dims_of(config: Mapping[str, Any], name: str = "", where: str = "config.json") -> Dims:
    """The dimensions by one config alone.

    What HF calls llama has several custom classes: the same names in HF, the same dimensions. Which
    one is meant, the `name` of a tensor of an adapter may tell.
    """
    return dims_from_config(config, architecture=architecture_of(config, name), where=where)


def architecture_of(config: Mapping[str, Any], name: str = "") -> str | None:
    """The custom class to take where an HF config does not say it; None where it does."""
    inner = config.get(INNER["hf"])
    if not isinstance(inner, dict) or inner.get("model_type") != "llama":
        return None
    return "InternLM2ForCausalLM" if _INTERNLM2.search(name) else "LlamaForCausalLM"


def model_dims(source: Model, reference: Model, layout: Layout) -> Dims:
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
    for side in LAYOUTS:
        config = configs[side].config
        if config is not None:
            where = printable(str(configs[side].path / MODEL_CONFIG_NAME))
            _check_layout(configs[side], side, where)
            found[side] = dims_from_config(config, architecture=architecture, where=where)
    if not found:
        raise InputError(
            f"{source.where}: has no config.json, so the heads of its attention are not "
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


def _check_layout(model: Model, side: Layout, where: str) -> None:
    found = config_layout(model.config or {})
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


def _compare_configs(custom: Model, hf: Model, path: Path) -> None:
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


def dimensions(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The dimensions in `config.json`, as far as they can be told without another folder."""
    if config is None:
        return None
    try:
        dims = dims_of(config)
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
