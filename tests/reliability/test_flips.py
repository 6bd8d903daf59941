"""`bench/flips.py`: changed bytes of every file are found, and it can miss something."""

from __future__ import annotations

import random
from pathlib import Path

import flips
import pytest
import reference
from pairs import Pair
from verify_helpers import (
    files_of,
    output_with_code,
)


@pytest.fixture
def merged(pair: Pair) -> Path:
    return output_with_code(pair)


def test_changed_bytes_of_every_file_are_found(merged):
    """What bench/flips.py does at 2,000 places of each file."""
    rng = random.Random(9)
    before = reference.digests(merged)
    for name in sorted(files_of(merged)):
        tried, missed = flips.missed_flips(merged, merged / name, 40, rng)
        assert tried == min(40, (merged / name).stat().st_size)
        assert missed == []
    files = [merged / name for name in sorted(files_of(merged))]
    tried, missed = flips.missed_changes(merged, files)
    assert tried > 4 * len(files)
    assert missed == []
    assert reference.digests(merged) == before


def test_the_harness_can_miss_something(merged, monkeypatch):
    monkeypatch.setattr(flips, "found", lambda folder: False)
    tried, missed = flips.missed_flips(merged, merged / "config.json", 5, random.Random(1))
    assert tried == len(missed) == 5
