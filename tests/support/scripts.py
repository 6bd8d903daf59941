"""Where the drop-in scripts are."""

from __future__ import annotations

from pathlib import Path

TOOLS = Path(__file__).parents[2] / "tools"
