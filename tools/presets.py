"""The InternVL models that `make_checkpoint` can imitate: dimensions, tensor names and configs.

Everything here is data or a pure function of a `Preset`. The names and shapes are typed from the
published formats, not taken from `streamshard`, so that tests compare two independent sources.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

Shape = tuple[int, ...]

LAYOUTS = ("custom", "hf")
PATCH = 14


@dataclass(frozen=True, slots=True)
class Vision:
    """Dimensions of a vision encoder; the switches are those of the custom `vision_config`."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    norm_type: str = "layer_norm"
    qkv_bias: bool = True
    qk_normalization: bool = False
    image_size: int = 448


@dataclass(frozen=True, slots=True)
class Preset:
    """Dimensions of one InternVL model: vision encoder, language model family and sizes."""

    name: str
    vision: Vision
    arch: str
    """Class name of the language model in the custom layout, such as `Qwen2ForCausalLM`."""
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    experts: int = 0
    expert_intermediate: int = 0
    experts_per_token: int = 0
    image_token: int = 0
    """Token id of `<IMG_CONTEXT>`; a plausible guess for Qwen2, Phi3, Yi, InternLM3 and GPT-OSS."""
    bos: int = 151643
    eos: int = 151643
    eos_chat: int = 151645
    pad: int = 151643
    template: str = "internvl2_5"
    rope_theta: float = 1000000.0
    dynamic_rope: float = 0.0
    """Factor of the `dynamic` rope scaling, 0 for none."""
    max_positions: int = 32768
    rms_eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear module, or (`experts` > 0) a parameter that packs one matrix for each expert."""

    name: str
    out_features: int
    in_features: int
    bias: bool = False
    experts: int = 0


_300M = Vision(1024, 24, 16, 4096)
_6B = Vision(3200, 45, 25, 12800, "rms_norm", qkv_bias=False, qk_normalization=True)

_INTERNLM2 = Preset(
    "", _300M, "InternLM2ForCausalLM", 0, 0, 0, 8, 128, 0, 92553,
    image_token=92546, bos=1, eos=2, eos_chat=92542, pad=2, template="internlm2-chat",
    dynamic_rope=2.0, rms_eps=1e-5,
)  # fmt: skip
_QWEN2 = Preset("", _300M, "Qwen2ForCausalLM", 0, 0, 0, 2, 128, 0, 151674, image_token=151667)
_QWEN3 = replace(_QWEN2, arch="Qwen3ForCausalLM", vocab=151936, image_token=151671, kv_heads=8,
                 max_positions=40960)  # fmt: skip
_YI = Preset(
    "", _6B, "LlamaForCausalLM", 7168, 60, 56, 8, 128, 20480, 64003,
    image_token=64002, bos=1, eos=2, eos_chat=7, pad=0, template="Hermes-2",
    rope_theta=5000000.0, max_positions=4096, rms_eps=1e-5,
)  # fmt: skip

_ROWS: tuple[tuple[str, Preset], ...] = (
    ("Mini-InternVL-2B-V1-5 InternVL2-2B InternVL2_5-2B InternVL2_5-2B-MPO",
     replace(_INTERNLM2, hidden=2048, layers=24, heads=16, intermediate=8192)),
    ("InternVL2-8B InternVL2-8B-MPO InternVL2_5-8B InternVL2_5-8B-MPO",
     replace(_INTERNLM2, hidden=4096, layers=32, heads=32, intermediate=14336)),
    ("InternVL-Chat-V1-5 InternVL2-26B InternVL2_5-26B InternVL2_5-26B-MPO",
     replace(_INTERNLM2, vision=_6B, hidden=6144, layers=48, heads=48, intermediate=16384)),
    ("Mini-InternVL-4B-V1-5 InternVL2-4B",
     Preset("", _300M, "Phi3ForCausalLM", 3072, 32, 32, 32, 96, 8192, 32020,
            image_token=32013, bos=1, eos=32000, eos_chat=32007, pad=32000, template="phi3-chat",
            rope_theta=10000.0, max_positions=4096, rms_eps=1e-5)),
    ("InternVL-Chat-V1-2 InternVL-Chat-V1-2-Plus", _YI),
    ("InternVL2-40B", replace(_YI, vocab=64009)),
    ("InternVL2-Llama3-76B",
     replace(_YI, hidden=8192, layers=80, heads=64, intermediate=28672, vocab=128265,
             image_token=128258, bos=128000, eos=128001, eos_chat=128003, pad=128001,
             template="internlm2-chat", rope_theta=500000.0, max_positions=8192)),
    ("InternVL2-1B",
     replace(_QWEN2, hidden=896, layers=24, heads=14, head_dim=64, intermediate=4864,
             vocab=151655, image_token=151648, template="Hermes-2")),
    ("InternVL2_5-1B InternVL2_5-1B-MPO",
     replace(_QWEN2, hidden=896, layers=24, heads=14, head_dim=64, intermediate=4864)),
    ("InternVL3-1B",
     replace(_QWEN2, hidden=896, layers=24, heads=14, head_dim=64, intermediate=4864,
             dynamic_rope=2.0)),
    ("InternVL3-2B",
     replace(_QWEN2, hidden=1536, layers=28, heads=12, intermediate=8960, dynamic_rope=2.0)),
    ("InternVL2_5-4B InternVL2_5-4B-MPO",
     replace(_QWEN2, hidden=2048, layers=36, heads=16, intermediate=11008)),
    ("InternVL3-8B",
     replace(_QWEN2, hidden=3584, layers=28, heads=28, kv_heads=4, intermediate=18944,
             dynamic_rope=2.0)),
    ("InternVL3-9B",
     Preset("", _300M, "InternLM3ForCausalLM", 4096, 48, 32, 2, 128, 10240, 128512,
            image_token=128133, bos=1, eos=2, eos_chat=128131, pad=2, rope_theta=50000000.0,
            dynamic_rope=6.0, rms_eps=1e-5)),
    ("InternVL3-14B",
     replace(_QWEN2, hidden=5120, layers=48, heads=40, kv_heads=8, intermediate=13824,
             dynamic_rope=2.0)),
    ("InternVL2_5-38B InternVL2_5-38B-MPO",
     replace(_QWEN2, vision=_6B, hidden=5120, layers=64, heads=40, kv_heads=8,
             intermediate=27648)),
    ("InternVL3-38B",
     replace(_QWEN2, vision=_6B, hidden=5120, layers=64, heads=40, kv_heads=8,
             intermediate=27648, dynamic_rope=2.0)),
    ("InternVL2_5-78B InternVL2_5-78B-MPO",
     replace(_QWEN2, vision=_6B, hidden=8192, layers=80, heads=64, kv_heads=8,
             intermediate=29568)),
    ("InternVL3-78B",
     replace(_QWEN2, vision=_6B, hidden=8192, layers=80, heads=64, kv_heads=8,
             intermediate=29568, dynamic_rope=2.0)),
    ("InternVL3_5-1B", replace(_QWEN3, hidden=1024, layers=28, heads=16, intermediate=3072)),
    ("InternVL3_5-2B", replace(_QWEN3, hidden=2048, layers=28, heads=16, intermediate=6144)),
    ("InternVL3_5-4B", replace(_QWEN3, hidden=2560, layers=36, heads=32, intermediate=9728)),
    ("InternVL3_5-8B", replace(_QWEN3, hidden=4096, layers=36, heads=32, intermediate=12288)),
    ("InternVL3_5-14B", replace(_QWEN3, hidden=5120, layers=40, heads=40, intermediate=17408)),
    ("InternVL3_5-38B",
     replace(_QWEN3, vision=_6B, hidden=5120, layers=64, heads=64, intermediate=25600)),
    ("InternVL3_5-30B-A3B",
     replace(_QWEN3, arch="Qwen3MoeForCausalLM", hidden=2048, layers=48, heads=32, kv_heads=4,
             intermediate=6144, experts=128, expert_intermediate=768, experts_per_token=8)),
    ("InternVL3_5-241B-A28B",
     replace(_QWEN3, vision=_6B, arch="Qwen3MoeForCausalLM", hidden=4096, layers=94, heads=64,
             kv_heads=4, intermediate=12288, experts=128, expert_intermediate=1536,
             experts_per_token=8)),
    ("InternVL3_5-GPT-OSS-20B-A4B-Preview",
     Preset("", _300M, "GptOssForCausalLM", 2880, 24, 64, 8, 64, 2880, 201088,
            experts=32, expert_intermediate=2880, experts_per_token=4, image_token=200021,
            bos=199998, eos=200002, eos_chat=200002, pad=199999, rope_theta=150000.0,
            max_positions=131072, rms_eps=1e-5)),
)  # fmt: skip

# The tiny tokenizer is 256 bytes, then the added tokens of `added_tokens` from 256 on.
_TINY = Preset(
    "", Vision(32, 2, 2, 64, image_size=28), "Qwen2ForCausalLM", 64, 3, 4, 2, 16, 96, 288,
    image_token=261, bos=256, eos=256, eos_chat=258, pad=256, rope_theta=10000.0,
    max_positions=512,
)  # fmt: skip
_TINY_6B = Vision(32, 2, 2, 64, "rms_norm", qkv_bias=False, qk_normalization=True, image_size=28)
_TINY_ROWS: tuple[tuple[str, Preset], ...] = (
    ("tiny tiny-qwen2", _TINY),
    ("tiny-6b-vit", replace(_TINY, vision=_TINY_6B)),
    # As in the real models, nh * hd differs from the hidden size.
    ("tiny-qwen3", replace(_TINY, arch="Qwen3ForCausalLM", head_dim=32)),
    ("tiny-qwen3-moe",
     replace(_TINY, arch="Qwen3MoeForCausalLM", head_dim=32, experts=4, expert_intermediate=24,
             experts_per_token=2)),
    ("tiny-llama", replace(_TINY, arch="LlamaForCausalLM")),
    ("tiny-internlm2", replace(_TINY, arch="InternLM2ForCausalLM")),
    ("tiny-internlm3", replace(_TINY, arch="InternLM3ForCausalLM")),
    ("tiny-phi3", replace(_TINY, arch="Phi3ForCausalLM", kv_heads=4)),
    # As in the real model, the packed down_proj is square.
    ("tiny-gpt-oss",
     replace(_TINY, arch="GptOssForCausalLM", head_dim=32, intermediate=64, experts=4,
             expert_intermediate=64, experts_per_token=2)),
)  # fmt: skip

PRESETS: dict[str, Preset] = {
    name: replace(preset, name=name)
    for names, preset in _TINY_ROWS + _ROWS
    for name in names.split()
}

# Where the HF spellings put the head, the language model, and vision tower and projector.
SPELLINGS: dict[str, tuple[str, str, str]] = {
    "flat": ("language_model.lm_head", "language_model.model", ""),
    "nested": ("lm_head", "model.language_model", "model."),
    "hybrid": ("language_model.lm_head", "model.language_model.model", "model."),
    "mid": ("lm_head", "language_model.model", ""),
    "short": ("lm_head", "language_model", ""),
}

# Per layout: embeddings, layer prefix, attention output, norms, layer scales, projector modules.
_VISION_NAMES: dict[str, dict[str, str]] = {
    "custom": {
        "root": "vision_model", "cls": "class_embedding", "position": "position_embedding",
        "patch": "patch_embedding", "layer": "encoder.layers", "attention": "attn",
        "proj": "proj", "norm": "norm1 norm2", "scale": "ls1 ls2",
        "projector": "mlp1.0 mlp1.1 mlp1.3",
    },
    "hf": {
        "root": "vision_tower", "cls": "cls_token", "position": "position_embeddings",
        "patch": "patch_embeddings.projection", "layer": "encoder.layer",
        "attention": "attention", "proj": "projection_layer",
        "norm": "layernorm_before layernorm_after", "scale": "lambda_1 lambda_2",
        "projector": "multi_modal_projector.layer_norm multi_modal_projector.linear_1 "
                     "multi_modal_projector.linear_2",
    },
}  # fmt: skip


def vision_linears(preset: Preset, layout: str) -> list[Linear]:
    """Return the linear modules of one vision layer, named relative to the layer."""
    v, names = preset.vision, _VISION_NAMES[layout]
    attention = names["attention"]
    if layout == "custom":
        projections = [Linear(f"{attention}.qkv", 3 * v.hidden, v.hidden, v.qkv_bias)]
    else:
        projections = [
            Linear(f"{attention}.{part}_proj", v.hidden, v.hidden, v.qkv_bias) for part in "qkv"
        ]
    return [
        *projections,
        Linear(f"{attention}.{names['proj']}", v.hidden, v.hidden, bias=True),
        Linear("mlp.fc1", v.intermediate, v.hidden, bias=True),
        Linear("mlp.fc2", v.hidden, v.intermediate, bias=True),
    ]


def llm_linears(preset: Preset, layout: str, *, packed: bool = False) -> list[Linear]:
    """Return the linear modules of one language model layer, named relative to the layer.

    Routers are left out. With `packed`, Qwen3-MoE experts are two parameters, as transformers 5
    holds them in memory; the experts of GPT-OSS always are.
    """
    p, h, i = preset, preset.hidden, preset.intermediate
    q, kv = p.heads * p.head_dim, p.kv_heads * p.head_dim
    if p.arch == "InternLM2ForCausalLM" and layout == "custom":
        return [
            Linear("attention.wqkv", q + 2 * kv, h),
            Linear("attention.wo", h, q),
            Linear("feed_forward.w1", i, h),
            Linear("feed_forward.w3", i, h),
            Linear("feed_forward.w2", h, i),
        ]
    if p.arch == "Phi3ForCausalLM":
        return [
            Linear("self_attn.qkv_proj", q + 2 * kv, h),
            Linear("self_attn.o_proj", h, q),
            Linear("mlp.gate_up_proj", 2 * i, h),
            Linear("mlp.down_proj", h, i),
        ]
    bias = p.arch in {"Qwen2ForCausalLM", "GptOssForCausalLM"}
    attention = [
        Linear("self_attn.q_proj", q, h, bias),
        Linear("self_attn.k_proj", kv, h, bias),
        Linear("self_attn.v_proj", kv, h, bias),
        Linear("self_attn.o_proj", h, q, p.arch == "GptOssForCausalLM"),
    ]
    if p.experts and (packed or p.arch == "GptOssForCausalLM"):
        m = p.expert_intermediate
        return [
            *attention,
            Linear("mlp.experts.gate_up_proj", 2 * m, h, experts=p.experts),
            Linear("mlp.experts.down_proj", h, m, experts=p.experts),
        ]
    stems, m = ["mlp"], i
    if p.experts:
        stems, m = [f"mlp.experts.{e}" for e in range(p.experts)], p.expert_intermediate
    dense = [
        linear
        for stem in stems
        for linear in (
            Linear(f"{stem}.gate_proj", m, h),
            Linear(f"{stem}.up_proj", m, h),
            Linear(f"{stem}.down_proj", h, m),
        )
    ]
    return attention + dense


def vision_layer_prefix(layout: str) -> str:
    """Return the flat name of all vision layers, such as `vision_model.encoder.layers`."""
    return f"{_VISION_NAMES[layout]['root']}.{_VISION_NAMES[layout]['layer']}"


def _linear_tensors(linear: Linear) -> Iterator[tuple[str, Shape]]:
    if linear.experts:  # GPT-OSS: no `.weight`, stored in x out
        yield linear.name, (linear.experts, linear.in_features, linear.out_features)
        yield f"{linear.name}_bias", (linear.experts, linear.out_features)
        return
    yield f"{linear.name}.weight", (linear.out_features, linear.in_features)
    if linear.bias:
        yield f"{linear.name}.bias", (linear.out_features,)


def _vision_tensors(preset: Preset, layout: str) -> Iterator[tuple[str, Shape]]:
    v, names = preset.vision, _VISION_NAMES[layout]
    d, embeddings = v.hidden, f"{names['root']}.embeddings"
    yield f"{embeddings}.{names['cls']}", (1, 1, d)
    yield f"{embeddings}.{names['position']}", (1, (v.image_size // PATCH) ** 2 + 1, d)
    yield f"{embeddings}.{names['patch']}.weight", (d, 3, PATCH, PATCH)
    yield f"{embeddings}.{names['patch']}.bias", (d,)
    linears = vision_linears(preset, layout)
    for i in range(v.layers):
        prefix = f"{vision_layer_prefix(layout)}.{i}"
        for scale in names["scale"].split():
            yield f"{prefix}.{scale}", (d,)
        for linear in linears:
            for name, shape in _linear_tensors(linear):
                yield f"{prefix}.{name}", shape
        if v.qk_normalization:
            yield f"{prefix}.{names['attention']}.q_norm.weight", (d,)
            yield f"{prefix}.{names['attention']}.k_norm.weight", (d,)
        for norm in names["norm"].split():
            yield f"{prefix}.{norm}.weight", (d,)
            if v.norm_type == "layer_norm":
                yield f"{prefix}.{norm}.bias", (d,)


def _projector_tensors(preset: Preset, layout: str) -> Iterator[tuple[str, Shape]]:
    norm, first, second = _VISION_NAMES[layout]["projector"].split()
    x = 4 * preset.vision.hidden
    yield f"{norm}.weight", (x,)
    yield f"{norm}.bias", (x,)
    yield from _linear_tensors(Linear(first, preset.hidden, x, bias=True))
    yield from _linear_tensors(Linear(second, preset.hidden, preset.hidden, bias=True))


def _llm_tensors(preset: Preset, layout: str) -> Iterator[tuple[str, Shape]]:
    p, internlm2 = preset, preset.arch == "InternLM2ForCausalLM" and layout == "custom"
    yield ("tok_embeddings" if internlm2 else "embed_tokens") + ".weight", (p.vocab, p.hidden)
    norms = ("attention_norm", "ffn_norm")
    if not internlm2:
        norms = ("input_layernorm", "post_attention_layernorm")
    linears = llm_linears(preset, layout)
    for i in range(p.layers):
        for linear in linears:
            for name, shape in _linear_tensors(linear):
                yield f"layers.{i}.{name}", shape
        if p.arch in {"Qwen3ForCausalLM", "Qwen3MoeForCausalLM"}:
            yield f"layers.{i}.self_attn.q_norm.weight", (p.head_dim,)
            yield f"layers.{i}.self_attn.k_norm.weight", (p.head_dim,)
        if p.arch == "Qwen3MoeForCausalLM":
            yield f"layers.{i}.mlp.gate.weight", (p.experts, p.hidden)
        if p.arch == "GptOssForCausalLM":
            yield f"layers.{i}.self_attn.sinks", (p.heads,)
            yield f"layers.{i}.mlp.router.weight", (p.experts, p.hidden)
            yield f"layers.{i}.mlp.router.bias", (p.experts,)
        for norm in norms:
            yield f"layers.{i}.{norm}.weight", (p.hidden,)
    yield "norm.weight", (p.hidden,)


def tensor_shapes(
    preset: Preset | str, layout: str, *, tied: bool = False, spelling: str = "flat"
) -> dict[str, Shape]:
    """Return every tensor of a checkpoint, in the order in which shards are filled.

    `preset` may be a name; `layout` is `custom` (InternVLChatModel) or `hf`
    (InternVLForConditionalGeneration). Only for hf: `tied` leaves out the head (the custom class
    always has one of its own), and `spelling` is that of the names, `flat` being what hubs hold;
    the order of the tensors is the same in all spellings.

    >>> tensor_shapes("tiny", "custom")["mlp1.1.weight"]
    (64, 128)
    """
    preset = PRESETS[preset] if isinstance(preset, str) else preset
    if layout not in LAYOUTS:
        msg = f"layout {layout!r} is unknown; choose one of {', '.join(LAYOUTS)}"
        raise ValueError(msg)
    if layout == "custom" and (tied or spelling != "flat"):
        msg = "tied embeddings and other spellings than flat exist only in the hf layout"
        raise ValueError(msg)
    head, llm, vision = SPELLINGS[spelling]
    if preset.arch == "InternLM2ForCausalLM" and layout == "custom":
        head = "language_model.output"
    shapes = {vision + name: shape for name, shape in _vision_tensors(preset, layout)}
    shapes |= {vision + name: shape for name, shape in _projector_tensors(preset, layout)}
    shapes |= {f"{llm}.{name}": shape for name, shape in _llm_tensors(preset, layout)}
    if not tied:
        shapes[f"{head}.weight"] = (preset.vocab, preset.hidden)
    return shapes


def added_tokens(preset: Preset) -> dict[str, int]:
    """Return the added tokens of an InternVL tokenizer around the id of `<IMG_CONTEXT>`."""
    pairs = ("img", "quad", "ref", "box")
    names = [f"<{slash}{pair}>" for pair in pairs for slash in ("", "/")]
    names.insert(2, "<IMG_CONTEXT>")
    tokens = {name: preset.image_token - 2 + i for i, name in enumerate(names)}
    if preset.name.startswith("tiny"):  # its vocabulary has no chat tokens before them
        tokens = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258} | tokens
    return tokens


_MODEL_TYPES = {
    "InternLM2ForCausalLM": "internlm2",
    "InternLM3ForCausalLM": "internlm3",
    "LlamaForCausalLM": "llama",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "GptOssForCausalLM": "gpt_oss",
}


def model_type(preset: Preset, layout: str) -> str:
    """Return `model_type` of the language model; the hf layout holds InternLM models as Llama."""
    kind = _MODEL_TYPES[preset.arch]
    return "llama" if layout == "hf" and kind.startswith("internlm") else kind


def llm_config(preset: Preset, layout: str, *, tied: bool, torch_dtype: str) -> dict[str, Any]:
    """Return the `llm_config` (custom) or `text_config` (hf) of a preset."""
    p, kind = preset, model_type(preset, layout)
    config: dict[str, Any] = {
        "architectures": [p.arch if kind != "llama" else "LlamaForCausalLM"],
        "model_type": kind,
        "attention_dropout": 0.0,
        "bos_token_id": p.bos,
        "eos_token_id": p.eos if layout == "custom" else p.eos_chat,
        "pad_token_id": p.pad,
        "hidden_act": "silu",
        "hidden_size": p.hidden,
        "initializer_range": 0.02,
        "intermediate_size": p.intermediate,
        "max_position_embeddings": p.max_positions,
        "num_attention_heads": p.heads,
        "num_hidden_layers": p.layers,
        "num_key_value_heads": p.kv_heads,
        "rms_norm_eps": p.rms_eps,
        "rope_scaling": {"type": "dynamic", "factor": p.dynamic_rope} if p.dynamic_rope else None,
        "rope_theta": p.rope_theta,
        "tie_word_embeddings": tied,
        "torch_dtype": torch_dtype,
        "use_cache": True,
        "vocab_size": p.vocab,
    }
    if kind in {"qwen3", "qwen3_moe", "internlm3"} or (kind == "llama" and layout == "hf"):
        config |= {"attention_bias": False, "head_dim": p.head_dim}
    if kind.startswith("internlm"):
        stem = "InternLM" + kind[-1]
        config["auto_map"] = {
            "AutoConfig": f"configuration_{kind}.{stem}Config",
            "AutoModelForCausalLM": f"modeling_{kind}.{stem}ForCausalLM",
        }
        config["bias"] = False
    if kind == "internlm3":
        config["qkv_bias"] = False
    elif kind == "llama" and layout == "hf":
        config["mlp_bias"] = False
    elif kind == "phi3":
        config |= {"original_max_position_embeddings": p.max_positions, "sliding_window": None}
    elif kind == "qwen3_moe":
        config |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": p.expert_intermediate,
            "norm_topk_prob": True,
            "num_experts": p.experts,
            "num_experts_per_tok": p.experts_per_token,
        }
    elif kind == "gpt_oss":
        config |= {
            "attention_bias": True,
            "head_dim": p.head_dim,
            "layer_types": [
                "full_attention" if i % 2 else "sliding_attention" for i in range(p.layers)
            ],
            "num_experts_per_tok": p.experts_per_token,
            "num_local_experts": p.experts,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": False,
            },
            "sliding_window": 128,
            "swiglu_limit": 7.0,
        }
    return config


def vision_config(preset: Preset, layout: str) -> dict[str, Any]:
    """Return the `vision_config` of a preset."""
    v = preset.vision
    config: dict[str, Any] = {
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": v.hidden,
        "initializer_range": 0.02,
        "intermediate_size": v.intermediate,
        "layer_norm_eps": 1e-6,
        "norm_type": v.norm_type,
        "num_attention_heads": v.heads,
        "num_channels": 3,
        "num_hidden_layers": v.layers,
    }
    if layout == "custom":
        return config | {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "drop_path_rate": 0.0,
            "dropout": 0.0,
            "image_size": v.image_size,
            "initializer_factor": 0.1,
            "patch_size": PATCH,
            "qk_normalization": v.qk_normalization,
            "qkv_bias": v.qkv_bias,
            "use_flash_attn": False,
        }
    return config | {
        "architectures": ["InternVLVisionModel"],
        "model_type": "internvl_vision",
        "attention_bias": v.qkv_bias,
        "hidden_dropout_prob": 0.0,
        "image_size": [v.image_size, v.image_size],
        "layer_scale_init_value": 0.1,
        "patch_size": [PATCH, PATCH],
        "projection_dropout": 0.0,
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
        "use_qk_norm": v.qk_normalization,
    }


def model_config(preset: Preset, layout: str, *, tied: bool, torch_dtype: str) -> dict[str, Any]:
    """Return the whole `config.json` of a preset."""
    llm = llm_config(preset, layout, tied=tied, torch_dtype=torch_dtype)
    vision = vision_config(preset, layout)
    common = {
        "downsample_ratio": 0.5,
        "tie_word_embeddings": tied,
        "torch_dtype": torch_dtype,
        "vision_config": vision,
    }
    if layout == "custom":
        module = "modeling_internvl_chat.InternVLChatModel"
        return common | {
            "architectures": ["InternVLChatModel"],
            "model_type": "internvl_chat",
            "auto_map": {
                "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
                "AutoModel": module,
                "AutoModelForCausalLM": module,
            },
            "dynamic_image_size": True,
            "force_image_size": preset.vision.image_size,
            "hidden_size": preset.hidden,
            "llm_config": llm,
            "max_dynamic_patch": 12,
            "min_dynamic_patch": 1,
            "pad2square": False,
            "ps_version": "v2",
            "select_layer": -1,
            "template": preset.template,
            "use_backbone_lora": 0,
            "use_llm_lora": 0,
            "use_thumbnail": True,
        }
    return common | {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "dtype": torch_dtype,
        "image_seq_length": (preset.vision.image_size // PATCH) ** 2 // 4,
        "image_token_id": preset.image_token,
        "projector_hidden_act": "gelu",
        "text_config": llm,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }
