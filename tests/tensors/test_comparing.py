"""Distances of tensors, and whether their bytes are equal."""

from __future__ import annotations

import math

import numpy as np
import pytest
from arrays import KINDS, array

from streamshard.disk.files import BLOCK_NBYTES
from streamshard.tensors.comparing import (
    Distances,
    equal_bytes,
    is_comparable,
    squared_distance,
    tensor_distance,
)
from streamshard.tensors.lazy import Array, blocks


@pytest.mark.parametrize("dtypes", [("F32", "F32"), ("F32", "F64"), ("I8", "F16"), ("U64", "F32")])
def test_the_distance_and_the_norm_of_the_second(dtypes, work):
    one, other = array([[3, 0], [0, 2]], dtypes[0]), array([[0, 4], [0, 2]], dtypes[1])
    assert is_comparable(one, other)
    assert tensor_distance(one, other, work) == (25.0, 20.0)


def test_what_cannot_be_compared():
    one = array([1, 2], "F32")
    assert not is_comparable(one, array([1], "F32"))
    assert not is_comparable(one, Array(np.zeros(2, np.uint8), (2,), "F8_E4M3"))
    assert not is_comparable(one, Array(np.zeros(2, np.uint8), (2,), "BOOL"))


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_not_a_number_is_far_only_from_what_differs(dtype):
    bits = {"BF16": np.uint16, "F32": np.float32}[dtype]
    odd = np.array([0x7FC0, 0x7F80] if dtype == "BF16" else [np.nan, np.inf], bits).view(np.uint8)
    assert squared_distance(odd, dtype, odd.copy(), dtype) == 0
    assert math.isnan(squared_distance(odd, dtype, np.zeros_like(odd), dtype))


def test_equal_bytes_are_of_one_shape_and_dtype(work):
    one = array([[1, 2]], "F32")
    assert equal_bytes(one, array([[1, 2]], "F32"), work)
    assert not equal_bytes(one, array([[1, 3]], "F32"), work)
    assert not equal_bytes(one, array([[1], [2]], "F32"), work)
    assert not equal_bytes(array([0.0], "F32"), array([-0.0], "F32"), work)


@pytest.mark.parametrize("dtypes", [("I8", "F64"), ("F64", "I8"), ("F16", "F16")])
def test_blocks_lie_side_by_side(dtypes, work):
    """Of as many elements each, and none larger than it may be."""
    count = BLOCK_NBYTES + 9
    made = [array(np.arange(count) % 100, dtype) for dtype in dtypes]
    seen = ([], [])
    for pair in blocks(work, *made):
        assert max(block.nbytes for block in pair) <= BLOCK_NBYTES
        for place, (block, dtype) in enumerate(zip(pair, dtypes, strict=True)):
            seen[place].append(block.view(KINDS[dtype]).astype(np.float64))
    assert [len(block) for block in seen[0]] == [len(block) for block in seen[1]]
    for place in range(2):
        np.testing.assert_array_equal(np.concatenate(seen[place]), np.arange(count) % 100)
    assert [*blocks(work, array([], "F16"))] == []


def test_the_report_of_distances():
    found = Distances("x", {"a": 9.0, "b": 16.0, "c": 0.0, "d": math.nan}, 10, ["e"])
    assert dict(found.norms()) == {"a": 3.0, "b": 4.0, "d": None}
    del found.squared["d"]
    assert found.report() == {
        "reference": "x",
        "sum": 7.0,
        "per_parameter": 0.7,
        "global": 5.0,
        "compared": 3,
        "skipped": ["e"],
    }
    assert Distances(None).report() is None
