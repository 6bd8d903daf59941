"""Models of every family by names and shapes, in memory and running."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import internvit
import numpy as np
import pytest
import torch
import transformers
from presets import PRESETS, model_config, tensor_shapes

from streamshard.errors import InputError
from streamshard.internvl.model_config import Dims, dims_from_config
from streamshard.internvl.row_parts import in_memory
from streamshard.tensors.lazy import Stored

FAMILY = {
    "tiny": "qwen2", "tiny-qwen2": "qwen2", "tiny-6b-vit": "qwen2", "tiny-qwen3": "qwen3",
    "tiny-qwen3-moe": "qwen3_moe", "tiny-llama": "llama", "tiny-internlm2": "internlm2",
    "tiny-internlm3": "internlm3", "tiny-phi3": "phi3", "tiny-gpt-oss": "gpt_oss",
}  # fmt: skip

NUMPY, TORCH = in_memory(np.concatenate), in_memory(torch.cat)

TINY = [name for name in PRESETS if name.startswith("tiny-")]
# One name for each set of dimensions: models that differ in nothing here are left out.
MODELS = list(
    {repr(replace(p, name="", dynamic_rope=0)): name for name, p in PRESETS.items()}.values()
)


def config(preset: str, layout: str, *, tied: bool = False) -> dict[str, Any]:
    return model_config(PRESETS[preset], layout, tied=tied, torch_dtype="bfloat16")


def dims(preset: str, layout: str = "custom", *, tied: bool = False) -> Dims:
    return dims_from_config(config(preset, layout, tied=tied), architecture=PRESETS[preset].arch)


def stored(shapes: dict[str, tuple[int, ...]]) -> dict[str, Stored]:
    """Tensors that follow each other in one file, which nobody reads."""
    ends = itertools.accumulate((2 * math.prod(s) for s in shapes.values()), initial=1000)
    return {
        name: Stored("model.safetensors", at, shape, "BF16", 10**15)
        for (name, shape), at in zip(shapes.items(), ends, strict=False)
    }


def lazy(preset: str, layout: str, **how: Any) -> dict[str, Stored]:
    return stored(tensor_shapes(preset, layout, **how))


def shapes_of(tensors: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def values(preset: str, layout: str, **how: Any) -> dict[str, np.ndarray]:
    """Every element is different, so that a misplaced one shows."""
    rng = np.random.default_rng(0)
    shapes = tensor_shapes(preset, layout, **how)
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def message(call: Any) -> str:
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


GROUPED = "language_model.model.layers.0.attention.wqkv.weight"


def scramble(model: torch.nn.Module) -> None:
    """Give every parameter random values, those of norms too."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)


def hf_model(settings: dict[str, Any]) -> torch.nn.Module:
    made = transformers.InternVLConfig.from_dict({**settings, "dtype": "float32"})
    made._attn_implementation = "eager"
    model = transformers.InternVLForConditionalGeneration._from_config(
        made, attn_implementation="eager", dtype=torch.float32
    )
    return model.eval()


def custom_model(settings: dict[str, Any], image_token: int) -> torch.nn.Module:
    return internvit.CustomModel({**settings, "image_token_id": image_token}).eval()


def logits_of(model: torch.nn.Module, image_token: int) -> torch.Tensor:
    torch.manual_seed(2)
    tokens = torch.tensor([[5, image_token, 7, 8, 9], [1, 2, image_token, 200, 17]])
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        if isinstance(model, internvit.CustomModel):
            return model(tokens, pixels)
        mask = torch.ones_like(tokens)
        return model(input_ids=tokens, pixel_values=pixels, attention_mask=mask).logits


def load_custom(model: torch.nn.Module, tensors: dict[str, torch.Tensor], preset: Any) -> None:
    """Load all of it and nothing else; transformers 5 holds Qwen3-MoE's experts packed."""
    if preset.arch == "Qwen3MoeForCausalLM":
        tensors = pack(tensors, preset)
    model.load_state_dict(tensors, strict=True)


def pack(tensors: dict[str, Any], preset: Any) -> dict[str, Any]:
    packed = {n: t for n, t in tensors.items() if not re.search(r"\.experts\.\d+\.", n)}
    stems = {m[1] for n in tensors if (m := re.match(r"(.+\.experts)\.\d+\.", n))}
    for stem in stems:
        gate, up, down = (
            torch.stack([tensors[f"{stem}.{e}.{p}_proj.weight"] for e in range(preset.experts)])
            for p in ("gate", "up", "down")
        )
        packed[f"{stem}.gate_up_proj"] = torch.cat([gate, up], 1)
        packed[f"{stem}.down_proj"] = down
    return packed


MOE = "tiny-qwen3-moe"


def packed_values(layout: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    plain = {n: torch.from_numpy(t) for n, t in values(MOE, layout).items()}
    packed = pack(plain, PRESETS[MOE])
    return ({n: t.numpy() for n, t in each.items()} for each in (plain, packed))
