"""Small InternVLChatModels as InternVL's trainer has them: loaded, wrapped by peft, trained, saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from make_checkpoint import write_checkpoint
from models import custom_model
from presets import PRESETS, model_config
from reference import read
from safetensors.torch import save_file
from torch import nn

SEVEN = [
    *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "o")),
    *(f"mlp.{part}_proj" for part in ("gate", "down", "up")),
]
# As in modeling_internvl_chat.py; for families that it raises for, what `wrap-lora` promises.
BACKBONE = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
LLM = {
    "InternLM2ForCausalLM": [
        "attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
    ],
    "Phi3ForCausalLM": [
        "mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj",
    ],
    "Qwen2ForCausalLM": SEVEN,
    "LlamaForCausalLM": SEVEN,
    "Qwen3ForCausalLM": SEVEN,
    "InternLM3ForCausalLM": SEVEN,
    "Qwen3MoeForCausalLM": [*SEVEN[:4], "gate_proj", "up_proj", "down_proj"],
    "GptOssForCausalLM": SEVEN[:4],
}  # fmt: skip
IMAGE_TOKEN = 99
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def save_base(folder: Path, preset: str, dtype: str = "bf16", layout: str = "custom") -> Path:
    write_checkpoint(folder, preset, layout=layout, dtype=dtype, max_shard_size="200KB")
    return folder


def load(folder: Path, preset: str, dtype: str = "bf16") -> nn.Module:
    """A plain model with the weights of a checkpoint, every one of them and no other."""
    made = model_of(preset, dtype)
    made.load_state_dict(read(folder), strict=True)
    return made


def model_of(preset: str, dtype: str = "bf16") -> nn.Module:
    """A plain model with some weights; experts are modules, as before transformers 5."""
    settings = model_config(PRESETS[preset], "custom", tied=False, torch_dtype="float32")
    made = custom_model(settings, IMAGE_TOKEN)
    if PRESETS[preset].arch == "Qwen3MoeForCausalLM":
        # By this peft would look for the packed experts of transformers 5.
        made.language_model.config.model_type = "qwen3"
        for layer in made.language_model.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts = experts(PRESETS[preset])
    return made.to(TORCH[dtype])


def experts(preset: Any) -> nn.ModuleList:
    hidden, inner = preset.hidden, preset.expert_intermediate
    sizes = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    return nn.ModuleList(
        nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        for _ in range(preset.experts)
    )


def wrap(
    model: nn.Module, preset: str, *, llm: int = 0, backbone: int = 0, **config: Any
) -> nn.Module:
    """What InternVLChatModel's constructor does for the ranks in its config, in that order."""
    for part, r, targets in (
        ("vision_model", backbone, BACKBONE),
        ("language_model", llm, LLM[PRESETS[preset].arch]),
    ):
        if r:
            settings = {"lora_alpha": 2 * r, "lora_dropout": 0.05, "target_modules": targets}
            lora = peft.LoraConfig(r=r, **(settings | config))
            setattr(model, part, peft.get_peft_model(getattr(model, part), lora))
    return model


def forward(model: nn.Module) -> torch.Tensor:
    """Logits for two images and texts; with LoRA if the parts are wrapped."""
    torch.manual_seed(2)
    tokens = torch.tensor([[5, IMAGE_TOKEN, 7, 8, 9], [1, 2, IMAGE_TOKEN, 20, 17]])
    pixels = torch.randn(2, 3, 28, 28)
    llm = model.language_model
    if isinstance(llm, peft.PeftModel):
        # What a wrapped model calls .model is not what the plain one does.
        model.language_model = llm.base_model.model
    try:
        return model(tokens, pixels)
    finally:
        model.language_model = llm


def train(model: nn.Module, steps: int = 3) -> None:
    """Optimizer steps on everything that is not frozen, and on the projector, as upstream has it."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = forward(model)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.arange(10)).backward()
        optimizer.step()
    model.eval()


def freeze_as_upstream(model: nn.Module) -> nn.Module:
    """Parts that are not wrapped stay as they are, but for the projector."""
    for part in (model.vision_model, model.language_model):
        if not isinstance(part, peft.PeftModel):
            part.requires_grad_(False)
    return model


def save(model: nn.Module, folder: Path, config: Mapping[str, Any]) -> Path:
    """As the trainer does: the state dict and the config."""
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
