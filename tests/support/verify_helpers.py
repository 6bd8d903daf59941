"""`verify`: everything that can go wrong with a checkpoint on disk is found and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pairs import Pair

import streamshard
from streamshard.errors import VerificationError

RECORD = "streamshard.json"
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


def problems(path: Path, **options: Any) -> dict[str, Any]:
    """What `verify` finds, which must be something."""
    with pytest.raises(VerificationError) as raised:
        streamshard.verify(path, **options)
    assert raised.value.exit_code == 8
    report = raised.value.report
    assert report["problems"]
    return report


def flip(file: Path, where: int) -> None:
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(data)


def said(report: dict[str, Any], *parts: str) -> bool:
    """Whether one of the problems has all of these parts."""
    return any(all(part in problem for part in parts) for problem in report["problems"])


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def put(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"x")


def output_with_code(pair: Pair) -> Path:
    """An output of two shards, with code and a folder beside them."""
    (pair.base / "modeling_own.py").write_text("x = 1\n")
    (pair.base / "examples" / "deep").mkdir(parents=True)
    (pair.base / "examples" / "deep" / "image.jpg").write_bytes(b"\xff\xd8")
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output)
    return pair.output
