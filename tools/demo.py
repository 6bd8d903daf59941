"""Models to try everything on: a base in both layouts, an adapter, and a training checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from make_checkpoint import removed_unless_done, write_adapter, write_checkpoint

import streamshard

__all__ = ["write_demo"]

RANK = 8


WHAT = {
    "base": "the model in the custom layout",
    "base-hf": "the same model in the HF layout",
    "lora": "an adapter for it, as PEFT saves one",
    "trained": "a training checkpoint: the model with LoRA pairs inside",
}


def write_demo(folder: Path, preset: str, seed: int = 0, **telling: Any) -> dict[str, str]:
    """Write the folders of a demo; returns their names with what they are.

    `base` and `base-hf` are one model, `lora` is an adapter of it, and `trained` is it with pairs inside,
    as InternVL's trainer saves it. `telling` is as `write_checkpoint` has it. Raises `FileExistsError` if
    one of these is there. If it does not succeed, nothing of it stays.
    """
    there = [name for name in WHAT if (folder / name).exists()]
    if there:
        msg = (
            f"{folder}: has {', '.join(there)}, a demo already. Use that, or choose a new folder, or "
            "remove that one first."
        )
        raise FileExistsError(msg)
    with removed_unless_done(folder):
        _write(folder, preset, seed, **telling)
    return WHAT


def _write(folder: Path, preset: str, seed: int, **telling: Any) -> None:
    base, hf, trained = folder / "base", folder / "base-hf", folder / "trained"
    write_checkpoint(base, preset, layout="custom", seed=seed, **telling)
    write_adapter(
        folder / "lora", preset, layout="custom", r=RANK, seed=seed, base_model_name="base"
    )
    blank = folder / "blank"
    write_checkpoint(blank, preset, layout="hf", seed=seed)
    streamshard.custom_to_hf(custom_path=base, hf_path=blank, save_path=hf)
    shutil.rmtree(blank)
    streamshard.wrap_lora(base=base, output=trained, llm_r=RANK, seed=seed)
    for file in trained.glob("*.safetensors"):
        _train(file, seed)
    for made in (hf, trained):
        (made / "streamshard.json").unlink()  # as if others had saved it


def _train(file: Path, seed: int) -> None:
    """Give every B that is zero, as before training, small values."""
    random = np.random.default_rng(seed)
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        for name, entry in sorted(json.loads(opened.read(length)).items()):
            if "lora_B" in name:
                values = random.standard_normal(entry["shape"]).astype(np.float32) * 0.02
                bits = values.view(np.uint32)
                wide = entry["dtype"] == "F32"
                opened.seek(8 + length + entry["data_offsets"][0])
                opened.write((bits if wide else (bits >> 16).astype(np.uint16)).tobytes())
