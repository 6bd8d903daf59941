"""Widening and rounding against numpy, and the tests' own reference against fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from streamshard.tensors.dtypes import FLOATS
from streamshard.tensors.rounding import narrow, round_block, widen

INTEGERS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}


def elements(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Bit patterns as fp64."""
    if dtype == "BF16":
        bits, dtype = bits.astype(np.uint32) << 16, "F32"
    with np.errstate(invalid="ignore"):  # signalling NaN
        return bits.view({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float64)


def all_16_bits() -> np.ndarray:
    return np.arange(65536, dtype=np.uint16)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_widening_is_exact_for_every_element(dtype):
    out = np.empty(65536, np.float32)
    widen(all_16_bits().view(FLOATS[dtype]), dtype, out)
    with np.errstate(invalid="ignore"):  # signalling NaN
        found = out.astype(np.float64)
    np.testing.assert_array_equal(found, elements(all_16_bits(), dtype))


def hard_values(dtype: str) -> np.ndarray:
    """Every element, every midpoint of neighbours, and the fp32 values next to both."""
    with np.errstate(over="ignore"):
        points = elements(all_16_bits(), dtype)
        points = np.sort(points[np.isfinite(points)])
        middles = ((points[1:] + points[:-1]) / 2).astype(np.float32)
        largest = np.float32(points[-1])
        beyond = largest * np.float32(1 + 2.0 ** -reference.FORMATS[dtype][0])
    values = np.concatenate([points.astype(np.float32), middles, [beyond, -beyond]])
    values = values.astype(np.float32)
    with np.errstate(over="ignore"):
        around = [np.nextafter(values, np.float32(end)) for end in (-np.inf, np.inf)]
    values = np.concatenate([values, *around])
    return values[np.isfinite(values)]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_narrowing_rounds_to_nearest_even(dtype):
    values = hard_values("BF16" if dtype == "F32" else dtype)
    out = np.empty(values.shape, FLOATS[dtype])
    scratch = np.empty_like(values)
    narrow(values.copy(), dtype, out, scratch)
    expected = reference.round_once(values.astype(np.float64), dtype)
    np.testing.assert_array_equal(elements(out.view(INTEGERS[dtype]), dtype), expected)
    np.testing.assert_array_equal(scratch.astype(np.float64), expected)
    assert len(np.unique(expected)) > 60_000


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_what_is_not_finite_stays_so(dtype):
    values = np.array([np.inf, -np.inf, np.nan, -np.nan], np.float32)
    out = np.empty(4, FLOATS[dtype])
    narrow(values, dtype, out, np.empty_like(values))
    np.testing.assert_array_equal(elements(out.view(INTEGERS[dtype]), dtype), values)


@pytest.mark.parametrize("place", ["apart", "same"])
@pytest.mark.parametrize("to", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_blocks_are_rounded_to_nearest_even(dtype, to, place):
    """Also over the block that is read, where elements are as large."""
    bits = np.random.default_rng(0).integers(0, 2**32, (64, 257), np.uint32)
    bits = bits.view(np.uint16)[:, ::2] if dtype != "F32" else bits
    bits = np.ascontiguousarray(bits)
    with np.errstate(over="ignore", invalid="ignore"):
        before = elements(bits, dtype)
        expected = reference.round_once(before, to)
    bad = ~np.isfinite(expected)
    bits[bad], before[bad], expected[bad] = 0, 0, 0
    old = bits.view(FLOATS[dtype])
    new = old if place == "same" and dtype == to else np.empty(old.shape, FLOATS[to])
    squared = round_block(old, dtype, new, to, *(np.empty(old.shape, np.float32) for _ in range(2)))
    np.testing.assert_array_equal(elements(new.view(INTEGERS[to]), to), expected)
    assert squared == pytest.approx(((expected - before) ** 2).sum(), rel=1e-6)


@pytest.mark.parametrize("bad", [0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0x7FFF, 0xFFFF])
def test_blocks_that_are_not_finite_show_in_the_square(bad):
    old = np.full((2, 300), 0x3F80, np.uint16)
    old[1, 17] = bad  # infinities and NaN
    new, *scratch = (
        np.empty(old.shape, np.float16),
        *(np.empty(old.shape, np.float32) for _ in "ab"),
    )
    with np.errstate(over="ignore", invalid="ignore"):
        assert not np.isfinite(round_block(old, "BF16", new, "F16", *scratch))


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_reference_agrees_with_numpy(dtype):
    rng = np.random.default_rng(0)
    exponents = np.clip(rng.integers(-155, 130, 100_000), -1000, 1000)
    values = np.ldexp(rng.standard_normal(100_000), exponents)
    with np.errstate(over="ignore", under="ignore"):
        expected = values.astype({"F16": np.float16, "F32": np.float32}[dtype])
    np.testing.assert_array_equal(reference.round_once(values, dtype), expected.astype(np.float64))


@given(st.floats(-(2.0**127), 2.0**127))
def test_reference_finds_the_nearest_bf16(value):
    (found,) = reference.round_once(np.array([value]), "BF16")
    points = elements(all_16_bits(), "BF16")
    points = np.unique(points[np.isfinite(points)])
    place = int(np.searchsorted(points, value))
    near = points[max(place - 2, 0) : place + 2]
    gaps = [abs(Fraction(value) - Fraction(float(point))) for point in near]
    best = [point for point, gap in zip(near, gaps, strict=True) if gap == min(gaps)]
    if len(best) > 1:  # the last bit of the pattern tells the even one
        best = [p for p in best if not np.float32(p).view(np.uint32) >> 16 & 1]
    assert [found] == best


def test_reference_rounds_once():
    # Rounded to fp32 first, as torch does, this would be a tie and become 1.
    value = np.array([1 + 2.0**-8 + 2.0**-40])
    assert reference.round_once(value, "BF16")[0] == 1 + 2.0**-7
