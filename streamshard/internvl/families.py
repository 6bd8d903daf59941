"""What the families of InternVL models are made of: tables of names, and dimensions from configs.

A rule pairs the names of one thing in the custom layout (`InternVLChatModel`) with its names in
the HF layout (`InternVLForConditionalGeneration`, in the flat spelling). `layouts` reads the rules
in both directions; nothing here does anything to a tensor. A new family is a new table.

Sources of the names: transformers' classes `InternVLForConditionalGeneration`, `LlamaModel`,
`Qwen2Model`, `Qwen3Model`, `Qwen3MoeModel`, `Phi3Model`, `GptOssModel`; InternVL's files
`modeling_intern_vit.py`, `modeling_internvl_chat.py`, `modeling_internlm2.py`. Config keys and
their defaults are those of the config classes beside these.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

__all__ = ["FAMILIES", "LAYOUTS", "VISION_TARGETS", "Family", "Layout", "Rule"]


Layout: TypeAlias = Literal["custom", "hf"]
LAYOUTS: tuple[Layout, ...] = ("custom", "hf")


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a table: the same thing in the custom and in the HF layout.

    In a name, `{layer}` is a hole for an index and `{q|k|v}` stands for several names. An empty
    `hf` means the same names as `custom`.

    `op` says how the sides relate. "same": name for name, so several names are several rules.
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

    def names(self, side: Layout) -> tuple[str, ...]:
        """The names of a side ("custom" or "hf"), holes left open.

        >>> Rule("attn.qkv.weight", "attention.{q|k|v}_proj.weight", "join").names("hf")[0]
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
    HF layout has in `text_config.model_type`. `packed` are rules for experts that transformers 5
    may write as one tensor; these are read on both sides and never written. `head_dim` is the
    default of the config class where that is not hidden size by heads. `targets` are the ends of
    the custom names of the linear modules that get LoRA, in the order in which the classes have
    them, which is the order of PEFT's random numbers.
    """

    name: str
    architecture: str
    hf_type: str
    rules: tuple[Rule, ...]
    targets: tuple[str, ...]
    packed: tuple[Rule, ...] = ()
    head_dim: int | None = None


def _under(custom: str, hf: str, *rules: Rule) -> tuple[Rule, ...]:
    """Rules with a prefix before the names of each side, one rule for each name if "same"."""
    found: list[Rule] = []
    for rule in rules:
        tied_to = rule.tied_to and hf + rule.tied_to
        if rule.op in {"same", "drop"}:
            found += [
                replace(rule, custom=custom + one, hf=hf + other, tied_to=tied_to)
                for one, other in zip(rule.names("custom"), rule.names("hf"), strict=True)
            ]
        else:
            whole = hf + (rule.hf or rule.custom)
            found.append(replace(rule, custom=custom + rule.custom, hf=whole))
    return tuple(found)


def _layer(*rules: Rule) -> tuple[Rule, ...]:
    prefix = "language_model.model.layers.{layer}."
    return _under(prefix, prefix, *rules)


# InternVisionModel and InternVLVisionModel. The 300M encoder has biases in qkv and norms, the
# 6B encoder has RMS norms without, and normalises queries and keys.
_VISION = (
    *_under(
        "vision_model.embeddings.",
        "vision_tower.embeddings.",
        Rule("class_embedding", "cls_token"),
        Rule("position_embedding", "position_embeddings"),
        Rule("patch_embedding.{weight|bias}", "patch_embeddings.projection.{weight|bias}"),
    ),
    *_under(
        "vision_model.encoder.layers.{block}.",
        "vision_tower.encoder.layer.{block}.",
        Rule(
            "attn.qkv.weight",
            "attention.{q|k|v}_proj.weight",
            "join",
            part_rows="vision_hidden",
        ),
        Rule(
            "attn.qkv.bias",
            "attention.{q|k|v}_proj.bias",
            "join",
            part_rows="vision_hidden",
            only="qkv_bias",
        ),
        Rule("attn.{q|k}_norm.weight", "attention.{q|k}_norm.weight", only="qk_norm"),
        Rule("attn.proj.{weight|bias}", "attention.projection_layer.{weight|bias}"),
        Rule("mlp.{fc1|fc2}.{weight|bias}"),
        Rule("{norm1|norm2}.weight", "{layernorm_before|layernorm_after}.weight"),
        Rule("{norm1|norm2}.bias", "{layernorm_before|layernorm_after}.bias", only="norm_bias"),
        Rule("{ls1|ls2}", "{lambda_1|lambda_2}"),
    ),
)

_PROJECTOR = _under(
    "mlp1.",
    "multi_modal_projector.",
    Rule("{0|1|3}.{weight|bias}", "{layer_norm|linear_1|linear_2}.{weight|bias}"),
)

# Old files may hold the rotary frequencies, which every class computes by itself.
_ENDS = _under(
    "language_model.",
    "language_model.",
    Rule("model.embed_tokens.weight"),
    Rule("model.norm.weight"),
    Rule("lm_head.weight", tied_to="model.embed_tokens.weight"),
    Rule("model.rotary_emb.inv_freq", op="drop"),
    Rule("model.layers.{layer}.self_attn.rotary_emb.inv_freq", op="drop"),
)

_NORMS = Rule("{input|post_attention}_layernorm.weight")
_ATTENTION = Rule("self_attn.{q|k|v|o}_proj.weight")
_ATTENTION_BIAS = Rule("self_attn.{q|k|v|o}_proj.bias", only="attention_bias")
_MLP = Rule("mlp.{gate|up|down}_proj.weight")
_MLP_BIAS = Rule("mlp.{gate|up|down}_proj.bias", only="mlp_bias")
_HEAD_NORMS = Rule("self_attn.{q|k}_norm.weight")

_LLAMA = _ENDS + _layer(_ATTENTION, _ATTENTION_BIAS, _MLP, _MLP_BIAS, _NORMS)
_QWEN2 = _ENDS + _layer(_ATTENTION, Rule("self_attn.{q|k|v}_proj.bias"), _MLP, _NORMS)
_QWEN3 = _ENDS + _layer(_ATTENTION, _ATTENTION_BIAS, _HEAD_NORMS, _MLP, _NORMS)
_QWEN3_MOE = _ENDS + _layer(
    _ATTENTION,
    _ATTENTION_BIAS,
    _HEAD_NORMS,
    _NORMS,
    replace(_MLP, layers="dense"),
    Rule("mlp.gate.weight", layers="sparse"),
    Rule("mlp.experts.{expert}.{gate|up|down}_proj.weight", layers="sparse"),
)
_PHI3 = _ENDS + _layer(
    Rule("self_attn.{qkv|o}_proj.weight"), Rule("mlp.{gate_up|down}_proj.weight"), _NORMS
)
# The experts are packed in both layouts, stored in x out.
_GPT_OSS = _ENDS + _layer(
    _ATTENTION,
    Rule("self_attn.{q|k|v|o}_proj.bias"),
    Rule("self_attn.sinks"),
    Rule("mlp.router.{weight|bias}"),
    Rule("mlp.experts.{gate_up_proj|down_proj}{|_bias}"),
    _NORMS,
)
# The HF layout holds InternLM2 as Llama.
_INTERNLM2 = _under(
    "language_model.",
    "language_model.",
    Rule("model.tok_embeddings.weight", "model.embed_tokens.weight"),
    Rule("model.norm.weight"),
    Rule("output.weight", "lm_head.weight", tied_to="model.embed_tokens.weight"),
    Rule("model.rotary_emb.inv_freq", op="drop"),
) + _layer(
    Rule("attention.wqkv.weight", "self_attn.{q|k|v}_proj.weight", "grouped"),
    Rule("attention.wqkv.bias", "self_attn.{q|k|v}_proj.bias", "grouped", "attention_bias"),
    Rule("attention.wo.weight", "self_attn.o_proj.weight"),
    Rule("attention.wo.bias", "self_attn.o_proj.bias", only="attention_bias"),
    Rule("attention.rotary_emb.inv_freq", "self_attn.rotary_emb.inv_freq", "drop"),
    Rule("feed_forward.{w1|w3|w2}.weight", "mlp.{gate|up|down}_proj.weight"),
    Rule("{attention|ffn}_norm.weight", "{input|post_attention}_layernorm.weight"),
)

_PACKED = _layer(
    Rule("mlp.experts.{expert}.{gate|up}_proj.weight", "mlp.experts.gate_up_proj", "experts"),
    Rule("mlp.experts.{expert}.down_proj.weight", "mlp.experts.down_proj", "experts"),
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
    rules: tuple[Rule, ...],
    *,
    targets: tuple[str, ...] = _LLAMA_TARGETS,
    hf_type: str = "",
    packed: tuple[Rule, ...] = (),
    head_dim: int | None = None,
) -> tuple[str, Family]:
    rules = _VISION + _PROJECTOR + rules
    return name, Family(name, architecture, hf_type or name, rules, targets, packed, head_dim)


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
