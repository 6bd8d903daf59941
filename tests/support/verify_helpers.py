"""`verify`: everything that can go wrong with a checkpoint on disk is found and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import streamshard
from streamshard.errors import VerificationError

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
