"""Marks that several test files set."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import pytest

# Not in the quick test command of the README: memory, faults, power loss, limits, whole cycles.
slow = pytest.mark.slow


def slow_but(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Parameters of which the quick test command tries only a few."""
    return [
        value
        if value in quick
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=slow)
        for value in values
    ]


linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and peaks are those of Linux")

# Beside peft and transformers. Their models are built in one process; what they warn of is theirs.
PEERS = [
    pytest.mark.xdist_group("peers"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning"),
]
