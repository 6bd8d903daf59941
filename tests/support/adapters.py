"""Adapters of either layout, and weights carried to the other one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import reference
import torch
from folders import carried
from make_checkpoint import write_adapter
from presets import Preset, Vision
from safetensors.torch import load_file

# Sizes that no grid of tiles divides, and rows and columns beyond one tile.
ODD = Preset(
    "tiny-odd",
    Vision(136, 1, 2, 1048, image_size=28),
    "InternLM2ForCausalLM",
    hidden=240,
    layers=1,
    heads=6,
    kv_heads=2,
    head_dim=40,
    intermediate=1100,
    vocab=288,
    image_token=261,
    rope_theta=10000.0,
    max_positions=512,
)


def flat_name(name: str) -> str:
    """The flat HF name of a parameter of a loaded transformers model."""
    for nested, disk in (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(nested):
            return disk + name.removeprefix(nested)
    raise AssertionError(name)


def flat(module: str) -> str:
    """The flat HF tensor of a module of a loaded transformers model."""
    return flat_name(f"{module}.weight")


HOME = {"hf": flat, "custom": reference.in_base}


def adapter_of(folder: Path, preset: Preset | str, layout: str, keep: str = "", **how: Any) -> Path:
    """A generated adapter; only pairs whose name has a match of `keep`."""
    write_adapter(folder, preset, layout=layout, **{"targets": "all", "r": 8, **how})
    return respelled(folder, lambda key: key) if not keep else only(folder, keep)


def only(folder: Path, pattern: str) -> Path:
    content = load_file(folder / "adapter_model.safetensors")
    kept = {key: tensor for key, tensor in content.items() if re.search(pattern, key)}
    assert 0 < len(kept) < len(content)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_parameters"] = None  # packed experts are not kept
    modules = {re.split(r"\.lora_[AB]\.", key)[0] for key in kept}
    config["target_modules"] = sorted(m.removeprefix("base_model.model.") for m in modules)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return rewritten(folder, kept)


def respelled(folder: Path, change: Callable[[str], str]) -> Path:
    content = load_file(folder / "adapter_model.safetensors")
    return rewritten(folder, {change(key): tensor for key, tensor in content.items()})


def rewritten(folder: Path, content: Mapping[str, torch.Tensor]) -> Path:
    reference.save_file(dict(content), folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def carried_to(tensors: Any, preset: Preset, layout: str, to: str) -> dict[str, Any]:
    return dict(tensors) if layout == to else carried(tensors, preset, to)


def weights_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("model*.safetensors*")}
