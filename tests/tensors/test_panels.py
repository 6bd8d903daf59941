"""Factors as the kernels want them: by compiled loops and by numpy, against plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest

from streamshard.tensors import kernel, panels
from streamshard.tensors.lazy import Array
from streamshard.tensors.low_rank import LowRank
from streamshard.tensors.workspace import Workspace


@pytest.fixture(params=["compiled", "numpy"])
def loops(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(kernel, "chosen", lambda: "numpy")
    elif kernel.chosen() == "numpy":
        pytest.skip("not compiled")


def numbers(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("rank", [1, 15, 16, 40])
def test_rows_times_the_scale_and_their_norms(loops, rank, kind):
    rows = numbers(9, rank)
    rows[1] = 0
    rows[2] = [2.0**-149] + [0] * (rank - 1)
    rows[3, 0] = np.float32(2.0**-126)
    rows[4, 0], rows[5, 0] = np.inf, np.nan
    scale, least, tiny = 0.3, 2.0**-149, 0.25
    scaled, norms = np.full((9, rank + 3), 7, kind), np.full(9, 0.5)
    kernel.scale_rows(rows, scale, scaled[:, 1 : rank + 1], norms, least, tiny)
    assert np.array_equal(scaled[:, 1 : rank + 1], (rows * np.float64(scale)).astype(kind), True)
    assert (scaled[:, [0, -1]] == 7).all()
    for row, found in zip(rows.astype(np.float64).tolist(), norms.tolist(), strict=True):
        size = math.sqrt(math.fsum(value * value for value in row)) * scale
        size = max(size, least) if any(row) else 0.0
        lost = any(value and abs(value * scale) < 2.0**-126 for value in row)
        expected = math.hypot(0.5, size + tiny * lost)
        assert found == pytest.approx(expected, rel=1e-14, nan_ok=True)


@pytest.mark.parametrize(("first", "count"), [(0, 64), (0, 130), (5, 20), (60, 10), (70, 200)])
def test_columns_in_panels(loops, first, count):
    rows = numbers(3, count)
    width = -(-(first + count) // panels.PANEL)
    found = np.full((width, 7, panels.PANEL), 9, np.float32)
    squares = np.ones(width * panels.PANEL)
    kernel.pack_rows(rows, first, found, 2, squares)
    flat = found.transpose(1, 0, 2).reshape(7, -1)
    assert np.array_equal(flat[2:5, first : first + count], rows)
    flat[2:5, first : first + count] = 9
    assert (flat == 9).all()
    squares[first : first + count] -= (rows.astype(np.float64) ** 2).sum(0)
    assert squares == pytest.approx(1, abs=1e-12)


def test_memory_that_is_used_again_holds_nothing_of_before():
    def term(rows: int, rank: int, columns: int) -> LowRank:
        factors = [np.full(shape, 1.5, np.float32) for shape in ((rank, columns), (rows, rank))]
        A, B = (Array(f.reshape(-1).view(np.uint8), f.shape, "F32") for f in factors)
        return LowRank(A, B, 1.0, 0, rows)

    class NoFiles:
        pass

    work = Workspace(NoFiles())
    large, small = (term(40, 8, 200),), (term(7, 3, 70),)
    before = panels.panels_of(large, (0, 200), work), panels.rows_of(large, 0, work, wide=False)
    work.forget()
    strips, rows = (
        panels.panels_of(small, (0, 70), work),
        panels.rows_of(small, 0, work, wide=False),
    )
    assert np.shares_memory(strips.values, before[0].values)
    assert np.shares_memory(rows.scaled, before[1].scaled)
    flat = strips.values.transpose(1, 0, 2).reshape(3, -1)
    assert (flat[:, :70] == 1.5).all()
    assert not flat[:, 70:].any()
    assert (rows.left == 1.5).all()
    assert not rows.scaled[7:].any()
