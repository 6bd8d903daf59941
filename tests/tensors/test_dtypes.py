"""The table of dtypes, against those who know them; it must load nothing."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import streamshard
from streamshard.tensors.dtypes import (
    DTYPE_BITS,
    DTYPES,
    FLOATS,
    NOT_FINITE,
    NUMPY,
    TORCH_DTYPES,
)


@pytest.mark.parametrize("dtype", NUMPY)
def test_numpy_has_these_as_numbers(dtype):
    kind = np.dtype(NUMPY[dtype])
    letter = {"u": "U", "i": "I", "f": "F"}[kind.kind]
    assert f"{letter}{kind.itemsize * 8}" == dtype
    assert kind.itemsize * 8 == DTYPE_BITS[dtype]


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_widen_to_fp32_and_torch_knows_them(dtype):
    known = getattr(torch, TORCH_DTYPES[dtype])
    assert known.is_floating_point
    assert torch.promote_types(known, torch.float32) == torch.float32
    assert np.dtype(FLOATS[dtype]).itemsize == known.itemsize == DTYPE_BITS[dtype] // 8


def test_the_three_that_can_be_written():
    """Messages list them in this order."""
    assert list(DTYPES.items()) == [("bf16", "BF16"), ("fp16", "F16"), ("fp32", "F32")]
    assert set(FLOATS) == set(TORCH_DTYPES)
    assert list(FLOATS) == ["BF16", "F16", "F32"]
    assert streamshard.DTYPES == DTYPES


@pytest.mark.parametrize("dtype", NOT_FINITE)
def test_a_mask_is_of_an_element_or_half_of_it(dtype):
    unsigned, mask, value = NOT_FINITE[dtype]
    bits = np.dtype(unsigned).itemsize * 8
    assert bits == DTYPE_BITS[dtype] // (2 if dtype == "C64" else 1)
    assert value & mask == value < 1 << bits


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("F8_E5M2", "float8_e5m2"),
        ("F8_E4M3", "float8_e4m3fn"),
        ("F8_E4M3FNUZ", "float8_e4m3fnuz"),
        ("F8_E5M2FNUZ", "float8_e5m2fnuz"),
        ("BF16", "bfloat16"),
        ("F16", "float16"),
    ],
)
def test_what_is_not_finite_is_what_torch_says(dtype, name):
    unsigned, mask, value = NOT_FINITE[dtype]
    every = np.arange(1 << DTYPE_BITS[dtype]).astype(unsigned)
    signed = torch.from_numpy(every.view(unsigned.removeprefix("u")).copy())
    values = signed.view(getattr(torch, name)).to(torch.float32)
    np.testing.assert_array_equal((every & mask) == value, ~values.isfinite().numpy())


def test_the_table_loads_nothing():
    code = "import sys, streamshard.tensors.dtypes as d; d.DTYPES; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
