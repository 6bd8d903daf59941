"""A tiny model in both layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
from folders import make


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A tiny model in both layouts."""
    return {side: make(tmp_path / side, "tiny", side) for side in ("custom", "hf")}
