"""The custom layout as modules, small and plain, so that converted weights can be run.

Only names, shapes and arithmetic follow InternVL's `modeling_intern_vit.py`,
`modeling_internvl_chat.py` and `modeling_internlm2.py`; the language models other than InternLM2
are transformers' own classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, rms_norm, silu


class Norm(nn.Module):
    """RMS norm, or layer norm with a bias."""

    def __init__(self, size: int, *, kind: str = "rms_norm", eps: float = 1e-6) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(size))
        if kind == "layer_norm":
            self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer_norm":
            return layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return rms_norm(x, x.shape[-1:], self.weight, self.eps)


class VisionAttention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        size = config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.qkv = nn.Linear(size, 3 * size, bias=config["qkv_bias"])
        self.proj = nn.Linear(size, size)
        if config["qk_normalization"]:
            self.q_norm = Norm(size)
            self.k_norm = Norm(size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if hasattr(self, "q_norm"):  # over all heads at once
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, inner)
        self.fc2 = nn.Linear(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        size, kind, eps = config["hidden_size"], config["norm_type"], config["layer_norm_eps"]
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(size, config["intermediate_size"])
        self.norm1 = Norm(size, kind=kind, eps=eps)
        self.norm2 = Norm(size, kind=kind, eps=eps)
        self.ls1 = nn.Parameter(torch.ones(size))
        self.ls2 = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1 * self.attn(self.norm1(x))
        return x + self.ls2 * self.mlp(self.norm2(x))


class VisionEmbeddings(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        size, patch = config["hidden_size"], config["patch_size"]
        patches = (config["image_size"] // patch) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, size))
        self.position_embedding = nn.Parameter(torch.zeros(1, patches + 1, size))
        self.patch_embedding = nn.Conv2d(3, size, patch, stride=patch)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).mT
        first = self.class_embedding.expand(len(pixels), -1, -1)
        return torch.cat([first, patches], 1) + self.position_embedding


class VisionModel(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = nn.Module()
        count = config["num_hidden_layers"]
        self.encoder.layers = nn.ModuleList(VisionLayer(config) for _ in range(count))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embeddings(pixels)
        for layer in self.encoder.layers:
            x = layer(x)
        return x


class InternLM2Layer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.theta = config["rope_theta"]
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = hidden // self.heads
        rows = (self.heads + 2 * self.groups) * self.head_dim
        self.attention = nn.ModuleDict(
            {"wqkv": nn.Linear(hidden, rows, bias=False), "wo": nn.Linear(hidden, hidden, False)}
        )
        self.feed_forward = nn.ModuleDict(
            {
                "w1": nn.Linear(hidden, inner, bias=False),
                "w3": nn.Linear(hidden, inner, bias=False),
                "w2": nn.Linear(inner, hidden, bias=False),
            }
        )
        self.attention_norm = Norm(hidden, eps=config["rms_norm_eps"])
        self.ffn_norm = Norm(hidden, eps=config["rms_norm_eps"])

    def rotate(self, x: Tensor) -> Tensor:
        """Turn each pair (i, i + half a head) of the last axis by the angle of its position."""
        half = self.head_dim // 2
        speed = self.theta ** (-torch.arange(half) / half)
        angle = torch.arange(x.shape[-2])[:, None] * speed
        a, b = x[..., :half], x[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def attend(self, x: Tensor) -> Tensor:
        # Each group: the query heads that share a key head, that key head, its value head.
        groups = self.attention["wqkv"](x).unflatten(-1, (self.groups, -1, self.head_dim))
        groups = groups.permute(0, 2, 3, 1, 4)  # batch, group, head in group, position, element
        q, k, v = groups[:, :, :-2], groups[:, :, -2:-1], groups[:, :, -1:]
        scores = self.rotate(q) @ self.rotate(k).mT * self.head_dim**-0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        return self.attention["wo"](mixed.flatten(1, 2).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.attention_norm(x))
        mlp, y = self.feed_forward, self.ffn_norm(x)
        return x + mlp["w2"](silu(mlp["w1"](y)) * mlp["w3"](y))


class InternLM2(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        self.model = nn.Module()
        self.model.tok_embeddings = nn.Embedding(vocab, hidden)
        count = config["num_hidden_layers"]
        self.model.layers = nn.ModuleList(InternLM2Layer(config) for _ in range(count))
        self.model.norm = Norm(hidden, eps=config["rms_norm_eps"])
        self.output = nn.Linear(hidden, vocab, bias=False)

    def logits(self, x: Tensor) -> Tensor:
        for layer in self.model.layers:
            x = layer(x)
        return self.output(self.model.norm(x))


class CustomModel(nn.Module):
    """Vision encoder, projector and language model as a custom config describes them."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        vision, llm = config["vision_config"], config["llm_config"]
        wide, hidden = 4 * vision["hidden_size"], llm["hidden_size"]
        self.image_token = config["image_token_id"]
        self.vision_model = VisionModel(vision)
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(wide), nn.Linear(wide, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.language_model = language_model(llm)

    def forward(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        images = self.mlp1(shuffle(self.vision_model(pixels)[:, 1:]))
        internlm2 = isinstance(self.language_model, InternLM2)
        model = self.language_model.model
        embedded = (model.tok_embeddings if internlm2 else model.embed_tokens)(tokens).clone()
        embedded[tokens == self.image_token] = images.flatten(0, 1)
        if internlm2:
            return self.language_model.logits(embedded)
        return self.language_model(inputs_embeds=embedded).logits


def shuffle(x: Tensor) -> Tensor:
    """Each square of 2 x 2 patches as one wide patch, in the order of `ps_version: v2`."""
    side = int(x.shape[1] ** 0.5)
    squares = x.unflatten(1, (side // 2, 2, side // 2, 2))
    return squares.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


def language_model(config: dict[str, Any]) -> nn.Module:
    """The language model that `llm_config` names; InternLM3 is the same as Llama."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if config["model_type"] == "internlm2":
        return InternLM2(config)
    kind = {"internlm3": "llama"}.get(config["model_type"], config["model_type"])
    rest = {k: v for k, v in config.items() if k not in {"model_type", "auto_map"}}
    made = AutoConfig.for_model(kind, **rest)
    return AutoModelForCausalLM.from_config(made, attn_implementation="eager", dtype=torch.float32)
