"""Every element is the exact value rounded once, whichever kernel computes it.

Compared with `exactly.py`, which is written from the definition and does not use the package.
"""

from __future__ import annotations

import ctypes
import doctest
import platform
import sys
import threading
from collections.abc import Sequence
from fractions import Fraction

import exactly
import numpy as np
import pytest
from exactly import Term
from hypothesis import given, settings
from hypothesis import strategies as st

from streamshard.disk.files import Files
from streamshard.engine.workers import Stop, share
from streamshard.errors import UsageError
from streamshard.tensors import computed as computed_nodes
from streamshard.tensors import exact, kernel
from streamshard.tensors.constructors import add_low_rank, cast, with_magnitude
from streamshard.tensors.lazy import Array, Lazy, NotFiniteError
from streamshard.tensors.low_rank import LowRank
from streamshard.tensors.rounding import Change, Changes
from streamshard.tensors.workspace import Workspace

DTYPES = ["BF16", "F16", "F32"]
KERNELS = kernel.available()


@pytest.fixture
def work():
    return Workspace(Files())


def stored(values: np.ndarray, dtype: str) -> Array:
    """Numbers that the format has."""
    elements = exactly.bits(values.astype(np.float32), dtype)
    return Array(elements.reshape(-1).view(np.uint8), values.shape, dtype)


def fitting(values: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers of a format near to some."""
    if dtype == "BF16":
        raw = values.astype(np.float32).view(np.uint32) & 0xFFFF0000
        return raw.view(np.float32)
    return exactly.numbers(exactly.bits(values.astype(np.float32), dtype), dtype)


def node(
    W: np.ndarray,
    dtype: str,
    terms: Sequence[Term],
    to: str,
    magnitude: np.ndarray | None = None,
    *,
    by_row: bool = True,
    factors: str = "F32",
) -> Lazy:
    made = [
        LowRank(stored(t.A, factors), stored(t.B, factors), t.scale, 0, len(W), t.weight)
        for t in terms
    ]
    if magnitude is not None:
        tensor = with_magnitude(stored(W, dtype), made[0], stored(magnitude, "F32"), by_row=by_row)
    else:
        tensor = add_low_rank(stored(W, dtype), made)
    return cast(tensor, to)


def computed(tensor: Lazy, work: Workspace, name: str) -> tuple[np.ndarray, Change]:
    """All elements by a kernel, and what was changed."""
    work.changes = Changes()
    work.forget()
    out = np.empty(tensor.nbytes, np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernel.VARIABLE, name)
        for start, stop, first, last in tensor.windows(1 << 18):
            assert (first, last) == (0, tensor.columns)
            step = tensor.row_nbytes
            tensor.window(start, stop, first, last, out[start * step : stop * step], work)
    kind = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[tensor.dtype]
    return out.view(kind).reshape(tensor.rows, -1), work.changes.total()


def check(
    W: np.ndarray,
    dtype: str,
    terms: Sequence[Term],
    to: str,
    work: Workspace,
    magnitude: np.ndarray | None = None,
    *,
    by_row: bool = True,
    factors: str = "F32",
) -> list[Change]:
    """All kernels give the bits of the reference; returns what they say of it."""
    expected = exactly.merged(W, terms, to, magnitude, by_row=by_row)
    tensor = node(W, dtype, terms, to, magnitude, by_row=by_row, factors=factors)
    found = []
    for name in KERNELS:
        if not np.isfinite(expected).all():
            with pytest.raises(NotFiniteError) as caught:
                computed(tensor, work, name)
            row = int(np.argmin(np.isfinite(expected).all(axis=1)))
            assert str(caught.value).startswith(f"row {row:,}:")
            continue
        elements, change = computed(tensor, work, name)
        wanted = exactly.bits(expected, to)
        unsigned = f"u{wanted.itemsize}"
        wrong = np.argwhere(elements.view(unsigned) != wanted.view(unsigned))
        assert not len(wrong), (name, wrong[0], W[tuple(wrong[0])], expected[tuple(wrong[0])])
        found.append(change)
        assert change.updated == W.size
        difference = expected.astype(np.float64) - W
        assert change.effected == pytest.approx((difference**2).sum(), rel=1e-6)
        assert change.unchanged == np.count_nonzero(expected.view("u4") == W.view("u4"))
    return found


def normal(shape: tuple[int, ...], size: float, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(np.float32)


# --- ordinary inputs ------------------------------------------------------------------------------


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", DTYPES)
@pytest.mark.parametrize("r", [1, 7, 32, 33])
def test_ordinary_inputs(r, factors, dtype, to, work):
    W = fitting(normal((13, 131), 0.02, 1), dtype)
    A, B = fitting(normal((r, 131), 0.02, 2), factors), fitting(normal((13, r), 0.1, 3), factors)
    check(W, dtype, [Term(16 / 3, B, A)], to, work, factors=factors)


@pytest.mark.parametrize("r", [129, 1000, 4096])
@pytest.mark.parametrize("to", DTYPES)
def test_high_ranks(r, to, work):
    W = fitting(normal((7, 70), 0.02, 1), "BF16")
    check(W, "BF16", [Term(2 / 3, normal((7, r), 0.01, 2), normal((r, 70), 0.02, 3))], to, work)


def test_ranks_for_which_fp32_proves_nothing(work):
    """Its bound has no proof for so many products; elements are computed in fp64."""
    r = 32 * 4096
    W, A, B = normal((1, 2), 1, 1), normal((r, 2), 0.02, 2), normal((1, r), 0.1, 3)
    for change in check(W, "F32", [Term(1.0, B, A)], "BF16", work):
        assert change.rechecked in (0, 2)  # numpy's are in fp64 from the beginning


@pytest.mark.parametrize("to", DTYPES)
def test_several_adapters_with_weights(to, work):
    """Their sum is exact, and so is the product of weight and scale."""
    W = fitting(normal((9, 70), 0.02, 1), "BF16")
    terms = [
        Term(1 / 3, normal((9, 8), 0.1, 2), normal((8, 70), 0.02, 3), 0.7),
        Term(16 / 7, normal((9, 40), 0.1, 4), normal((40, 70), 0.02, 5), -0.1),
        Term(2.0, normal((9, 1), 0.1, 6), normal((1, 70), 0.02, 7), 1e-3),
    ]
    check(W, "BF16", terms, to, work)


def test_weight_and_scale_are_multiplied_exactly(work):
    """0.1 * 0.1 in fp64 is more than the product by a few units in the last place."""
    W = np.full((1, 70), -(0.1 * 0.1), np.float32)
    left = Fraction(0.1) * Fraction(0.1) - Fraction(float(W[0, 0]))
    assert Fraction(0.1 * 0.1) != Fraction(0.1) ** 2 != -left
    ones = np.ones((1, 1), np.float32), np.ones((1, 70), np.float32)
    (change, *_) = check(W, "F32", [Term(0.1, *ones, 0.1), Term(1.0, ones[0], W * -0)], "F32", work)
    assert change.unchanged == 0
    rest = np.float32(0.1 * 0.1)
    check(np.full((1, 70), -rest), "F32", [Term(0.1, *ones, 0.1)], "F32", work)
    # What is left of the sum is what fp64 has lost of the product.
    parts = [Term(0.1, *ones, 0.1), Term(-(0.1 * 0.1), *ones)]
    check(np.zeros((1, 70), np.float32), "F32", parts, "F32", work)


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dora(dtype, to, by_row, work):
    W = fitting(normal((13, 131), 0.02, 1), dtype)
    m = np.abs(normal((13 if by_row else 131,), 1, 4)) + np.float32(0.1)
    m[3], m[5] = -m[3], 0
    W[2, 3], W[5, 5], W[4] = -0.0, -0.0, W[4] * 0
    term = Term(2 / 3, normal((13, 4), 0.1, 3), normal((4, 131), 0.02, 2))
    term.B[2], term.B[5] = 0, 0
    check(W, dtype, [term], to, work, m, by_row=by_row)


# --- inputs that are hard by construction ---------------------------------------------------------


def halves(W: np.ndarray, dtype: str) -> np.ndarray:
    """Half the distance from each element to its neighbour away from 0."""
    digits, least, _ = exactly.FORMATS[dtype]
    exponents = np.maximum(np.frexp(W)[1] - 1, least)
    return np.ldexp(1.0, exponents - digits).astype(np.float64)


@pytest.mark.parametrize("near", [0.0, 2.0**-149, 2.0**-70, 2.0**-40, 2.0**-30, 2.0**-20])
@pytest.mark.parametrize("to", ["BF16", "F16"])
def test_ties_and_what_is_beside_them(to, near, work):
    """The update is half a step, more or less by next to nothing."""
    W = fitting(normal((12, 200), 1, 1), to)
    W[:6] = np.ldexp(1.0, np.arange(-6, 0))[:, None]  # powers of two: the step below is half
    A, B = np.zeros((3, 200), np.float32), np.zeros((12, 3), np.float32)
    step = halves(W, to)
    A[0] = 1
    B[:, 0] = step[:, 0] / 2
    W[:] = W[:, :1]
    A[0, ::3], A[0, 1::3] = -1, 0.5
    A[1] = np.where(np.arange(200) % 2, 1, -1)
    B[:, 1] = near
    A[2, 5:9], B[:, 2] = 2.0**-60, 2.0**-60
    found = check(W, to, [Term(2.0, B, A)], to, work)
    assert near == 2.0**-20 or to == "F16" or found[0].rechecked or KERNELS == ("numpy",)


@pytest.mark.parametrize("to", ["BF16", "F16", "F32"])
def test_cancellation(to, work):
    """W and the update nearly cancel, wholly or to what is far below both."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        B, A = normal((10, 3), 1, seed), normal((3, 90), 1, seed + 1)
        A = fitting(A, "BF16")
        B = fitting(B, "BF16")
        W = fitting(-(B.astype(float) @ A).astype(np.float32), to)
        A[2, ::5] = 0
        B[:, 0] *= 2.0 ** rng.integers(-20, 20)
        check(W, to, [Term(1.0, B, A)], to, work)
        one = Term(1.0, np.ones((10, 1), np.float32), -W[:1].copy())
        rows = np.broadcast_to(W[:1], W.shape).copy()
        check(rows, to, [one], to, work)
        check(rows, to, [one, Term(2.0**-130, B, A)], to, work)


@pytest.mark.parametrize("to", ["BF16", "F16", "F32"])
def test_partial_sums_that_overflow_and_cancel(to, work):
    """Only what does not fit after exact summing is refused."""
    B = np.array([[2.0**100, 2.0**100, 1]] * 4, np.float32)
    A = np.array([[2.0**40], [-(2.0**40)], [0.3]], np.float32) * np.ones((1, 70), np.float32)
    W = fitting(normal((4, 70), 0.02, 1), to)
    check(W, to, [Term(1.0, B, A)], to, work)
    check(W, to, [Term(2.0**60, B, A), Term(-(2.0**60), B, A)], to, work)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("below", [True, False])
def test_the_border_of_what_fits(dtype, below, work):
    """Half a step above the largest number is too much, all that is less is rounded down to it."""
    digits, _, most = exactly.FORMATS[dtype]
    largest = float((2 - Fraction(2) ** (1 - digits)) * Fraction(2) ** most)
    W = np.full((3, 70), 1, np.float32)
    W[1, 7] = largest
    half = 2.0 ** (most - digits)
    B = np.array([[0, 0], [half, 2.0**-140], [0, 0]], np.float32)
    A = np.zeros((2, 70), np.float32)
    A[0, 7], A[1, 7] = 1, -1 if below else 1
    check(W, dtype, [Term(1.0, B, A)], dtype, work)


@pytest.mark.parametrize("to", ["BF16", "F32"])
def test_changes_that_are_larger_than_numbers_may_be(to, work):
    """From one end of what fits to the other."""
    W = np.full((3, 70), -(2.0**127), np.float32)
    W[1] = 2.0**100
    term = Term(1.5, np.full((3, 1), 2.0**64, np.float32), np.full((1, 70), 2.0**63, np.float32))
    term.B[1] = 2.0**63
    found = check(W, to, [Term(2.0, term.B * np.float32(0.9), term.A)], to, work)
    assert all(np.isfinite(change.effected) for change in found)


@pytest.mark.parametrize("to", DTYPES)
def test_subnormal_numbers(to, work):
    digits, least, _ = exactly.FORMATS[to]
    smallest = 2.0 ** (least - digits + 1)
    rng = np.random.default_rng(0)
    W = fitting(rng.integers(-300, 300, (20, 100)) * smallest, to)
    A = rng.integers(-9, 10, (4, 100)).astype(np.float32) * np.float32(2.0**-20)
    B = (rng.standard_normal((20, 4)) * smallest * 2.0**21).astype(np.float32)
    W[3], B[5], W[7, :50] = 0, 0, -0.0
    check(W, to, [Term(0.5, B, A)], to, work)
    check(W, to, [Term(2.0**-30, B, A)], to, work)
    check(W, to, [Term(1 / 3, B, A)], to, work)


@pytest.mark.parametrize("to", DTYPES)
def test_subnormal_factors(to, work):
    """s * b[k] or its product with a[k] is below what fp32 has."""
    W = fitting(normal((6, 70), 1, 1), "BF16")
    tiny = np.ldexp(normal((6, 4), 1, 2), -140).astype(np.float32)
    large = np.ldexp(normal((4, 70), 1, 3), 100).astype(np.float32)
    check(W, "BF16", [Term(3.0**-5, tiny, large)], to, work)
    check(np.ldexp(W, -40), "BF16", [Term(3.0**-5, tiny, large)], to, work)
    check(W, "BF16", [Term(1.0, tiny, tiny.T @ np.ones((6, 70), np.float32))], to, work)


@pytest.mark.parametrize("scale", [1e-310, 1e-300, 1e-70, 1e70, 1e300])
@pytest.mark.parametrize("weight", [1e-300, 1.0, 1e38])
def test_scales_of_any_size(scale, weight, work):
    W = fitting(normal((3, 66), 1, 1), "BF16")
    B, A = normal((3, 2), 1, 2), normal((2, 66), 1, 3)
    size = scale * weight
    if 1e-320 < size < 1e300:
        B = np.ldexp(B, -min(max(round(np.log2(size)) // 2, -120), 120)).astype(np.float32)
        A = np.ldexp(A, -min(max(round(np.log2(size)) // 2, -120), 120)).astype(np.float32)
    check(W, "BF16", [Term(scale, B, A, weight)], "BF16", work)


@pytest.mark.parametrize("to", DTYPES)
def test_zeros(to, work):
    """An exact zero is +0, but a -0 that nothing is added to stays."""
    W = np.zeros((4, 70), np.float32)
    W[:, ::2] = -0.0
    B, A = (
        np.array([[0, 0], [1, -1], [1, 1], [2.0**-149, 0]], np.float32),
        np.ones((2, 70), np.float32),
    )
    A[:, 5:7] = 0
    A[0, 11] = 2.0**-149
    W[2, 8:10] = -2
    check(W, to, [Term(1.0, B, A)], to, work)
    check(W, to, [Term(-1.0, B, A)], to, work)


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_any_numbers(data):
    """Of any size, from few, so that ties and cancellations are frequent."""
    work = Workspace(Files())
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    r = data.draw(st.integers(1, 4))
    pool = data.draw(
        st.lists(
            st.one_of(floats, st.sampled_from([0.0, -0.0, 1.0, 0.5, 3.0, 2.0**-9])),
            min_size=2,
            max_size=6,
        )
    )
    draw = st.sampled_from([*pool, *(-x for x in pool)])
    dtype, to = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))

    def matrix(*shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        found = data.draw(st.lists(draw, min_size=count, max_size=count))
        return np.array(found, np.float32).reshape(shape)

    with np.errstate(over="ignore"):
        W = fitting(matrix(rows, columns), dtype)
    W = np.where(np.isfinite(W), W, 1).astype(np.float32)
    scales = st.one_of(st.sampled_from([1.0, 0.5, 2 / 3]), st.floats(-1e6, 1e6))
    terms = [
        Term(
            data.draw(scales),
            matrix(rows, r),
            matrix(r, columns),
            data.draw(st.sampled_from([1.0, 0.3])),
        )
        for _ in range(data.draw(st.integers(1, 2)))
    ]
    check(W, dtype, terms, to, work)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.integers(-40, 40),
    st.booleans(),
)
def test_dora_of_any_size(seed, dtype, to, size, by_row):
    work = Workspace(Files())
    rng = np.random.default_rng(seed)
    few = np.array([0, 1, -1, 0.5, 3, 2.0**-8, 1 + 2.0**-7, 2.0**-20], np.float32)
    W = fitting(rng.choice(few, (4, 5)), dtype)
    B = np.ldexp(rng.choice(few, (4, 2)), size).astype(np.float32)
    A = np.ldexp(rng.choice(few, (2, 5)), -size).astype(np.float32)
    m = rng.choice(few, 4 if by_row else 5)
    term = Term(rng.choice([1.0, 2 / 3, -0.5]), B, A)
    values, _, _ = exactly.sums(W, [term])
    if not (values * values).sum(axis=1 if by_row else 0).all():
        for name in KERNELS:
            with pytest.raises(NotFiniteError, match="is zero, so DoRA"):
                computed(node(W, dtype, [term], to, m, by_row=by_row), work, name)
        return
    check(W, dtype, [term], to, work, m, by_row=by_row)


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("to", DTYPES)
def test_dora_that_ties(to, by_row, work):
    """The norm is a whole number, and elements are halfway between two numbers: no float can tell."""
    digits = exactly.FORMATS[to][0]
    if to == "F32":
        # 8191^2 + 127^2 + 15^2 + 5^2 + 2^2 = 2^26, and 8191 * 4097 is odd and of 25 digits.
        V, m = [8191, 127, 15, 5, 2], [4097 * 2.0**13, 4095 * 2.0**13, -4097.0, 3 * 2.0**10]
        assert sum(v * v for v in V) == 2**26
    else:
        V, m = [3, 4, 0, 0, 0], [5 * (1 + 2.0**-digits), -5 * (1 + 3 * 2.0**-digits), 5.0, 0.1]
    W = np.ldexp(np.tile(np.array(V, np.float32), (4, 1)), [[0], [-5], [3], [1]])
    term = Term(1.0, np.ones((4, 1), np.float32), np.full((1, 5), 2.0**-30, np.float32))
    whole = W.astype(np.float32)
    # W and the update are V together; or the update is nothing.
    split = Term(1.0, np.eye(4, dtype=np.float32), (whole / 2).astype(np.float32))
    magnitude = np.array(m, np.float32)
    for base, terms in ((whole / 2, split), (whole, Term(1.0, term.B * 0, term.A))):
        if by_row:
            check(base, "F32", [terms], to, work, magnitude)
        else:
            turned = Term(terms.scale, terms.A.T.copy(), terms.B.T.copy())
            check(base.T.copy(), "F32", [turned], to, work, magnitude, by_row=False)


def test_a_norm_that_cancels(work):
    """V is what is left of W and an update that nearly cancel: fp64 does not know its norm."""
    for to in DTYPES:
        A, B = normal((2, 40), 1, 1), normal((3, 2), 1, 2)
        exact_sum = B.astype(np.float64) @ A
        W = -exact_sum.astype(np.float32)
        m = np.array([1, 0.5, 3], np.float32)
        check(W, "F32", [Term(1.0, B, A)], to, work, m)


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("row", [0, 1, 5])
def test_a_norm_of_what_is_not_finite(row, by_row, work):
    """It is told where the base is not."""
    W = normal((6, 3), 1, 1)
    W[row, 2] = np.inf
    B, A = normal((6, 1), 1, 2), normal((1, 3), 1, 3)
    tensor = node(W, "F32", [Term(1.0, B, A)], "F32", np.ones(6 if by_row else 3), by_row=by_row)
    for name in KERNELS:
        with pytest.raises(NotFiniteError, match=rf"^row {row}: the base weight"):
            computed(tensor, work, name)


# --- kernels --------------------------------------------------------------------------------------


def test_windows_of_any_columns(work):
    """What is asked for does not matter, nor where panels of columns begin."""
    W = fitting(normal((70, 300), 0.02, 1), "BF16")
    terms = [Term(2 / 3, normal((70, 5), 0.1, 2), normal((5, 300), 0.02, 3))]
    for to in DTYPES:
        tensor = node(W, "BF16", terms, to)
        expected = exactly.bits(exactly.merged(W, terms, to), to)
        for name in KERNELS:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(kernel.VARIABLE, name)
                for start, stop, first, last in [
                    (0, 1, 0, 1),
                    (3, 70, 63, 65),
                    (5, 12, 1, 299),
                    (0, 50, 64, 192),
                ]:
                    shape = stop - start, last - first
                    out = np.full(shape, 7, expected.dtype)
                    tensor.window(start, stop, first, last, out.reshape(-1).view(np.uint8), work)
                    np.testing.assert_array_equal(out, expected[start:stop, first:last])


def test_sums_do_not_depend_on_the_compiled_kernel(work):
    compiled = [name for name in KERNELS if name != "numpy"]
    if not compiled:
        pytest.skip("no kernel is compiled here")
    W = fitting(normal((100, 700), 0.02, 1), "BF16")
    tensor = node(
        W, "BF16", [Term(2.0, normal((100, 8), 0.1, 2), normal((8, 700), 0.02, 3))], "BF16"
    )
    found = {name: computed(tensor, work, name)[1] for name in KERNELS}
    assert len({found[name].effected for name in compiled}) == 1
    assert len({change.unchanged for change in found.values()}) == 1
    for change in found.values():
        assert change.effected == pytest.approx(found[compiled[0]].effected, rel=1e-12)
        assert change.intended == pytest.approx(found[compiled[0]].intended, rel=1e-6)


def flush_subnormals() -> None:
    """As libraries made with `-ffast-math` have this thread do, and those that it starts."""
    library = ctypes.CDLL(None)
    environment = (ctypes.c_uint32 * 8)()
    library.fegetenv(environment)
    environment[7] |= 0x8040  # MXCSR: FTZ, DAZ
    library.fesetenv(environment)


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the bits are those of x86"
)
@pytest.mark.parametrize("compiled", [True, False])
def test_other_code_may_have_subnormals_flushed(compiled, monkeypatch):
    """Workers compute with them again, or refuse."""
    if compiled and "baseline" not in KERNELS:
        pytest.skip("installed without a compiler")
    if not compiled:
        monkeypatch.setattr(kernel, "_kernels", None)
    W = np.full((1, 3), 2.0**-149, np.float32)
    term = Term(1.0, np.full((1, 1), 2.0**-149, np.float32), np.ones((1, 3), np.float32))
    found, errors = [], []

    def do(name: str, work: Workspace) -> None:
        found.append(computed(node(W, "F32", [term], "F32"), work, name)[0])

    def run() -> None:
        flush_subnormals()
        try:
            share(KERNELS, do, 1, Stop())
        except UsageError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)  # its environment ends with it
    thread.start()
    thread.join()
    if not compiled:
        assert "subnormal numbers" in errors[0]
        return
    assert not errors
    assert len(found) == len(KERNELS)
    assert all((elements.view("u4") == 2).all() for elements in found)


@pytest.mark.parametrize("name", ["AVX512", "fast", "sse"])
def test_an_unknown_kernel(name, monkeypatch):
    monkeypatch.setenv(kernel.VARIABLE, name)
    with pytest.raises(UsageError, match="one of auto, avx512, avx2, baseline, numpy"):
        kernel.chosen()


def test_a_kernel_that_is_not_there(monkeypatch):
    monkeypatch.setattr(kernel, "available", lambda: ("baseline", "numpy"))
    kernel._of.cache_clear()
    monkeypatch.setenv(kernel.VARIABLE, "avx512")
    with pytest.raises(UsageError, match="baseline, numpy can be chosen"):
        kernel.chosen()
    monkeypatch.setenv(kernel.VARIABLE, "auto")
    assert kernel.chosen() == "baseline"
    kernel._of.cache_clear()


@given(
    st.fractions().filter(lambda x: x.denominator & (x.denominator - 1) == 0)
    | st.integers(-(2**40), 2**40).map(lambda x: Fraction(x, 2**20)),
    st.integers(-160, 130),
    st.sampled_from(DTYPES),
)
def test_rounding_of_integers_is_that_of_fractions(value, exponent, dtype):
    value *= Fraction(2) ** exponent
    scaled = exact.Scaled(value.numerator, 1 - value.denominator.bit_length())
    assert exact.rounded(scaled, dtype) == exactly.nearest(value, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_rounds_like_numpy(dtype):
    """Where numpy can: fp64 to fp32 and fp16 is one rounding."""
    rng = np.random.default_rng(1)
    values = np.ldexp(rng.standard_normal(3000), rng.integers(-160, 130, 3000))
    values = np.concatenate(
        [values, np.ldexp(rng.integers(-4096, 4096, 2000) / 2, rng.integers(-152, -120, 2000))]
    )
    if dtype == "BF16":
        return
    with np.errstate(over="ignore"):
        expected = exactly.numbers(exactly.bits64(values, dtype), dtype)
    found = np.array([exactly.nearest(Fraction(v), dtype) for v in values.tolist()])
    np.testing.assert_array_equal(found, expected)


def test_doctests_of_exact_numbers():
    assert doctest.testmod(exact).failed == 0


@pytest.mark.parametrize("by_row", [True, False])
def test_norms_over_several_strips(by_row, work, monkeypatch):
    """Of rows that are taken in parts, and of windows that are."""
    monkeypatch.setattr(computed_nodes, "STRIP_NBYTES", 1)
    W = fitting(normal((5, 2100), 0.02, 1), "BF16")
    W[1, :7] = [3, 4, 0, 0, 0, 0, 0]
    W[1, 7:] = 0
    term = Term(2 / 3, normal((5, 3), 0.1, 2), normal((3, 2100), 0.02, 3))
    term.B[1] = 0
    m = np.full(5 if by_row else 2100, 5 * (1 + 2.0**-8), np.float32)
    expected = exactly.merged(W, [term], "BF16", m, by_row=by_row)
    tensor = node(W, "BF16", [term], "BF16", m, by_row=by_row)
    assert isinstance(tensor, computed_nodes.Computed)
    assert len(list(tensor.strips())) == 3
    for name in KERNELS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(kernel.VARIABLE, name)
            work.forget()
            for start, stop, first, last in tensor.windows(1 << 14):
                out = np.empty((stop - start, last - first), np.uint16)
                tensor.window(start, stop, first, last, out.reshape(-1).view(np.uint8), work)
                wanted = exactly.bits(expected[start:stop, first:last], "BF16")
                np.testing.assert_array_equal(out, wanted)
