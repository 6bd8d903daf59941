"""Layers of models that peft has wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import torch
from torch import nn

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return (
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    )
