"""One tensor as the rows of several, told by a rule of the tables."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from models import NUMPY, message

from streamshard.internvl.families import Rule
from streamshard.internvl.model_config import Dims
from streamshard.internvl.row_parts import fuse, part_rows, rows_of_parts, segments, split

JOINED = Rule("qkv.weight", "{q|k|v}.weight", op="join")
GROUPED = Rule("wqkv.weight", "{q|k|v}.weight", "q hidden | kv hidden | kv hidden", "grouped")
# 4 query heads of 2 rows share 2 key-value heads.
HEADS = Dims("internlm2", heads=4, kv_heads=2, head_dim=2)
NAMES = ("q.weight", "k.weight", "v.weight")


@pytest.mark.parametrize(("rule", "rows"), [(JOINED, 12), (GROUPED, 16)], ids=["join", "grouped"])
def test_split_and_fuse_are_inverse(rule, rows):
    whole = np.arange(rows * 3).reshape(rows, 3)
    parts = split("w", whole, NAMES, rule, HEADS, NUMPY)
    assert tuple(parts) == NAMES
    assert np.array_equal(fuse(parts, rule, HEADS, NUMPY), whole)


def test_groups_take_turns():
    """For each key-value head: its two query heads, the key, the value."""
    parts = split("w", np.arange(16).reshape(16, 1), NAMES, GROUPED, HEADS, NUMPY)
    assert [part.ravel().tolist() for part in parts.values()] == [
        [0, 1, 2, 3, 8, 9, 10, 11],
        [4, 5, 12, 13],
        [6, 7, 14, 15],
    ]


def test_segments_cover_the_rows_once():
    for rule, sizes in ((JOINED, [4, 4, 4]), (GROUPED, [8, 4, 4])):
        found = list(segments(rule, sizes, HEADS))
        ends = [at + stop - start for at, _, start, stop in found]
        assert [at for at, *_ in found] == [0, *ends[:-1]]
        assert ends[-1] == sum(sizes)


def test_rows_by_the_config_or_in_equal_parts():
    stated = replace(JOINED, shape="vision vision")
    assert part_rows(JOINED, 3, Dims("qwen2"), 5, "w") == [5, 5, 5]
    assert part_rows(stated, 3, Dims("qwen2", vision_hidden=7), 5, "w") == [7, 7, 7]
    assert part_rows(GROUPED, 3, HEADS, 0, "w") == [8, 4, 4]
    assert "must say num_attention_heads" in message(
        lambda: part_rows(GROUPED, 3, Dims("x"), 0, "w")
    )


def test_rows_that_do_not_fit():
    assert "has 13 rows; 3 x 4 were" in message(lambda: rows_of_parts(JOINED, 3, HEADS, 13, "w"))
    assert "has 17 rows; 8 + 4 + 4" in message(lambda: rows_of_parts(GROUPED, 3, HEADS, 17, "w"))
    parts = {name: np.zeros((4, 3)) for name in NAMES}
    wide = {**parts, "v.weight": np.zeros((4, 5))}
    assert "columns must be the same" in message(lambda: fuse(wide, JOINED, HEADS, NUMPY))
    long = {**parts, "v.weight": np.zeros((5, 3))}
    assert "'v.weight' has 5 rows; 4 were" in message(lambda: fuse(long, JOINED, HEADS, NUMPY))
