"""`config.json` of either layout, read: which layout, which family, which dimensions, tied or not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from streamshard.errors import InputError, listed, printable
from streamshard.internvl.config_classes import KINDS, VISION_DEFAULTS, llm_defaults
from streamshard.internvl.dims import Dims
from streamshard.internvl.families import FAMILIES, Family, Layout

__all__ = [
    "INNER",
    "OTHER",
    "Dims",
    "check_config",
    "config_layout",
    "dims_from_config",
    "inferred_architecture",
    "is_tied",
    "llm_architecture",
    "pair_of",
    "section_of",
    "with_defaults",
]


# Real models have at most 94 layers and 128 experts; a damaged config must not cost hours.
MAX_COUNT = 10_000
MAX_SIZE = 10**6

# The other layout, and where a config of each has that of the language model.
OTHER: dict[Layout, Layout] = {"custom": "hf", "hf": "custom"}

INNER: dict[Layout, str] = {"custom": "llm_config", "hf": "text_config"}
_VISION_SWITCHES: dict[Layout, tuple[str, str]] = {
    "custom": ("qkv_bias", "qk_normalization"),
    "hf": ("attention_bias", "use_qk_norm"),
}

# Keys for which a null is a value of its own: as many as heads, by hidden size and heads, no window.
_NULLABLE = ("num_key_value_heads", "head_dim", "sliding_window")


def config_layout(config: Mapping[str, Any]) -> Layout | None:
    """Answer "custom" or "hf", whose keys a `config.json` has, or None where it is of neither."""
    kind = KINDS.get(str(config.get("model_type")))
    return None if kind is None else kind.keys


def llm_architecture(config: Mapping[str, Any], where: str = "config.json") -> str:
    """The language model's class in a custom config, which selects the names of its tensors.

    Where `architectures` is missing or empty, it is that of the `model_type`. Raises `InputError` if
    neither says it, or if the family has no table.
    """
    llm = section_of(config, "llm_config", where)
    inferred = inferred_architecture(llm)
    named = llm.get("architectures") if inferred is None else [inferred]
    if isinstance(named, list) and named and isinstance(named[0], str):
        if any(family.architecture == named[0] for family in FAMILIES.values()):
            return named[0]
        known = listed([family.architecture for family in FAMILIES.values()], len(FAMILIES))
        raise InputError(
            f"{where}: llm_config.architectures is '{printable(named[0])}'; {known} are supported."
        )
    kind = printable(str(llm.get("model_type")))
    raise InputError(
        f"{where}: llm_config.architectures is missing, and model_type there is '{kind}'. They tell "
        "the language model's class: take config.json from the original model."
    )


def inferred_architecture(llm: Mapping[str, Any]) -> str | None:
    """The class by the `model_type` of a custom language model; None where the config names one."""
    if llm.get("architectures") not in (None, [], [""], [None]):
        return None
    kind = llm.get("model_type")
    return next((f.architecture for f in FAMILIES.values() if f.name == kind), None)


def dims_from_config(
    config: Mapping[str, Any], *, architecture: str | None = None, where: str = "config.json"
) -> Dims:
    """The dimensions that a `config.json` of either layout states.

    HF configs of type llama may be Llama, InternLM2 or InternLM3 in the custom layout; the
    `architecture` of the other side (see `llm_architecture`) decides. Raises `InputError` for
    what is missing, contradictory, not supported, or cannot be told; messages begin with `where`.
    """
    layout = config_layout(config)
    if layout is None:
        raise InputError(
            f"{where}: model_type is '{printable(str(config.get('model_type')))}'; 'internvl_chat' "
            f"or 'internvl' was expected{_or_relatives()}. Is this the folder of an InternVL model?"
        )
    inner = INNER[layout]
    llm, vision = section_of(config, inner, where), section_of(config, "vision_config", where)
    family = _family_of(config, llm, layout, architecture, where)
    # The classes take either name for it, and transformers 5 writes the second one.
    stated = [llm.get("num_experts"), llm.get("num_local_experts")]
    experts = {"num_experts": next((count for count in stated if count is not None), None)}
    llm = with_defaults({**llm, **experts}, llm_defaults(family, layout))
    kind = KINDS[str(config["model_type"])]
    seen = with_defaults(vision, {**VISION_DEFAULTS[layout], **kind.defaults})
    here = f"{where}: {inner}"
    heads, kv_heads, head_dim = _head_counts(llm, here)
    _check_rope(llm, here)
    layers = _count(llm, "num_hidden_layers", here)
    hidden = _count(llm, "hidden_size", here, limit=MAX_SIZE)
    # InternLM2 calls its switch `bias`; InternLM3 has one for q, k, v and one for everything else.
    attention_bias = [_switch(llm, key, here) for key in ("attention_bias", "qkv_bias", "bias")]
    mlp_bias = [_switch(llm, key, here) for key in ("mlp_bias", "bias")]
    there = f"{where}: vision_config"
    bias, norm = (_switch(seen, key, there) for key in _VISION_SWITCHES[layout])
    if seen["norm_type"] not in ("layer_norm", "rms_norm"):
        raise InputError(
            f"{there}.norm_type is '{printable(str(seen['norm_type']))}'; layer_norm or rms_norm "
            "was expected."
        )
    width = _count(seen, "hidden_size", there, limit=MAX_SIZE)
    images = pair_of(seen, "image_size", there)
    patches = pair_of(seen, "patch_size", there)
    return Dims(
        family=family.name,
        blocks=_count(seen, "num_hidden_layers", there),
        layers=layers,
        experts=_count(llm, "num_experts", here),
        vision_hidden=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=bias,
        qk_norm=norm,
        norm_bias=seen["norm_type"] == "layer_norm",
        attention_bias=next((b for b in attention_bias if b is not None), None),
        mlp_bias=next((b for b in mlp_bias if b is not None), None),
        position_table=layout == "custom"
        or _switch(seen, "use_absolute_position_embeddings", there) is not False,
        dense_layers=_dense_layers(llm, layers, here) if family.packed else None,
        tied=is_tied(config, llm),
        vision_inner=_count(seen, "intermediate_size", there, limit=MAX_SIZE),
        positions=math.prod(i // p for i, p in zip(images, patches, strict=True)) + 1,
        # InternVisionEmbeddings has three, whatever its config says.
        channels=3 if layout == "custom" else _count(seen, "num_channels", there),
        patch_height=patches[0],
        patch_width=patches[1],
        shuffled=None if width is None else width * _pixels(config, where),
        hidden=hidden,
        inner=_count(llm, "intermediate_size", here, limit=MAX_SIZE),
        expert_inner=_count(llm, "moe_intermediate_size", here, limit=MAX_SIZE),
    )


def _or_relatives() -> str:
    """What else is known, as messages say it."""
    known = [f"{kind.title} ('{name}')" for name, kind in KINDS.items() if kind.title]
    return f", or a relative: {', '.join(known)}"


def with_defaults(section: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A section of a config with what its class assumes for absent keys, and for nulls."""
    stated = {k: v for k, v in section.items() if v is not None or k in _NULLABLE}
    return {**defaults, **stated}


def pair_of(section: Mapping[str, Any], key: str, where: str) -> tuple[int, int]:
    """Height and width, of which configs may have one number for both."""
    value = section.get(key)
    pair = value if isinstance(value, list) else [value, value]
    sizes = [size for size in pair if type(size) is int and 0 < size <= MAX_COUNT]
    if not len(pair) == len(sizes) == 2:
        raise InputError(
            f"{where}.{key} is {printable(repr(value))}; a whole number from 1 to {MAX_COUNT:,}, or "
            "two in a list, was expected."
        )
    return sizes[0], sizes[1]


def _pixels(config: Mapping[str, Any], where: str) -> int:
    """How many pixels the projector takes as one, as `InternVLChatModel` and HF compute it."""
    ratio = config.get("downsample_ratio")
    ratio = 0.5 if ratio is None else ratio
    if type(ratio) not in (int, float) or not 1 / MAX_COUNT <= ratio <= 1:
        raise InputError(
            f"{where}: downsample_ratio is {printable(repr(ratio))}; a number above 0, at most 1, was "
            "expected."
        )
    return int(1 / ratio) ** 2


def check_config(config: Mapping[str, Any], where: str = "config.json") -> None:
    """Raise `InputError` if a custom config describes what the HF classes cannot do.

    `InternVLModel.pixel_shuffle` has one order of pixels, that of `ps_version: v2`; v1 is also
    what `InternVLChatConfig` assumes where the key is absent.
    """
    if config_layout(config) == "custom" and config.get("ps_version", "v1") == "v1":
        how = "is v1" if "ps_version" in config else "is absent, which means v1"
        raise InputError(
            f"{where}: ps_version {how}; the HF layout has only v2, so such a model cannot be "
            "converted: its weights expect another order of pixels. If the model was trained with "
            "v2, say so in the config."
        )


def _family_of(
    config: Mapping[str, Any],
    llm: Mapping[str, Any],
    layout: Layout,
    architecture: str | None,
    where: str,
) -> Family:
    if layout == "custom":
        own = llm_architecture(config, where)
        if architecture not in (None, own):
            raise InputError(
                f"{where}: the language model is {own}, but {printable(str(architecture))} was "
                "expected: these are configs of different models."
            )
        return next(f for f in FAMILIES.values() if f.architecture == own)
    # InternVLConfig takes a text config without a type for Qwen2.
    kind = str(llm.get("model_type", "qwen2"))
    fitting = [family for family in FAMILIES.values() if family.hf_type == kind]
    if not fitting:
        known = listed(sorted({family.hf_type for family in FAMILIES.values()}), len(FAMILIES))
        raise InputError(
            f"{where}: text_config.model_type is '{printable(kind)}'; {known} are supported."
        )
    chosen = [f for f in fitting if architecture is None or f.architecture == architecture]
    if not chosen:
        raise InputError(
            f"{where}: text_config.model_type is '{printable(kind)}', which is no "
            f"{printable(str(architecture))} in the custom layout: these are configs of "
            "different models."
        )
    if len(chosen) > 1:
        names = listed([family.architecture for family in chosen])
        raise InputError(
            f"{where}: text_config.model_type is '{kind}', which may be any of {names} in the "
            "custom layout. Only the config of the custom model tells: give its folder."
        )
    return chosen[0]


def _head_counts(llm: Mapping[str, Any], where: str) -> tuple[int | None, int | None, int | None]:
    """Heads, key-value heads, and rows of a head."""
    heads = _count(llm, "num_attention_heads", where)
    kv_heads = _count(llm, "num_key_value_heads", where)
    head_dim = _count(llm, "head_dim", where)
    hidden = _count(llm, "hidden_size", where, limit=MAX_SIZE)
    kv_heads = heads if kv_heads is None else kv_heads
    if heads is not None and kv_heads is not None and heads % kv_heads:
        raise InputError(
            f"{where}.num_attention_heads is {heads}, which num_key_value_heads, {kv_heads}, does "
            "not divide. The config is damaged or of another model."
        )
    if head_dim is None and hidden is not None and heads is not None:
        if hidden % heads:
            raise InputError(
                f"{where}.hidden_size is {hidden}, which num_attention_heads, {heads}, does not "
                "divide, and there is no head_dim. The config is damaged or of another model."
            )
        head_dim = hidden // heads
    return heads, kv_heads, head_dim


def _dense_layers(llm: Mapping[str, Any], layers: int | None, where: str) -> frozenset[int] | None:
    """Layers without experts, as `Qwen3MoeDecoderLayer` chooses them."""
    only, step = llm.get("mlp_only_layers"), _count(llm, "decoder_sparse_step", where)
    only = [] if only is None else only
    if not isinstance(only, list) or not all(type(layer) is int for layer in only):
        raise InputError(f"{where}.mlp_only_layers is no list of layers.")
    if layers is None:
        return None
    skipped = {layer for layer in range(layers) if (layer + 1) % (step or 1)}
    return frozenset(skipped | set(only))


def is_tied(config: Mapping[str, Any], llm: Mapping[str, Any]) -> bool:
    """Whether a checkpoint that has no head left it out because it is the embedding.

    transformers 5 decides by the outer flag, true where absent (`InternVLConfig`), 4 by the inner
    one: only if both say no, no writer can have tied them. `InternVLChatModel` ties them never, so
    that only a flag that is true says that some other writer did.
    """
    outer, inner = config.get("tie_word_embeddings"), llm.get("tie_word_embeddings")
    if config_layout(config) == "custom":
        return inner is True or (outer is True and inner is None)
    kind = KINDS.get(str(config.get("model_type")), KINDS["internvl"])
    outer = kind.defaults.get("tie_word_embeddings", True) if outer is None else outer
    return outer is not False or inner is True


def _check_rope(llm: Mapping[str, Any], where: str) -> None:
    """Raise `InputError` unless the rotary settings are objects whose type is a string."""
    for key in ("rope_scaling", "rope_parameters"):
        settings = section_of(llm, key, where)
        kinds = [settings.get(name, "default") for name in ("rope_type", "type")]
        if not all(isinstance(kind, str) for kind in kinds):
            raise InputError(f"{where}.{key} has a type that is no string.")


def section_of(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """The object of that name in a config; empty if there is none."""
    section = config.get(key)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise InputError(f"{where}: {key} is no object.")
    return section


def _count(
    section: Mapping[str, Any], key: str, where: str, *, limit: int = MAX_COUNT
) -> int | None:
    value = section.get(key)
    if value is None:
        return None
    if type(value) is not int or not 0 < value <= limit:
        raise InputError(
            f"{where}.{key} is {printable(repr(value))}; a whole number from 1 to {limit:,} was "
            "expected."
        )
    return value


def _switch(section: Mapping[str, Any], key: str, where: str) -> bool | None:
    value = section.get(key)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{where}.{key} is {printable(repr(value))}; true or false was expected.")
    return value
