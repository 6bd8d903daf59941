"""What the families of InternVL models are made of: tables of names, and dimensions from configs.

A row pairs the names of one thing in the custom layout (`InternVLChatModel`) with its names in
the HF layout (`InternVLForConditionalGeneration`, in the flat spelling). `layouts` reads the rows
in both directions; nothing here does anything to a tensor. A new family is a new table.

Sources of the names: transformers' classes `InternVLForConditionalGeneration`, `LlamaModel`,
`Qwen2Model`, `Qwen3Model`, `Qwen3MoeModel`, `Phi3Model`, `GptOssModel`; InternVL's files
`modeling_intern_vit.py`, `modeling_internvl_chat.py`, `modeling_internlm2.py`. Config keys and
their defaults are those of the config classes beside these.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from streamshard.errors import InputError, listed, printable

__all__ = [
    "FAMILIES",
    "INNER",
    "OTHER",
    "VISION_TARGETS",
    "Dims",
    "Family",
    "Row",
    "check_config",
    "config_fixes",
    "config_layout",
    "dims_from_config",
    "is_tied",
    "llm_architecture",
    "untied",
    "with_dtype",
    "with_vocabulary",
]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table: the same thing in the custom and in the HF layout.

    In a name, `{layer}` is a hole for an index and `{q|k|v}` stands for several names. An empty
    `hf` means the same names as `custom`.

    `op` says how the sides relate. "same": name for name, so several names are several rows.
    "join": the one tensor is the rows of the several, in equal parts (each as many rows as the
    dimension `part_rows` says). "grouped": the like, interleaved by key-value group as in
    `InternLM2Attention`. "experts": the one tensor has a leading dimension that counts the
    experts, and joins the several within each. "drop": not carried over.

    `only` names the switch of `Dims` that the tensors depend on, `layers` may limit them to
    "dense" or "sparse" layers. A tensor that is absent in the HF layout may be a copy of the one
    called `tied_to`, if the embeddings are tied.
    """

    custom: str
    hf: str = ""
    op: str = "same"
    only: str = ""
    layers: str = ""
    part_rows: str = ""
    tied_to: str = ""

    def names(self, side: str) -> tuple[str, ...]:
        """The names of a side ("custom" or "hf"), holes left open.

        >>> Row("attn.qkv.weight", "attention.{q|k|v}_proj.weight", "join").names("hf")[0]
        'attention.q_proj.weight'
        """
        text = self.custom if side == "custom" or not self.hf else self.hf
        pieces = re.split(r"\{([^{}]*\|[^{}]*)\}", text)
        choices = [p.split("|") if i % 2 else [p] for i, p in enumerate(pieces)]
        return tuple("".join(chosen) for chosen in itertools.product(*choices))


@dataclass(frozen=True, slots=True)
class Family:
    """The tables of one language model family, vision encoder and projector included.

    `architecture` is what the custom layout has in `llm_config.architectures`, `hf_type` what the
    HF layout has in `text_config.model_type`. `packed` are rows for experts that transformers 5
    may write as one tensor; these are read on both sides and never written. `head_dim` is the
    default of the config class where that is not hidden size by heads. `targets` are the ends of
    the custom names of the linear modules that get LoRA, in the order in which the classes have
    them, which is the order of PEFT's random numbers.
    """

    name: str
    architecture: str
    hf_type: str
    rows: tuple[Row, ...]
    targets: tuple[str, ...]
    packed: tuple[Row, ...] = ()
    head_dim: int | None = None


def _under(custom: str, hf: str, *rows: Row) -> tuple[Row, ...]:
    """Rows with a prefix before the names of each side, one row for each name if "same"."""
    found: list[Row] = []
    for row in rows:
        ends = {side: row.names(side) for side in ("custom", "hf")}
        tied_to = row.tied_to and hf + row.tied_to
        if row.op in {"same", "drop"}:
            found += [
                replace(row, custom=custom + one, hf=hf + other, tied_to=tied_to)
                for one, other in zip(ends["custom"], ends["hf"], strict=True)
            ]
        else:
            found.append(replace(row, custom=custom + row.custom, hf=hf + (row.hf or row.custom)))
    return tuple(found)


def _layer(*rows: Row) -> tuple[Row, ...]:
    prefix = "language_model.model.layers.{layer}."
    return _under(prefix, prefix, *rows)


# InternVisionModel and InternVLVisionModel. The 300M encoder has biases in qkv and norms, the
# 6B encoder has RMS norms without, and normalises queries and keys.
_VISION = (
    *_under(
        "vision_model.embeddings.",
        "vision_tower.embeddings.",
        Row("class_embedding", "cls_token"),
        Row("position_embedding", "position_embeddings"),
        Row("patch_embedding.{weight|bias}", "patch_embeddings.projection.{weight|bias}"),
    ),
    *_under(
        "vision_model.encoder.layers.{block}.",
        "vision_tower.encoder.layer.{block}.",
        Row(
            "attn.qkv.weight",
            "attention.{q|k|v}_proj.weight",
            "join",
            part_rows="vision_hidden",
        ),
        Row(
            "attn.qkv.bias",
            "attention.{q|k|v}_proj.bias",
            "join",
            part_rows="vision_hidden",
            only="qkv_bias",
        ),
        Row("attn.{q|k}_norm.weight", "attention.{q|k}_norm.weight", only="qk_norm"),
        Row("attn.proj.{weight|bias}", "attention.projection_layer.{weight|bias}"),
        Row("mlp.{fc1|fc2}.{weight|bias}"),
        Row("{norm1|norm2}.weight", "{layernorm_before|layernorm_after}.weight"),
        Row("{norm1|norm2}.bias", "{layernorm_before|layernorm_after}.bias", only="norm_bias"),
        Row("{ls1|ls2}", "{lambda_1|lambda_2}"),
    ),
)

_PROJECTOR = _under(
    "mlp1.",
    "multi_modal_projector.",
    Row("{0|1|3}.{weight|bias}", "{layer_norm|linear_1|linear_2}.{weight|bias}"),
)

# Old files may hold the rotary frequencies, which every class computes by itself.
_ENDS = _under(
    "language_model.",
    "language_model.",
    Row("model.embed_tokens.weight"),
    Row("model.norm.weight"),
    Row("lm_head.weight", tied_to="model.embed_tokens.weight"),
    Row("model.rotary_emb.inv_freq", op="drop"),
    Row("model.layers.{layer}.self_attn.rotary_emb.inv_freq", op="drop"),
)

_NORMS = Row("{input|post_attention}_layernorm.weight")
_ATTENTION = Row("self_attn.{q|k|v|o}_proj.weight")
_ATTENTION_BIAS = Row("self_attn.{q|k|v|o}_proj.bias", only="attention_bias")
_MLP = Row("mlp.{gate|up|down}_proj.weight")
_MLP_BIAS = Row("mlp.{gate|up|down}_proj.bias", only="mlp_bias")
_HEAD_NORMS = Row("self_attn.{q|k}_norm.weight")

_LLAMA = _ENDS + _layer(_ATTENTION, _ATTENTION_BIAS, _MLP, _MLP_BIAS, _NORMS)
_QWEN2 = _ENDS + _layer(_ATTENTION, Row("self_attn.{q|k|v}_proj.bias"), _MLP, _NORMS)
_QWEN3 = _ENDS + _layer(_ATTENTION, _ATTENTION_BIAS, _HEAD_NORMS, _MLP, _NORMS)
_QWEN3_MOE = _ENDS + _layer(
    _ATTENTION,
    _ATTENTION_BIAS,
    _HEAD_NORMS,
    _NORMS,
    replace(_MLP, layers="dense"),
    Row("mlp.gate.weight", layers="sparse"),
    Row("mlp.experts.{expert}.{gate|up|down}_proj.weight", layers="sparse"),
)
_PHI3 = _ENDS + _layer(
    Row("self_attn.{qkv|o}_proj.weight"), Row("mlp.{gate_up|down}_proj.weight"), _NORMS
)
# The experts are packed in both layouts, stored in x out.
_GPT_OSS = _ENDS + _layer(
    _ATTENTION,
    Row("self_attn.{q|k|v|o}_proj.bias"),
    Row("self_attn.sinks"),
    Row("mlp.router.{weight|bias}"),
    Row("mlp.experts.{gate_up_proj|down_proj}{|_bias}"),
    _NORMS,
)
# The HF layout holds InternLM2 as Llama.
_INTERNLM2 = _under(
    "language_model.",
    "language_model.",
    Row("model.tok_embeddings.weight", "model.embed_tokens.weight"),
    Row("model.norm.weight"),
    Row("output.weight", "lm_head.weight", tied_to="model.embed_tokens.weight"),
    Row("model.rotary_emb.inv_freq", op="drop"),
) + _layer(
    Row("attention.wqkv.weight", "self_attn.{q|k|v}_proj.weight", "grouped"),
    Row("attention.wqkv.bias", "self_attn.{q|k|v}_proj.bias", "grouped", "attention_bias"),
    Row("attention.wo.weight", "self_attn.o_proj.weight"),
    Row("attention.wo.bias", "self_attn.o_proj.bias", only="attention_bias"),
    Row("attention.rotary_emb.inv_freq", "self_attn.rotary_emb.inv_freq", "drop"),
    Row("feed_forward.{w1|w3|w2}.weight", "mlp.{gate|up|down}_proj.weight"),
    Row("{attention|ffn}_norm.weight", "{input|post_attention}_layernorm.weight"),
)

_PACKED = _layer(
    Row("mlp.experts.{expert}.{gate|up}_proj.weight", "mlp.experts.gate_up_proj", "experts"),
    Row("mlp.experts.{expert}.down_proj.weight", "mlp.experts.down_proj", "experts"),
)


# InternVLChatModel.wrap_backbone_lora and wrap_llm_lora; the latter knows Llama, Qwen2, InternLM2
# and Phi3 only. Of a mixture of experts every expert gets LoRA and the router none; the experts of
# GPT-OSS are no modules, so its attention alone does.
VISION_TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_ATTENTION_TARGETS = tuple(f"self_attn.{part}_proj" for part in "qkvo")
_LLAMA_TARGETS = (*_ATTENTION_TARGETS, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_MOE_TARGETS = (*_ATTENTION_TARGETS, "gate_proj", "up_proj", "down_proj")
_INTERNLM2_TARGETS = (
    "attention.wqkv",
    "attention.wo",
    "feed_forward.w1",
    "feed_forward.w3",
    "feed_forward.w2",
)
_PHI3_TARGETS = ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")


def _family(
    name: str,
    architecture: str,
    rows: tuple[Row, ...],
    *,
    targets: tuple[str, ...] = _LLAMA_TARGETS,
    hf_type: str = "",
    packed: tuple[Row, ...] = (),
    head_dim: int | None = None,
) -> tuple[str, Family]:
    rows = _VISION + _PROJECTOR + rows
    return name, Family(name, architecture, hf_type or name, rows, targets, packed, head_dim)


# By name. Yi and Nous-Hermes-2-Yi are Llama; of the families with equal names in the HF layout
# (Llama and both InternLM) the first is the one that needs no other custom name.
FAMILIES: dict[str, Family] = dict(
    (
        _family("llama", "LlamaForCausalLM", _LLAMA),
        _family("qwen2", "Qwen2ForCausalLM", _QWEN2),
        _family("qwen3", "Qwen3ForCausalLM", _QWEN3, head_dim=128),
        _family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            _QWEN3_MOE,
            targets=_MOE_TARGETS,
            packed=_PACKED,
        ),
        _family(
            "internlm2",
            "InternLM2ForCausalLM",
            _INTERNLM2,
            targets=_INTERNLM2_TARGETS,
            hf_type="llama",
        ),
        _family("internlm3", "InternLM3ForCausalLM", _LLAMA, hf_type="llama"),
        _family("phi3", "Phi3ForCausalLM", _PHI3, targets=_PHI3_TARGETS),
        _family(
            "gpt_oss",
            "GptOssForCausalLM",
            _GPT_OSS,
            targets=_ATTENTION_TARGETS,
            head_dim=64,
        ),
    )
)

# Real models have at most 94 layers and 128 experts; a damaged config must not cost hours.
MAX_COUNT = 10_000

# The other layout, and where a config of each has that of the language model.
OTHER = {"custom": "hf", "hf": "custom"}
TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

INNER = {"custom": "llm_config", "hf": "text_config"}
_MODEL_TYPES = {"internvl_chat": "custom", "internvl": "hf"}

# What the config classes assume for a key that is absent: InternVisionConfig has the values of
# the 6B encoder with 48 layers (also for the 300M encoder), InternVLVisionConfig those of 300M
# without biases.
_VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "custom": {
        "num_hidden_layers": 48,
        "hidden_size": 3200,
        "qkv_bias": False,
        "qk_normalization": True,
        "norm_type": "rms_norm",
    },
    "hf": {
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "attention_bias": False,
        "use_qk_norm": False,
        "norm_type": "layer_norm",
    },
}
_VISION_SWITCHES = {
    "custom": ("qkv_bias", "qk_normalization"),
    "hf": ("attention_bias", "use_qk_norm"),
}

# Fields of rope_scaling that older config classes insist on, and no others.
_ROPE_FIELDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}


@dataclass(frozen=True, slots=True)
class Dims:
    """What the tables need to know of a model; None where nothing says it.

    Counts that are None are taken from the tensors' names, and so are switches: the tensors of
    one switch are in all layers or in none. `tied` says whether an HF checkpoint without a head
    means the embedding.
    """

    family: str
    blocks: int | None = None
    """Layers of the vision encoder."""
    layers: int | None = None
    """Layers of the language model."""
    experts: int | None = None
    vision_hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    qkv_bias: bool | None = None
    """Biases of the vision encoder's q, k and v."""
    qk_norm: bool | None = None
    norm_bias: bool | None = None
    attention_bias: bool | None = None
    """Biases of the language model's attention, for families that may have them."""
    mlp_bias: bool | None = None
    dense_layers: frozenset[int] | None = None
    """Layers of a mixture of experts that have none."""
    tied: bool | None = None


def config_layout(config: Mapping[str, Any]) -> str | None:
    """Answer "custom" or "hf" as a `config.json` has it, or None where it is of neither."""
    return _MODEL_TYPES.get(str(config.get("model_type")))


def llm_architecture(config: Mapping[str, Any], where: str = "config.json") -> str:
    """The language model's class in a custom config, which selects the names of its tensors.

    Raises `InputError` if there is none, or if its family has no table.
    """
    named = _section(config, "llm_config", where).get("architectures")
    if isinstance(named, list) and named and isinstance(named[0], str):
        if any(family.architecture == named[0] for family in FAMILIES.values()):
            return named[0]
        known = listed([family.architecture for family in FAMILIES.values()], len(FAMILIES))
        raise InputError(
            f"{where}: llm_config.architectures is '{printable(named[0])}'; {known} are supported."
        )
    raise InputError(
        f"{where}: llm_config.architectures is missing. It selects the language model's class: "
        "take config.json from the original model."
    )


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
            "or 'internvl' was expected. Is this the folder of an InternVL model?"
        )
    inner = INNER[layout]
    llm, vision = _section(config, inner, where), _section(config, "vision_config", where)
    family = _family_of(config, llm, layout, architecture, where)
    heads, kv_heads, head_dim = _head_counts(llm, family, f"{where}: {inner}")
    seen = {**_VISION_DEFAULTS[layout], **{k: v for k, v in vision.items() if v is not None}}
    here = f"{where}: vision_config"
    bias, norm = (_switch(seen, key, here) for key in _VISION_SWITCHES[layout])
    if seen["norm_type"] not in ("layer_norm", "rms_norm"):
        raise InputError(
            f"{here}.norm_type is '{printable(str(seen['norm_type']))}'; layer_norm or rms_norm "
            "was expected."
        )
    here = f"{where}: {inner}"
    _check_rope(llm, here)
    layers = _count(llm, "num_hidden_layers", here)
    key = "num_experts" if llm.get("num_experts") is not None else "num_local_experts"
    # InternLM2 calls its switch `bias`; InternLM3 has one for q, k, v and one for everything else.
    attention_bias = [_switch(llm, key, here) for key in ("attention_bias", "qkv_bias", "bias")]
    mlp_bias = [_switch(llm, key, here) for key in ("mlp_bias", "bias")]
    return Dims(
        family=family.name,
        blocks=_count(seen, "num_hidden_layers", f"{where}: vision_config"),
        layers=layers,
        experts=_count(llm, key, here),
        vision_hidden=_count(seen, "hidden_size", f"{where}: vision_config", limit=10**6),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=bias,
        qk_norm=norm,
        norm_bias=seen["norm_type"] == "layer_norm",
        attention_bias=next((b for b in attention_bias if b is not None), None),
        mlp_bias=next((b for b in mlp_bias if b is not None), None),
        dense_layers=_dense_layers(llm, layers, here) if family.packed else None,
        tied=layout == "hf" and is_tied(config, llm),
    )


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


def config_fixes(config: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """The config as it must be written beside converted weights of `layout`.

    Embedding and head are both stored, so both tie flags become false (transformers 4 reads the
    inner one, 5 the outer one, whose default is true). LoRA flags become 0. Where rotary settings
    are only in `rope_parameters`, as transformers 5 writes them, `rope_theta` and `rope_scaling`
    are added: older readers know nothing else and would assume 10000.
    """
    fixed = copy.deepcopy(dict(config))
    inner = dict(_section(fixed, INNER[layout], "config.json"))
    fixed[INNER[layout]] = inner
    fixed["tie_word_embeddings"] = inner["tie_word_embeddings"] = False
    if layout == "custom":
        fixed["use_llm_lora"] = fixed["use_backbone_lora"] = 0
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


def _family_of(
    config: Mapping[str, Any],
    llm: Mapping[str, Any],
    layout: str,
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


def _head_counts(
    llm: Mapping[str, Any], family: Family, where: str
) -> tuple[int | None, int | None, int | None]:
    """Heads, key-value heads, and rows of a head."""
    heads = _count(llm, "num_attention_heads", where)
    kv_heads = _count(llm, "num_key_value_heads", where)
    head_dim = _count(llm, "head_dim", where)
    hidden = _count(llm, "hidden_size", where, limit=10**6)
    # LlamaConfig and InternLM2Config: no key-value heads means one for each head.
    kv_heads = heads if kv_heads is None and family.hf_type == "llama" else kv_heads
    if heads is not None and kv_heads is not None and heads % kv_heads:
        raise InputError(
            f"{where}.num_attention_heads is {heads}, which num_key_value_heads, {kv_heads}, does "
            "not divide. The config is damaged or of another model."
        )
    head_dim = family.head_dim if head_dim is None else head_dim
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
    """Whether an HF checkpoint that has no head left it out because it is the embedding.

    transformers 5 decides by the outer flag, true where absent (`InternVLConfig`), 4 by the inner
    one: only if both say no, no writer can have tied them.
    """
    outer, inner = config.get("tie_word_embeddings"), llm.get("tie_word_embeddings")
    return outer is not False or inner is True


def _check_rope(llm: Mapping[str, Any], where: str) -> None:
    """Raise `InputError` unless the rotary settings are objects whose type is a string."""
    for key in ("rope_scaling", "rope_parameters"):
        settings = _section(llm, key, where)
        kinds = [settings.get(name, "default") for name in ("rope_type", "type")]
        if not all(isinstance(kind, str) for kind in kinds):
            raise InputError(f"{where}.{key} has a type that is no string.")


def _section(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
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
