"""`config.json` of either layout, changed: ties, vocabulary, dtype, rotary settings."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from streamshard.errors import InputError
from streamshard.internvl.families import Layout
from streamshard.internvl.lora_targets import FLAGS
from streamshard.internvl.model_config import INNER, inferred_architecture, section_of

__all__ = ["config_fixes", "untied", "with_dtype", "with_vocabulary"]


# Fields of rope_scaling that older config classes insist on, and no others.
_ROPE_FIELDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}


def config_fixes(
    config: Mapping[str, Any], layout: Layout, *, has_head: bool = True
) -> dict[str, Any]:
    """The config as it must be written beside converted weights of `layout`.

    Where embedding and head are both stored, both tie flags become false (transformers 4 reads the
    inner one, 5 the outer one, whose default is true). LoRA flags become 0, and a custom config names
    the class of its language model, without which it cannot be loaded. Where rotary settings
    are only in `rope_parameters`, as transformers 5 writes them, `rope_theta` and `rope_scaling`
    are added: older readers know nothing else and would assume 10000.
    """
    fixed = copy.deepcopy(dict(config))
    inner = dict(section_of(fixed, INNER[layout], "config.json"))
    fixed[INNER[layout]] = inner
    if has_head:
        fixed["tie_word_embeddings"] = inner["tie_word_embeddings"] = False
    if layout == "custom":
        fixed |= dict.fromkeys(FLAGS, 0)
        inferred = inferred_architecture(inner)
        if inferred is not None:
            inner["architectures"] = [inferred]
    parameters = inner.get("rope_parameters")
    if not isinstance(parameters, dict):
        return fixed
    if any(isinstance(value, dict) for value in parameters.values()):
        raise InputError(
            f"config.json: {INNER[layout]}.rope_parameters differ between kinds of layers, which "
            "no InternVL model has. Write rope_theta and rope_scaling by hand."
        )
    if "rope_theta" in parameters:
        inner.setdefault("rope_theta", parameters["rope_theta"])
    if "partial_rotary_factor" in parameters:
        inner.setdefault("partial_rotary_factor", parameters["partial_rotary_factor"])
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default" and inner.get("rope_scaling") is None:
        if kind in _ROPE_FIELDS:
            scaling = {key: parameters[key] for key in _ROPE_FIELDS[kind] if key in parameters}
            inner["rope_scaling"] = {"type": kind, **scaling}
        else:
            elsewhere = ("rope_theta", "partial_rotary_factor", "type")
            scaling = {k: v for k, v in parameters.items() if k not in elsewhere}
            inner["rope_scaling"] = {**scaling, "rope_type": kind}
    return fixed


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config which says, wherever it may be read, that embedding and head are two tensors."""
    return _with_everywhere(config, "tie_word_embeddings", value=False, also_where_absent=True)


def with_vocabulary(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A config with `vocab_size` of `rows` wherever it has one."""
    return _with_everywhere(config, "vocab_size", value=rows, also_where_absent=False)


def _with_everywhere(
    config: Mapping[str, Any], key: str, *, value: Any, also_where_absent: bool
) -> dict[str, Any]:
    """A config with `key` set at the top and in that of the language model."""
    fixed = dict(config)
    sections = [fixed]
    for inner in INNER.values():
        if isinstance(fixed.get(inner), dict):
            fixed[inner] = dict(fixed[inner])
            sections.append(fixed[inner])
    for section in sections:
        if key in section or also_where_absent:
            section[key] = value
    return fixed


def with_dtype(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A config that states dtype `name` (like "bfloat16") wherever it states one."""

    def renamed(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            key: name if key in ("torch_dtype", "dtype") and inner is not None else renamed(inner)
            for key, inner in value.items()
        }

    return dict(renamed(dict(config)))
