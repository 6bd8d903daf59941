"""Lazy tensors: any way to ask for rows gives the same bytes, and those are the right ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamshard.disk.files import Files
from streamshard.errors import InputError
from streamshard.tensors.computed import TILE_COLUMNS, TILE_ROWS, Computed
from streamshard.tensors.constructors import add_low_rank, cast
from streamshard.tensors.joined import Concat, concat
from streamshard.tensors.lazy import Array, Lazy, NotFiniteError, Stored, read_float32
from streamshard.tensors.low_rank import LowRank
from streamshard.tensors.panels import CHUNK_ROWS
from streamshard.tensors.rounding import Changes
from streamshard.tensors.workspace import Workspace

FLOATS = st.sampled_from(["BF16", "F16", "F32"])


@dataclass
class Source:
    """A file that tensors are cut from, and a workspace to read them with."""

    path: Path
    data: bytes = b""
    work: Workspace = field(default_factory=lambda: Workspace(Files()))

    def store(self, tensor: torch.Tensor) -> int:
        """Append the bytes of a tensor and return where they begin."""
        begin = len(self.data)
        self.data += reference.bits(tensor)
        return begin

    def close(self) -> None:
        self.path.write_bytes(self.data)

    def stored(self, offset: int, tensor: torch.Tensor) -> Stored:
        dtype = reference.SPELLED[tensor.dtype]
        return Stored(str(self.path), offset, tuple(tensor.shape), dtype, len(self.data))

    def all(self, *tensors: torch.Tensor) -> list[Stored]:
        """Write tensors one after the other and return them lazily."""
        offsets = [self.store(tensor) for tensor in tensors]
        self.close()
        return [self.stored(at, t) for at, t in zip(offsets, tensors, strict=True)]

    def fill(self, tensor: Lazy, start: int, stop: int) -> bytes:
        out = np.full((stop - start) * tensor.row_nbytes, 0xA5, np.uint8)
        tensor.fill(start, stop, out, self.work)
        return out.tobytes()

    def whole(self, tensor: Lazy) -> bytes:
        data = self.fill(tensor, 0, tensor.rows)
        assert len(data) == tensor.nbytes
        return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tensors")


def new_source(folder: Path) -> Source:
    number = len(list(folder.iterdir()))  # a file is read through one descriptor: never reuse one
    return Source(folder / f"{number}.bin")


def cuts(draw: Any, stop: int) -> list[tuple[int, int]]:
    """Ranges that follow each other from 0 to `stop`, some of them empty."""
    inner = sorted(draw(st.lists(st.integers(0, stop), max_size=5)))
    edges = [0, *inner, stop]
    return list(pairwise(edges))


def window(draw: Any, stop: int) -> tuple[int, int]:
    low, high = sorted([draw(st.integers(0, stop)), draw(st.integers(0, stop))])
    return low, high


@settings(max_examples=150)
@given(st.data(), st.integers(1, 300), st.integers(1, 24), FLOATS, FLOATS, st.integers(0, 3))
def test_any_blocking_gives_the_same_bytes(folder, data, rows, columns, dtype, target, count):
    draw = data.draw
    source = new_source(folder)
    W = reference.normal((rows, columns), 0.5, seed=rows, dtype=dtype)
    factors = []
    for i in range(count):
        r, kind = draw(st.sampled_from([1, 2, 5, 64, 65, 80])), draw(FLOATS)
        factors.append(reference.normal((r, columns), 1, seed=10 + i, dtype=kind))
        factors.append(reference.normal((rows, r), 0.1, seed=20 + i, dtype=kind))
    # A second copy of W, in pieces that are not neighbours in the file.
    pieces = cuts(draw, rows)
    shuffled = draw(st.permutations([p for p in pieces if p[0] < p[1]]))
    stored, *pairs = source.all(W, *factors)
    offsets = {p: source.store(torch.ones(3)) and source.store(W[p[0] : p[1]]) for p in shuffled}
    source.close()
    stored, *pairs = [replace(tensor, file_nbytes=len(source.data)) for tensor in (stored, *pairs)]
    parts = [source.stored(offsets[p], W[p[0] : p[1]]) for p in pieces if p in offsets]
    scattered = concat(parts)

    terms = [
        LowRank(A, B, 0.5 + i, 0, rows)
        for i, (A, B) in enumerate(zip(pairs[::2], pairs[1::2], strict=True))
    ]

    def compute(tensor: Lazy) -> Lazy:
        return cast(add_low_rank(tensor, terms) if terms else tensor, target)

    tensor = compute(stored)
    whole = source.whole(tensor)
    assert (tensor.shape, tensor.dtype) == ((rows, columns), target)
    assert len(whole) == tensor.nbytes

    # rows in any blocks, in any order
    blocks = draw(st.permutations(cuts(draw, rows)))
    assert (
        b"".join(data for _, data in sorted((b, source.fill(tensor, *b)) for b in blocks)) == whole
    )
    # a window, and a window of a window
    low, high = window(draw, rows)
    part = tensor.take(low, high)
    expected = whole[low * tensor.row_nbytes : high * tensor.row_nbytes]
    assert part.shape == (high - low, columns)
    assert source.whole(part) == expected
    assert b"".join(source.fill(part, *b) for b in cuts(draw, high - low)) == expected
    inner = window(draw, high - low)
    again = expected[inner[0] * tensor.row_nbytes : inner[1] * tensor.row_nbytes]
    assert source.whole(part.take(*inner)) == again
    # windows joined, the source in scattered parts, an update of joined windows
    assert source.whole(concat([tensor.take(*b) for b in cuts(draw, rows)])) == whole
    assert source.whole(compute(scattered)) == whole
    joined = concat([compute(stored).take(*b) for b in cuts(draw, rows)])
    low = draw(st.integers(0, rows - 1))
    high = draw(st.integers(low + 1, rows))  # what has no rows is below
    expected = whole[low * tensor.row_nbytes : high * tensor.row_nbytes]
    assert source.fill(joined, low, high) == expected
    assert source.whole(joined.take(low, high)) == expected
    if terms:
        # the terms added one by one to what is computed already, by window
        grown: Lazy = cast(stored, target)
        for term in terms:
            grown = add_low_rank(grown, [term])
        assert source.whole(grown) == whole
        split = concat([cast(stored, target).take(*b) for b in cuts(draw, rows)])
        assert source.whole(add_low_rank(split, terms)) == whole

    # and the bytes are right
    exact = reference.double(W)
    size = np.abs(exact)
    for i, (A, B) in enumerate(zip(factors[::2], factors[1::2], strict=True)):
        exact = exact + (0.5 + i) * (reference.double(B) @ reference.double(A))
        size = size + (0.5 + i) * (np.abs(reference.double(B)) @ np.abs(reference.double(A)))
    found = torch.frombuffer(bytearray(whole), dtype=reference.TORCH[target])
    found = reference.double(found.reshape(rows, columns))
    if terms:
        error = np.abs(found - exact)
        half = reference.step(exact, target) / 2
        assert (error <= half + 2.0**-50 * size).all()
    else:
        np.testing.assert_array_equal(found, reference.round_once(exact, target))
        assert dtype != target or whole == reference.bits(W)


@pytest.mark.parametrize("columns", [TILE_COLUMNS - 1, 2 * TILE_COLUMNS, 2 * TILE_COLUMNS + 5])
def test_wide_rows(folder, columns):
    check_blocks(new_source(folder), 130, columns)


@pytest.mark.parametrize("r", [8, 65])
@pytest.mark.parametrize("columns", [1, 3, 40])
def test_many_rows(folder, columns, r):
    """More than are kept of the scaled factor at a time."""
    check_blocks(new_source(folder), 2 * CHUNK_ROWS + 130, columns, r=r)


def check_blocks(source: Source, rows: int, columns: int, r: int = 8) -> None:
    W = reference.normal((rows, columns), 1, seed=1, dtype="BF16")
    A = reference.normal((r, columns), 1, seed=2)
    B = reference.normal((rows, r), 1, seed=3)
    w, a, b = source.all(W, A, B)
    tensor = add_low_rank(w, [LowRank(a, b, 0.25, 0, rows)])
    whole, row = source.whole(tensor), 2 * columns
    for size in (33, 128, 1000):
        blocks = [(at, min(at + size, rows)) for at in range(0, rows, size)]
        assert b"".join(source.fill(tensor, *block) for block in blocks) == whole
        backwards = [source.fill(tensor, *block) for block in reversed(blocks)]
        assert b"".join(reversed(backwards)) == whole
        parts = [tensor.take(*block) for block in blocks]
        assert source.whole(concat(parts)) == whole
    for low, high in ((0, 1), (65, 129), (rows - 3, rows), (rows // 2, rows)):
        assert source.whole(tensor.take(low, high)) == whole[low * row : high * row]
    exact = reference.double(W) + 0.25 * (reference.double(B) @ reference.double(A))
    found = torch.frombuffer(bytearray(whole), dtype=torch.bfloat16).reshape(rows, columns)
    # In fp64, which is not exact, but nearly always near enough.
    different = reference.double(found) != reference.round_once(exact, "BF16")
    assert different.mean() < 1e-6


@pytest.mark.parametrize("kind", ["stored", "array", "joined", "cast", "computed", "mixed"])
@pytest.mark.parametrize("at", [0, 5])
def test_a_window_may_be_empty(folder, kind, at):
    """Where heads are split by a config, a part can have no rows."""
    source = new_source(folder)
    W = reference.normal((9, 4), 1, seed=1)
    stored, _, other, a, b = source.all(W, W, W, torch.ones(2, 4), torch.ones(9, 2))
    scattered = concat([stored.take(0, 5), other.take(5, 9)])
    update = [LowRank(a, b, 1.0, 0, 9)]
    tensor = {
        "stored": stored,
        "array": Array(np.frombuffer(reference.bits(W), np.uint8), (9, 4), "F32"),
        "joined": scattered,
        "cast": cast(scattered, "BF16"),
        "computed": add_low_rank(scattered, update),
        "mixed": concat([add_low_rank(stored, update), other]),
    }[kind]
    part = tensor.take(at, at)
    assert (part.shape, part.dtype, source.whole(part)) == ((0, 4), tensor.dtype, b"")
    joined = concat([tensor.take(0, at), part, tensor.take(at, tensor.shape[0])])
    assert joined.shape == tensor.shape
    assert source.whole(joined) == source.whole(tensor)


SHAPES = [(), (1,), (7,), (0,), (3, 0), (0, 4), (5, 4), (3, 4, 5), (2, 3, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_casts_of_any_shape(folder, shape):
    source = new_source(folder)
    W = reference.normal(shape, 1, seed=1)
    (stored,) = source.all(W)
    tensor = cast(stored, "BF16")
    assert (tensor.shape, tensor.dtype) == (shape, "BF16")
    found = torch.frombuffer(bytearray(source.whole(tensor) or b"\0\0"), dtype=torch.bfloat16)
    expected = reference.round_once(reference.double(W), "BF16").reshape(-1)
    np.testing.assert_array_equal(reference.double(found[: expected.size]), expected)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s], ids=str)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_windows_of_any_shape(folder, shape, dtype):
    """Rows of dim 0 are what `take` and `concat` mean, whatever matrix `fill` works on."""
    source = new_source(folder)
    (stored,) = source.all(reference.normal(shape, 1, seed=1))
    tensor = cast(stored, dtype)
    whole, n = source.whole(tensor), shape[0]
    row = len(whole) // n if n else 0
    for low in range(n + 1):
        for high in range(low, n + 1):
            part = tensor.take(low, high)
            assert part.shape == (high - low, *shape[1:])
            assert source.whole(part) == whole[low * row : high * row]
        halves = concat([tensor.take(0, low), tensor.take(low, n)])
        assert halves.shape == shape
        assert source.whole(halves) == whole
        assert b"".join(source.whole(piece) for piece in halves.pieces) == whole


@pytest.mark.parametrize("shape", [s for s in SHAPES if s], ids=str)
def test_casts_of_joined_tensors(folder, shape):
    """Fused biases have one dimension, patch embeddings four: both may be joined and cast."""
    source = new_source(folder)
    one, gap, two = (reference.normal(shape, 1, seed=seed) for seed in (1, 2, 3))
    first, _, second = source.all(one, gap, two)
    tensor = cast(concat([first, second]), "BF16")
    expected = source.whole(cast(first, "BF16")) + source.whole(cast(second, "BF16"))
    assert tensor.shape == (2 * shape[0], *shape[1:])
    assert b"".join(source.whole(piece) for piece in tensor.pieces) == expected


# --- smart constructors ---------------------------------------------------------------------------


@pytest.fixture
def three(folder):
    """Three stored matrices of one file; only the first two are neighbours."""
    source = new_source(folder)
    q, k, _, v = source.all(
        *(reference.normal((rows, 6), 1, seed=rows, dtype="BF16") for rows in (8, 4, 1, 4))
    )
    return source, q, k, v


def test_adjacent_rows_are_one_tensor_again(three):
    _, q, _, _ = three
    for at in range(9):
        assert concat([q.take(0, at), q.take(at, 8)]) == q
    assert concat([concat([q.take(0, 2), q.take(2, 3)]), q.take(3, 8)]) == q


def test_neighbours_in_the_file_are_one_tensor(three):
    source, q, k, _ = three
    assert concat([q, k]) == Stored(str(source.path), 0, (12, 6), "BF16", len(source.data))
    assert isinstance(concat([k, q]), Concat)


def test_the_same_place_in_another_file_is_no_neighbour(three):
    _, q, k, _ = three
    elsewhere = Stored("other", k.offset, k.shape, k.dtype, k.file_nbytes)
    assert concat([q, elsewhere]).pieces == (q, elsewhere)


def test_fused_and_split_again(three):
    source, q, k, v = three
    fused = concat([v, q, k])
    assert fused.shape == (16, 6)
    assert [fused.take(0, 4), fused.take(4, 12), fused.take(12, 16)] == [v, q, k]
    assert fused.ranges() == (*v.ranges(), *concat([q, k]).ranges())
    assert source.whole(fused) == source.whole(v) + source.whole(q) + source.whole(k)
    # interleaved by groups, as InternLM2's wqkv, and back
    groups = [q.take(0, 4), k.take(0, 2), v.take(0, 2), q.take(4, 8), k.take(2, 4), v.take(2, 4)]
    grouped = concat(groups)
    assert concat([grouped.take(0, 4), grouped.take(8, 12)]) == q
    assert concat([grouped.take(4, 6), grouped.take(12, 14)]) == k
    assert concat([grouped.take(6, 8), grouped.take(14, 16)]) == v


def test_nested_joins_are_flat(three):
    _, q, _, v = three
    assert concat([v, concat([q, concat([v, q])])]).pieces == (v, q, v, q)
    assert concat([v]) is v


def test_reshapes_keep_the_bytes(three):
    source, q, _, v = three
    assert q.reshape((2, 4, 6)).reshape(q.shape) == q
    fused = concat([v, q])
    reshaped = fused.reshape((6, 2, 6))
    assert reshaped.shape == (6, 2, 6)
    assert source.whole(reshaped) == source.whole(fused)


def test_update_of_a_join_is_the_join_of_updates(three):
    source, q, _, v = three
    shapes = ((2, 6), (12, 2))
    data = [reference.bits(reference.normal(shape, 1, seed=1)) for shape in shapes]
    A, B = (
        Array(np.frombuffer(found, np.uint8), shape, "F32")
        for found, shape in zip(data, shapes, strict=True)
    )
    update = LowRank(A, B, 2.0, 0, 12)
    both = add_low_rank(concat([v, q]), [update])
    apart = concat([add_low_rank(v, [update.take(0, 4)]), add_low_rank(q, [update.take(4, 12)])])
    assert source.whole(both) == source.whole(apart)
    assert both.ranges() is None
    assert apart.ranges() is None


def test_integers_and_equal_dtypes_are_not_cast(three):
    _, q, _, _ = three
    assert cast(q, "BF16") is q
    for dtype in ("I64", "U8", "BOOL"):
        whole = Stored("x", 0, (2, 3), dtype, 100)
        assert cast(whole, "BF16") is whole


def test_an_array_is_like_what_is_stored(folder):
    source = new_source(folder)
    tensor = reference.normal((9, 5), 1, seed=1, dtype="F16")
    (stored,) = source.all(tensor)
    array = Array(np.frombuffer(reference.bits(tensor), np.uint8), (9, 5), "F16")
    assert source.whole(array.take(2, 7)) == source.whole(stored.take(2, 7))
    assert source.whole(array.reshape((3, 15))) == source.whole(stored)
    np.testing.assert_array_equal(
        read_float32(array, 1, 4, source.work), tensor[1:4].to(torch.float32).numpy()
    )


# --- what cannot be -------------------------------------------------------------------------------


def tensor_of(*shape: int, dtype: str = "BF16") -> Stored:
    return Stored("x", 0, shape, dtype, 10**6)


def update(a: tuple[int, int], b: tuple[int, int], start: int = 0, stop: int | None = None) -> Any:
    return LowRank(tensor_of(*a), tensor_of(*b), 1.0, start, b[0] if stop is None else stop)


IMPOSSIBLE = {
    "join-nothing": lambda: concat([]),
    "join-dtypes": lambda: concat([tensor_of(2, 3), tensor_of(2, 3, dtype="F16")]),
    "join-columns": lambda: concat([tensor_of(2, 3), tensor_of(2, 4)]),
    "join-ranks": lambda: concat([tensor_of(2, 3), tensor_of(6)]),
    "join-scalars": lambda: concat([tensor_of(), tensor_of()]),
    "rows-past-the-end": lambda: tensor_of(2, 3).take(0, 3),
    "rows-negative": lambda: tensor_of(2, 3).take(-1, 1),
    "rows-backwards": lambda: tensor_of(2, 3).take(2, 1),
    "rows-of-a-scalar": lambda: tensor_of().take(0, 0),
    "rows-of-a-join": lambda: concat([tensor_of(2, 3), tensor_of(2, 3)]).take(0, 5),
    "rows-of-a-cast": lambda: cast(tensor_of(2, 3), "F32").take(1, 3),
    "reshape": lambda: tensor_of(2, 3).reshape((4,)),
    "reshape-across-parts": lambda: concat([tensor_of(2, 3), tensor_of(2, 3)]).reshape((3, 4)),
    "reshape-computed": lambda: cast(tensor_of(2, 3), "F32").reshape((6,)),
    "update-rows": lambda: add_low_rank(tensor_of(4, 3), [update((2, 3), (5, 2))]),
    "update-columns": lambda: add_low_rank(tensor_of(4, 3), [update((2, 4), (4, 2))]),
    "update-window": lambda: add_low_rank(tensor_of(4, 3), [update((2, 3), (9, 2), 4, 9)]),
    "update-rank": lambda: add_low_rank(tensor_of(4, 3), [update((2, 3), (4, 1))]),
    "update-second": lambda: add_low_rank(
        tensor_of(4, 3), [update((2, 3), (4, 2)), update((2, 3), (3, 2))]
    ),
}


@pytest.mark.parametrize("make", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_trees_cannot_be_built(make):
    with pytest.raises(ValueError, match=r"."):
        make()


@pytest.mark.parametrize(
    ("dtype", "target"), [("F64", "BF16"), ("F8_E4M3", "F32"), ("F4", "BF16"), ("F32", "F64")]
)
def test_casts_that_would_lose_more_are_refused(dtype, target):
    with pytest.raises(InputError, match=f"{dtype} to {target}"):
        cast(tensor_of(2, 2, dtype=dtype), target)


@pytest.mark.parametrize("row", [0, TILE_ROWS - 1, TILE_ROWS, 299])
@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.nan, "F32", "base weight is not finite"),
        (-np.inf, "F32", "base weight is not finite"),
        (70000.0, "F16", "magnitude 70000 does not fit in F16"),
        (3.4e38, "BF16", "magnitude .* does not fit in BF16"),
    ],
)
def test_what_is_not_finite_is_an_error_with_its_row(folder, row, value, dtype, message):
    source = new_source(folder)
    W = reference.normal((300, 20), 1, seed=1)
    W[row, 13] = value
    w, a, b = source.all(W, torch.zeros(1, 20), torch.zeros(300, 1))
    tensor = Computed(w, (LowRank(a, b, 1.0, 0, 300),), dtype, (300, 20))
    with pytest.raises(NotFiniteError, match=rf"^row {row}: .*{message}"):
        source.whole(tensor)


def test_an_update_that_is_not_finite_is_an_error(folder):
    source = new_source(folder)
    B = torch.ones(100, 1)
    B[70] = 3e38
    w, a, b = source.all(torch.zeros(100, 4), torch.full((1, 4), 3e38), B)
    tensor = add_low_rank(w, [LowRank(a, b, 1.0, 0, 100)])
    with pytest.raises(NotFiniteError, match=r"^row 70: the merged weight is not finite"):
        source.whole(tensor)


def test_squared_change_is_that_of_what_is_written(folder):
    source = new_source(folder)
    W = reference.normal((200, 30), 0.02, seed=1, dtype="BF16")
    w, a, b = source.all(
        W, reference.normal((4, 30), 1, seed=2), reference.normal((200, 4), 0.01, seed=3)
    )
    tensor = add_low_rank(w, [LowRank(a, b, 1.0, 0, 200)])
    source.work.changes = Changes()
    written = torch.frombuffer(bytearray(source.whole(tensor)), dtype=torch.bfloat16)
    change = reference.double(written.reshape(200, 30)) - reference.double(W)
    assert source.work.changes.total().effected == pytest.approx((change**2).sum(), rel=1e-7)
