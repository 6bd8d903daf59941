"""Widening and rounding against numpy, and the tests' own reference against fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from streamshard.tensors import rounding
from streamshard.tensors.dtypes import FLOATS
from streamshard.tensors.rounding import add_and_round, narrow, widen

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


def scratch(name: str, rows: int, columns: int) -> np.ndarray:
    return np.full((rows, columns), np.nan, np.float32)


@pytest.mark.parametrize("place", ["apart", "same"])
@pytest.mark.parametrize("kernel", ["compiled", "numpy"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 16), (64, 257), (2, 1300)], ids=str)
def test_sums_are_rounded_once(shape, dtype, kernel, place, monkeypatch):
    """With and without the compiled kernel, also over the block that is read."""
    if kernel == "numpy":
        monkeypatch.setattr(rounding, "_kernels", None)
    elif rounding._kernels is None:
        pytest.skip("the kernel is not compiled here")
    rng = np.random.default_rng(shape[1])
    wide = rng.standard_normal((shape[0], shape[1] + 5)).astype(np.float32)
    if dtype == "BF16":
        old = (wide.view(np.uint32) >> 16).astype(np.uint16)[:, 2:-3]
    else:
        old = wide.astype(FLOATS[dtype])[:, 2:-3]
    if place == "apart":
        old = old.copy()
    before = elements(old.copy().view(INTEGERS[dtype]), dtype)
    scale = np.ldexp(1.0, rng.integers(-24, 4, shape))
    update = (rng.standard_normal(shape) * scale).astype(np.float32)
    if dtype != "F32":
        # Ties: half a step away from the old element.
        ties = (reference.step(before, dtype) / 2 * rng.choice([-1, 1, 3], shape)).astype(
            np.float32
        )
        update = np.where(rng.random(shape) < 0.3, ties, update)
    new = old if place == "same" else np.empty(shape, old.dtype)
    squared = add_and_round(old, dtype, update, new, dtype, scratch).effected
    found = elements(np.ascontiguousarray(new).view(INTEGERS[dtype]), dtype)
    in_fp32 = (before.astype(np.float32) + update).astype(np.float64)
    np.testing.assert_array_equal(found, reference.round_once(in_fp32, dtype))
    assert squared == pytest.approx(((found - before) ** 2).sum(), rel=1e-6)


@pytest.mark.parametrize("kernel", ["compiled", "numpy"])
@pytest.mark.parametrize("where", ["old", "update", "overflow"])
@pytest.mark.parametrize("column", [0, 15, 16, 255, 256, 299])
def test_sums_that_are_not_finite_show_in_the_square(where, column, kernel, monkeypatch):
    if kernel == "numpy":
        monkeypatch.setattr(rounding, "_kernels", None)
    elif rounding._kernels is None:
        pytest.skip("the kernel is not compiled here")
    for bad in (0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0x7FFF, 0xFFFF):  # infinities and NaN
        old = np.full((2, 300), 0x3F80, np.uint16)
        update = np.zeros((2, 300), np.float32)
        if where == "old":
            old[1, column] = bad
        elif where == "update":
            update.view(np.uint32)[1, column] = bad << 16
        else:
            old[1, column], update[1, column] = 0x7F7F, 3e38
        with np.errstate(over="ignore", invalid="ignore"):
            squared = add_and_round(old, "BF16", update, old, "BF16", scratch).effected
        assert not np.isfinite(squared)


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
