"""The shards of the small base that most tests use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reference
import torch
from pairs import LAYER, Pair
from reference import INDEX, save_file

FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
Q, K = f"{LAYER}.q_proj.weight", f"{LAYER}.k_proj.weight"


def weight_map(base: Path) -> dict[str, Any]:
    return json.loads((base / INDEX).read_text())["weight_map"]


def single(
    *tensors: tuple[str, torch.Tensor], drop: tuple[str, ...] = ()
) -> Callable[[Pair], None]:
    """Make the base one file, with some tensors replaced, added or dropped."""

    def change(pair: Pair) -> None:
        content = reference.read(pair.base) | dict(tensors)
        for file in (INDEX, FIRST, SECOND):
            (pair.base / file).unlink()
        content = {name: tensor for name, tensor in content.items() if name not in drop}
        save_file(content, pair.base / "model.safetensors", {"format": "pt"})

    return change


def put(row: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(tensor: torch.Tensor) -> torch.Tensor:
        tensor[row, 1] = value
        return tensor

    return run


ones = torch.ones


def merge(pair: Pair, output: Path, *more: str) -> list[str]:
    return [*pair.command[:-1], str(output), *more]
