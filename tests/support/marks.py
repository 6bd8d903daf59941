"""Marks that several test files set."""

from __future__ import annotations

import sys

import pytest

# Not in the quick test command of the README: memory, faults, power loss, limits, whole cycles.
slow = pytest.mark.slow

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits are those of Linux")

# Beside peft and transformers. Their models are built in one process; what they warn of is theirs.
PEERS = [
    pytest.mark.xdist_group("peers"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning"),
]
