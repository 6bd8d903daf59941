"""What the families of InternVL models are made of: tables of names and shapes.

A rule pairs the names of one thing in the custom layout (`InternVLChatModel`) with its names in
the HF layout (`InternVLForConditionalGeneration`, in the flat spelling). `layouts` reads the rules
in both directions; nothing here does anything to a tensor. A new family is a new table.

Sources of the names: transformers' classes `InternVLForConditionalGeneration`, `LlamaModel`,
`Qwen2Model`, `Qwen3Model`, `Qwen3MoeModel`, `Phi3Model`, `GptOssModel`; InternVL's files
`modeling_intern_vit.py`, `modeling_internvl_chat.py`, `modeling_internlm2.py`.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Literal, TypeAlias

from streamshard.values import frozen

__all__ = ["FAMILIES", "LAYOUTS", "VISION_TARGETS", "Family", "Layout", "Rule"]


Layout: TypeAlias = Literal["custom", "hf"]
LAYOUTS: tuple[Layout, ...] = ("custom", "hf")


@frozen
class Rule:
    """One line of a table: the same thing in the custom and in the HF layout.

    In a name, `{layer}` is a hole for an index and `{q|k|v}` stands for several names. An empty
    `hf` means the same names as `custom`.

    `op` says how the sides relate. "same": name for name, so several names are several rules.
    "join": the one tensor is the rows of the several. "grouped": the like, interleaved by
    key-value group as in `InternLM2Attention`. "experts": the one tensor has a leading dimension
    that counts the experts, and joins the several within each. "drop": not carried over.

    `shape` has the sizes of a tensor, in words of `Dims.size` or numbers, `+` for a sum. Tensors of
    different shapes are separated by `|`, in the order of `names`; of the side that has one tensor
    for several, the shape follows. `only` names the switch of `Dims` that the tensors depend on,
    `layers` may limit them to "dense" or "sparse" layers. A tensor that is absent may be a copy of
    the one called `tied_to` in the HF layout, if the embeddings are tied.
    """

    custom: str
    hf: str = ""
    shape: str = ""
    op: str = "same"
    only: str = ""
    layers: str = ""
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

    def shapes(self) -> tuple[tuple[str, ...], ...]:
        """The shape of each tensor, on the side that has more of them; none if nothing is known.

        >>> Rule("self_attn.{k|o}_proj.weight", shape="kv hidden | hidden q").shapes()
        (('kv', 'hidden'), ('hidden', 'q'))
        """
        if not self.shape:
            return ()
        each = tuple(tuple(one.split()) for one in self.shape.split("|"))
        count = max(len(self.names("custom")), len(self.names("hf")))
        return each * count if len(each) == 1 else each


@frozen
class Family:
    """The tables of one language model family, vision encoder and projector included.

    `architecture` is what the custom layout has in `llm_config.architectures`, `hf_type` what the
    HF layout has in `text_config.model_type`. `packed` are rules for experts that transformers 5
    may write as one tensor; these are read on both sides and never written. `targets` are the ends of
    the custom names of the linear modules that get LoRA, in the order in which the classes have
    them, which is the order of PEFT's random numbers.
    """

    name: str
    architecture: str
    hf_type: str
    rules: tuple[Rule, ...]
    targets: tuple[str, ...]
    packed: tuple[Rule, ...] = ()


def _under(custom: str, hf: str, *rules: Rule) -> tuple[Rule, ...]:
    """Rules with a prefix before the names of each side, one rule for each name if "same"."""
    found: list[Rule] = []
    for rule in rules:
        tied_to = rule.tied_to and hf + rule.tied_to
        if rule.op in {"same", "drop"}:
            names, others = rule.names("custom"), rule.names("hf")
            shapes = [" ".join(shape) for shape in rule.shapes()] or [""] * len(names)
            found += [
                replace(rule, custom=custom + one, hf=hf + other, shape=shape, tied_to=tied_to)
                for one, other, shape in zip(names, others, shapes, strict=True)
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
        Rule("class_embedding", "cls_token", "1 1 vision"),
        Rule(
            "position_embedding",
            "position_embeddings",
            "1 positions vision",
            only="position_table",
        ),
        Rule(
            "patch_embedding.{weight|bias}",
            "patch_embeddings.projection.{weight|bias}",
            "vision channels patch_height patch_width | vision",
        ),
    ),
    *_under(
        "vision_model.encoder.layers.{block}.",
        "vision_tower.encoder.layer.{block}.",
        Rule("attn.qkv.weight", "attention.{q|k|v}_proj.weight", "vision vision", "join"),
        Rule("attn.qkv.bias", "attention.{q|k|v}_proj.bias", "vision", "join", "qkv_bias"),
        Rule("attn.{q|k}_norm.weight", "attention.{q|k}_norm.weight", "vision", only="qk_norm"),
        Rule(
            "attn.proj.{weight|bias}",
            "attention.projection_layer.{weight|bias}",
            "vision vision | vision",
        ),
        Rule(
            "mlp.{fc1|fc2}.{weight|bias}",
            shape="vision_inner vision | vision_inner | vision vision_inner | vision",
        ),
        Rule("{norm1|norm2}.weight", "{layernorm_before|layernorm_after}.weight", "vision"),
        Rule(
            "{norm1|norm2}.bias",
            "{layernorm_before|layernorm_after}.bias",
            "vision",
            only="norm_bias",
        ),
        Rule("{ls1|ls2}", "{lambda_1|lambda_2}", "vision"),
    ),
)

_PROJECTOR = _under(
    "mlp1.",
    "multi_modal_projector.",
    Rule(
        "{0|1|3}.{weight|bias}",
        "{layer_norm|linear_1|linear_2}.{weight|bias}",
        "shuffled | shuffled | hidden shuffled | hidden | hidden hidden | hidden",
    ),
)

# Old files may hold the rotary frequencies, which every class computes by itself.
_ENDS = _under(
    "language_model.",
    "language_model.",
    Rule("model.embed_tokens.weight", shape="vocabulary hidden"),
    Rule("model.norm.weight", shape="hidden"),
    Rule("lm_head.weight", shape="vocabulary hidden", tied_to="model.embed_tokens.weight"),
    Rule("model.rotary_emb.inv_freq", op="drop"),
    Rule("model.layers.{layer}.self_attn.rotary_emb.inv_freq", op="drop"),
)

_NORMS = Rule("{input|post_attention}_layernorm.weight", shape="hidden")
_ATTENTION = Rule(
    "self_attn.{q|k|v|o}_proj.weight", shape="q hidden | kv hidden | kv hidden | hidden q"
)
_ATTENTION_BIAS = Rule(
    "self_attn.{q|k|v|o}_proj.bias", shape="q | kv | kv | hidden", only="attention_bias"
)
_MLP = Rule("mlp.{gate|up|down}_proj.weight", shape="inner hidden | inner hidden | hidden inner")
_MLP_BIAS = Rule("mlp.{gate|up|down}_proj.bias", shape="inner | inner | hidden", only="mlp_bias")
_HEAD_NORMS = Rule("self_attn.{q|k}_norm.weight", shape="head_dim")
_GROUPED = "q hidden | kv hidden | kv hidden"

_LLAMA = _ENDS + _layer(_ATTENTION, _ATTENTION_BIAS, _MLP, _MLP_BIAS, _NORMS)
_QWEN2 = _ENDS + _layer(
    _ATTENTION, Rule("self_attn.{q|k|v}_proj.bias", shape="q | kv | kv"), _MLP, _NORMS
)
_QWEN3 = _ENDS + _layer(_ATTENTION, _ATTENTION_BIAS, _HEAD_NORMS, _MLP, _NORMS)
_QWEN3_MOE = _ENDS + _layer(
    _ATTENTION,
    _ATTENTION_BIAS,
    _HEAD_NORMS,
    _NORMS,
    replace(_MLP, layers="dense"),
    Rule("mlp.gate.weight", shape="experts hidden", layers="sparse"),
    Rule(
        "mlp.experts.{expert}.{gate|up|down}_proj.weight",
        shape="expert_inner hidden | expert_inner hidden | hidden expert_inner",
        layers="sparse",
    ),
)
_PHI3 = _ENDS + _layer(
    Rule("self_attn.{qkv|o}_proj.weight", shape="q+kv+kv hidden | hidden q"),
    Rule("mlp.{gate_up|down}_proj.weight", shape="inner+inner hidden | hidden inner"),
    _NORMS,
)
# The experts are packed in both layouts, stored in x out.
_GPT_OSS = _ENDS + _layer(
    _ATTENTION,
    _ATTENTION_BIAS,
    Rule("self_attn.sinks", shape="heads"),
    Rule("mlp.router.{weight|bias}", shape="experts hidden | experts"),
    Rule(
        "mlp.experts.{gate_up_proj|down_proj}{|_bias}",
        shape="experts hidden inner+inner | experts inner+inner"
        " | experts inner hidden | experts hidden",
    ),
    _NORMS,
)
# The HF layout holds InternLM2 as Llama.
_INTERNLM2 = _under(
    "language_model.",
    "language_model.",
    Rule("model.tok_embeddings.weight", "model.embed_tokens.weight", "vocabulary hidden"),
    Rule("model.norm.weight", shape="hidden"),
    Rule(
        "output.weight", "lm_head.weight", "vocabulary hidden", tied_to="model.embed_tokens.weight"
    ),
    Rule("model.rotary_emb.inv_freq", op="drop"),
) + _layer(
    Rule("attention.wqkv.weight", "self_attn.{q|k|v}_proj.weight", _GROUPED, "grouped"),
    Rule(
        "attention.wqkv.bias",
        "self_attn.{q|k|v}_proj.bias",
        "q | kv | kv",
        "grouped",
        "attention_bias",
    ),
    Rule("attention.wo.weight", "self_attn.o_proj.weight", "hidden q"),
    Rule("attention.wo.bias", "self_attn.o_proj.bias", "hidden", only="attention_bias"),
    Rule("attention.rotary_emb.inv_freq", "self_attn.rotary_emb.inv_freq", op="drop"),
    Rule("feed_forward.{w1|w3|w2}.weight", "mlp.{gate|up|down}_proj.weight", _MLP.shape),
    Rule("{attention|ffn}_norm.weight", "{input|post_attention}_layernorm.weight", _NORMS.shape),
)

_PACKED = _layer(
    Rule(
        "mlp.experts.{expert}.{gate|up}_proj.weight",
        "mlp.experts.gate_up_proj",
        "expert_inner hidden",
        "experts",
    ),
    Rule(
        "mlp.experts.{expert}.down_proj.weight",
        "mlp.experts.down_proj",
        "hidden expert_inner",
        "experts",
    ),
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
) -> tuple[str, Family]:
    rules = _VISION + _PROJECTOR + rules
    return name, Family(name, architecture, hf_type or name, rules, targets, packed)


# By name. Yi and Nous-Hermes-2-Yi are Llama; of the families with equal names in the HF layout
# (Llama and both InternLM) the first is the one that needs no other custom name.
FAMILIES: dict[str, Family] = dict(
    (
        _family("llama", "LlamaForCausalLM", _LLAMA),
        _family("qwen2", "Qwen2ForCausalLM", _QWEN2),
        _family("qwen3", "Qwen3ForCausalLM", _QWEN3),
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
        ),
    )
)
