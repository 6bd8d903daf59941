"""Folders of any size that take no room on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import reference
from reference import save_adapter

KEYS = {
    "command", "version", "output", "layout", "tensors", "bytes", "shards", "seconds",
    "peak_rss_bytes", "merged", "l2", "missing", "unexpected", "warnings",
}  # fmt: skip


SPARSE = "language_model.model.layers.{}.mlp.up_proj.weight"


def sparse_base(folder: Path, *, tensors: int, columns: int = 8192) -> Path:
    """A base of 64 MB a tensor that takes no space: its files are holes after the header."""
    folder.mkdir(parents=True)
    rows, end = 4096, 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for number in sorted(range(tensors), key=SPARSE.format):
        begin, end = end, end + rows * columns * 2
        header[SPARSE.format(number)] = {
            "dtype": "BF16",
            "shape": [rows, columns],
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text("{}")
    return folder


def sparse_adapter(folder: Path, columns: int = 8192) -> Path:
    stem = f"base_model.model.{SPARSE.format(0).removesuffix('.weight')}"
    pair = {
        f"{stem}.lora_A.weight": reference.normal((2, columns), 1, seed=1),
        f"{stem}.lora_B.weight": reference.normal((4096, 2), 1, seed=2),
    }
    return save_adapter(folder, pair, r=2, lora_alpha=2)
