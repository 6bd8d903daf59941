"""A pair with all that may lie beside a base."""

from __future__ import annotations

import pytest
from changing_files import (
    BESIDE,
    INDEX,
)
from pairs import Pair


@pytest.fixture
def full(pair: Pair) -> Pair:
    """A pair with all that may lie beside a base."""
    for name in BESIDE:
        (pair.base / name).parent.mkdir(exist_ok=True)
        (pair.base / name).write_text('{"a": 1}\n')
    for file in [pair.base / "config.json", pair.base / INDEX, *pair.adapter.glob("*.json")]:
        file.write_text(file.read_text() + "\n")
    (pair.base / "streamshard.json").write_text('{"adapters": []}\n')
    return pair
